//! A connection to a machine's vsock socket, passed through: after an HTTP upgrade, bytes in both directions.
//!
//! The daemon parses none of them, not even whether the machine's socket device has accepted: whoever asked
//! does. A guest that sends without a pause, or nothing at all, costs a connection's two buffers, and holds
//! up its own client alone.

use super::host::Host;
use super::routes::Name;
use crate::api::{ApiError, Code, State as Phase, VSOCK_PROTOCOL};
use crate::vm::spec::VsockSpec;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::Response;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

/// Bytes under way in each direction of a connection.
const BUFFER_BYTES: usize = 64 << 10;
/// How long a machine's socket device may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a guest may say nothing once its client has said all. A guest that never ends would keep the
/// connection of a client that is long gone.
const SILENCE: Duration = Duration::from_secs(30);

/// `GET /v1/vms/NAME/vsock`, upgraded.
pub(super) async fn connect(
    State(host): State<Arc<Host>>,
    Name(name): Name,
    mut request: Request,
) -> Result<Response, ApiError> {
    let vm = host.vm(&name).await?;
    let wants = request.headers().get(header::UPGRADE);
    let wants = wants.is_some_and(|protocol| protocol == VSOCK_PROTOCOL);
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let (Some(upgrade), true) = (upgrade, wants) else {
        let line = format!("expected an upgrade to {VSOCK_PROTOCOL}");
        return Err(ApiError::new(Code::BadRequest, line));
    };
    let permit = Arc::clone(&host.sockets).try_acquire_owned();
    let permit = permit.map_err(|_| {
        let line = "too many connections to guests (limits.sockets)";
        ApiError::new(Code::Unavailable, line)
    })?;
    let (state, file) = {
        let view = vm.view.borrow();
        (view.state, view.record.vm_file.clone())
    };
    if !matches!(state, Phase::Running) {
        let line = format!("{name} is {}: nothing in it answers", state.word());
        return Err(ApiError::new(Code::Conflict, line));
    }
    let path = socket_of(&host.shared.places.runtime, &name, &file);
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, UnixStream::connect(&path)).await;
    let machine = connected
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        .map_err(|error| unreachable(&name, &error))?;
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            pass_on(TokioIo::new(upgraded), machine, SILENCE).await;
        }
        drop(permit);
    });
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, VSOCK_PROTOCOL)
        .body(Body::empty());
    response.map_err(|error| ApiError::new(Code::Internal, error.to_string()))
}

/// Passes bytes on until both sides have ended. How a connection ends is its client's business, not ours.
async fn pass_on(
    client: impl AsyncRead + AsyncWrite,
    machine: impl AsyncRead + AsyncWrite,
    silence: Duration,
) {
    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_machine, mut to_machine) = tokio::io::split(machine);
    let (tell, mut told) = watch::channel(false);
    let up = async {
        let mut buffer = vec![0; BUFFER_BYTES];
        while let Ok(n @ 1..) = from_client.read(&mut buffer).await {
            if to_machine
                .write_all(buffer.get(..n).unwrap_or_default())
                .await
                .is_err()
            {
                break;
            }
        }
        let _gone = to_machine.shutdown().await;
        tell.send_replace(true);
    };
    let down = async {
        let (mut buffer, mut said_all) = (vec![0; BUFFER_BYTES], false);
        loop {
            let read = from_machine.read(&mut buffer);
            let read = match said_all {
                true => tokio::time::timeout(silence, read).await.unwrap_or(Ok(0)),
                false => tokio::select! {
                    read = read => read,
                    _ = told.changed() => {
                        said_all = true;
                        continue;
                    }
                },
            };
            let Ok(n @ 1..) = read else { break };
            if to_client
                .write_all(buffer.get(..n).unwrap_or_default())
                .await
                .is_err()
            {
                break;
            }
        }
        let _gone = to_client.shutdown().await;
    };
    tokio::join!(up, down);
}

fn unreachable(name: &str, error: &io::Error) -> ApiError {
    if error.kind() == io::ErrorKind::NotFound {
        let line = format!("{name} has no socket device; expected [vsock] in its VM file");
        return ApiError::new(Code::Conflict, line);
    }
    ApiError::new(Code::Host, format!("the vsock socket of {name}: {error}"))
}

/// Where the machine's socket is: where its VM file says, or in its runtime directory.
fn socket_of(runtime: &Path, name: &str, file: &str) -> PathBuf {
    let file: toml::Table = toml::from_str(file).unwrap_or_default();
    let path = file
        .get("vsock")
        .and_then(|vsock| vsock.get("path")?.as_str());
    let vsock = VsockSpec {
        path: path.map(PathBuf::from),
        ..VsockSpec::default()
    };
    vsock.socket(runtime, name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn socket_is_where_the_vm_file_says() {
        let of = |file: &str| socket_of(Path::new("/r"), "web", file);
        assert_eq!(of("[vsock]\npath = \"/x/y\"\n"), Path::new("/x/y"));
        for file in ["", "[vsock]\ncid = 3\n", "no TOML"] {
            assert_eq!(of(file), Path::new("/r/vms/web/vsock.sock"));
        }
    }

    #[tokio::test]
    async fn bytes_and_ends_are_passed_on() {
        let (mut client, near) = duplex(64);
        let (far, mut guest) = duplex(64);
        let passing = tokio::spawn(pass_on(near, far, SHORT));
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = String::new();
        guest.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "question");
        guest.write_all(b"answer").await.unwrap();
        drop(guest);
        heard.clear();
        client.read_to_string(&mut heard).await.unwrap();
        assert_eq!(heard, "answer");
        passing.await.unwrap();
    }

    #[tokio::test]
    async fn a_guest_that_never_ends_does_not_keep_a_connection_whose_client_is_gone() {
        let (client, near) = duplex(64);
        let (far, _guest) = duplex(64);
        let passing = tokio::spawn(pass_on(near, far, SHORT));
        drop(client);
        let ended = tokio::time::timeout(SILENCE, passing).await;
        ended.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_may_be_silent_as_long_as_it_likes() {
        let (mut client, near) = duplex(64);
        let (far, mut guest) = duplex(64);
        let _passing = tokio::spawn(pass_on(near, far, SHORT));
        tokio::time::sleep(10 * SHORT).await;
        guest.write_all(b"x").await.unwrap();
        assert_eq!(client.read_u8().await.unwrap(), b'x');
    }
}
