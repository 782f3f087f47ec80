//! The requests of the API that are about networks.

use super::host::Host;
use super::network::CaptureWish;
use super::routes::{Answer, Asked, Caller, Json, carried_out, json};
use super::stream::pieces;
use crate::api::{ApiError, Changed, Code, SCHEMA_VERSION};
use crate::network::spec::NetworkSpec;
use crate::supervisor::driver::readable;
use axum::Extension;
use axum::body::Bytes;
use axum::extract::{Path, State};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::unistd::pipe2;
use serde::Deserialize;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;

/// Bytes of each frame that are captured unless something else is said.
const SNAP_BYTES: u32 = 65_535;
/// Bytes of a capture unless something else is said, and at most.
const FILE_BYTES: u64 = 64 << 20;
const FILE_BYTES_MAX: u64 = 1 << 30;
/// Length of a capture unless something else is said, and at most, in seconds.
const SECONDS: u64 = 3600;
const SECONDS_MAX: u64 = 24 * 3600;
/// Bytes that are read of a capture at a time.
const PIECE_BYTES: usize = 64 << 10;

type Hosted = State<Arc<Host>>;

fn changed(name: String, changed: bool) -> Answer {
    json(&Changed {
        schema_version: SCHEMA_VERSION,
        name,
        changed,
        state: None,
    })
}

/// `GET /v1/networks`.
pub(super) async fn list(State(host): Hosted) -> Answer {
    json(&host.networks.list())
}

/// `POST /v1/networks`.
pub(super) async fn create(
    State(host): Hosted,
    Extension(caller): Extension<Caller>,
    Json(spec): Json<NetworkSpec>,
) -> Answer {
    host.check_up()?;
    let name = spec.name.clone();
    let made = carried_out(async move { host.networks.create(spec).await }).await?;
    tracing::info!(network = name, user = caller.0, made, "create network");
    changed(name, made)
}

/// `GET /v1/networks/NAME`.
pub(super) async fn show(State(host): Hosted, Path(name): Path<String>) -> Answer {
    json(&host.networks.show(&name).await?)
}

/// `DELETE /v1/networks/NAME`.
pub(super) async fn remove(
    State(host): Hosted,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Answer {
    let shown = crate::escape::excerpt(&name, 64);
    tracing::info!(network = shown, user = caller.0, "remove network");
    let gone = name.clone();
    carried_out(async move { host.networks.remove(&gone).await }).await?;
    changed(name, true)
}

#[derive(Deserialize)]
pub(super) struct Wish {
    port: Option<u16>,
    snap: Option<u32>,
    bytes: Option<u64>,
    seconds: Option<u64>,
}

/// `GET /v1/networks/NAME/capture?port=&snap=&bytes=&seconds=`: a pcapng file as it is made. The switch writes it into a
/// pipe; the daemon passes it on and reads none of it.
pub(super) async fn capture(
    State(host): Hosted,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
    Asked(wish): Asked<Wish>,
) -> Answer {
    let bytes = wish.bytes.unwrap_or(FILE_BYTES);
    let seconds = wish.seconds.unwrap_or(SECONDS);
    let bad = |line: &str| Err(ApiError::new(Code::BadRequest, line));
    if !(1..=FILE_BYTES_MAX).contains(&bytes) {
        return bad("bytes: expected 1 to 1073741824");
    }
    if !(1..=SECONDS_MAX).contains(&seconds) {
        return bad("seconds: expected 1 to 86400");
    }
    let host_lacks =
        |what: &dyn std::fmt::Display| ApiError::new(Code::Host, format!("a pipe: {what}"));
    let pipe = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK);
    let (read, write) = pipe.map_err(|errno| host_lacks(&errno))?;
    let read = readable(read).map_err(|error| host_lacks(&error))?;
    let wish = CaptureWish {
        port: wish.port,
        snap_bytes: wish.snap.unwrap_or(SNAP_BYTES),
        file_bytes: bytes,
        within: Duration::from_secs(seconds),
    };
    host.networks.capture(&name, wish, write).await?;
    tracing::info!(network = name, user = caller.0, "capture");
    let (send, body) = pieces("application/x-pcapng");
    tokio::spawn(pass_on(read, send));
    body
}

/// Passes a capture on until either end is gone.
async fn pass_on(pipe: tokio::io::unix::AsyncFd<OwnedFd>, send: mpsc::Sender<Bytes>) {
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let ready = tokio::select! {
            ready = pipe.readable() => ready,
            () = send.closed() => return,
        };
        let Ok(mut ready) = ready else { return };
        match nix::unistd::read(pipe.get_ref(), &mut piece) {
            Ok(0) => return,
            Ok(n) => {
                let bytes = Bytes::copy_from_slice(piece.get(..n).unwrap_or_default());
                if send.send(bytes).await.is_err() {
                    return;
                }
            }
            Err(Errno::EAGAIN) => ready.clear_ready(),
            Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}
