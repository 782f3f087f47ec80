//! The socket, and HTTP on it: who may connect, and how much one connection may cost.

use super::host::Host;
use super::lock::Lock;
use super::notify::notify;
use super::{ServeError, os, routes};
use crate::api::SOCKET_NAME;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::unistd::{Gid, chown};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The group whose members may use the socket, where it exists.
const GROUP: &str = "bulkhead";
/// How long a client may take to send the head of its request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Most header lines of a request.
const HEADERS_MAX: usize = 32;
/// Most bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Pause after the kernel has refused a connection for want of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// What a client reads when there are too many.
const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n\
    connection: close\r\ncontent-length: 100\r\n\r\n\
    {\"schema_version\":1,\"code\":\"unavailable\",\"message\":\"too many requests at once (limits.connections)\"}";

/// The listening socket and the lock on its directory.
#[derive(Debug)]
pub(super) struct Socket {
    listener: std::os::unix::net::UnixListener,
    _lock: Lock,
}

impl Socket {
    /// Makes the runtime directory and the socket in it, for this user and the group.
    pub(super) fn bind(runtime: &Path) -> Result<Self, ServeError> {
        let shown = runtime.display().to_string();
        let group = group(&fs::read_to_string("/etc/group").unwrap_or_default());
        super::make_private(runtime).map_err(os(shown.clone()))?;
        let lock = Lock::take(&runtime.join("serve.lock"))?;
        let path = runtime.join(SOCKET_NAME);
        // The lock says that nobody listens on what is there.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(os(path.display().to_string())(error));
            }
            _ => {}
        }
        let bind = || -> io::Result<_> {
            let listener = std::os::unix::net::UnixListener::bind(&path)?;
            listener.set_nonblocking(true)?;
            share(&path, group, 0o660)?;
            share(runtime, group, 0o750)?;
            Ok(listener)
        };
        let listener = bind().map_err(os(path.display().to_string()))?;
        Ok(Self {
            listener,
            _lock: lock,
        })
    }
}

/// The group in the text of `/etc/group` (group(5)). Not by the C library: a static program must not
/// ask it for names, since it would load other libraries for that.
fn group(groups: &str) -> Option<Gid> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next()? == GROUP;
        let id = fields.nth(1)?.parse().ok()?;
        found.then(|| Gid::from_raw(id))
    })
}

/// Gives a path to the group, if there is one; to nobody otherwise.
fn share(path: &Path, group: Option<Gid>, mode: u32) -> io::Result<()> {
    let mode = match group {
        // A user who is not in the group cannot give it anything.
        Some(gid) if chown(path, None, Some(gid)).is_ok() => mode,
        _ => mode & 0o700,
    };
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Serves until a signal ends it.
pub(super) async fn serve(socket: Socket, host: Arc<Host>) -> Result<(), ServeError> {
    let listener = UnixListener::from_std(socket.listener).map_err(os("the socket"))?;
    let on = |kind| signal(kind).map_err(os("handling signals"));
    let mut terminate = on(SignalKind::terminate())?;
    let mut interrupt = on(SignalKind::interrupt())?;
    let permits = Arc::new(Semaphore::new(host.shared.config.limits.connections));
    let app = routes::router(host);
    notify("READY=1");
    tracing::info!("serving");
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => match Arc::clone(&permits).try_acquire_owned() {
                    Ok(permit) => drop(tokio::spawn(connection(stream, app.clone(), permit))),
                    Err(_) => refuse(stream).await,
                },
                Err(error) => {
                    tracing::warn!(%error, "a connection was not taken");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
        }
    }
    notify("STOPPING=1");
    tracing::info!("ending; machines run on");
    Ok(())
}

/// Says that there are too many; a client that does not listen is not waited for.
async fn refuse(mut stream: UnixStream) {
    let _told = tokio::time::timeout(Duration::from_millis(1), stream.write_all(BUSY)).await;
}

/// One request: connections are not kept, so that none idles in somebody's place.
async fn connection(stream: UnixStream, app: axum::Router, permit: OwnedSemaphorePermit) {
    let user = stream.peer_cred().map(|peer| peer.uid()).ok();
    let app = app.layer(axum::Extension(routes::Caller(user)));
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(app))
        .with_upgrades()
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended early");
    }
    drop(permit);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{ApiError, Code};

    #[test]
    fn busy_answer_is_a_whole_error() {
        let text = std::str::from_utf8(BUSY).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(
            head.contains(&format!("content-length: {}", body.len())),
            "{}",
            body.len()
        );
        let error: ApiError = serde_json::from_str(body).unwrap();
        assert_eq!(error.code, Code::Unavailable);
    }

    #[test]
    fn group_is_found_by_its_name() {
        let groups = "root:x:0:\nbroken\nbulkhead2:x:7:\nbulkhead:x:42:a,b\n";
        assert_eq!(group(groups), Some(Gid::from_raw(42)));
        assert_eq!(group("root:x:0:\n"), None);
    }

    #[test]
    fn socket_is_for_its_owner_and_a_second_daemon_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = dir.path().join("run");
        let socket = Socket::bind(&runtime).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&runtime.join(SOCKET_NAME)) & 0o007, 0);
        assert_eq!(mode(&runtime) & 0o007, 0);
        let second = Socket::bind(&runtime);
        assert!(matches!(second, Err(ServeError::InUse { .. })));
        drop(socket);
        // The stale socket is replaced.
        Socket::bind(&runtime).unwrap();
    }
}
