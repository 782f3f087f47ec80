//! An attached console: after an HTTP upgrade, frames in both directions ([`crate::api::frame`]).
//!
//! Each attachment reads the ring file at its own pace and waits for its own client alone: one that
//! does not read loses the oldest output, and nobody else notices.

use super::actor::{Ask, Vm};
use super::consoles::Attachable;
use super::host::Host;
use super::routes::{Asked, Name};
use crate::api::frame::{Frame, PAYLOAD_BYTES_MAX, Reader};
use crate::api::{ApiError, CONSOLE_PROTOCOL, Code, ConsoleName};
use crate::vm::session::Command;
use crate::vm::spec::ConsoleChoice;
use crate::vmfile;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::Response;
use bulkhead_ipc::output_ring::OutputReader;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

/// How long a client that takes nothing is waited for once the machine is gone.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

#[derive(Deserialize)]
pub(super) struct How {
    /// Which console; the one that the VM file says unless it is given.
    console: Option<ConsoleName>,
    /// Whether the kept output comes first.
    #[serde(default)]
    history: bool,
}

/// `GET /v1/vms/NAME/console?console=&history=`, upgraded.
pub(super) async fn console(
    State(host): State<Arc<Host>>,
    Name(name): Name,
    Asked(how): Asked<How>,
    mut request: Request,
) -> Result<Response, ApiError> {
    let vm = host.vm(&name).await?;
    let wants = request.headers().get(header::UPGRADE);
    let wants = wants.is_some_and(|protocol| protocol == CONSOLE_PROTOCOL);
    let upgrade = request.extensions_mut().remove::<OnUpgrade>();
    let (Some(upgrade), true) = (upgrade, wants) else {
        let line = format!("expected an upgrade to {CONSOLE_PROTOCOL}");
        return Err(ApiError::new(Code::BadRequest, line));
    };
    let permit = Arc::clone(&host.consoles).try_acquire_owned();
    let permit = permit.map_err(|_| {
        let line = "too many consoles are attached (limits.consoles)";
        ApiError::new(Code::Unavailable, line)
    })?;
    let console = how.console.unwrap_or_else(|| default_console(&vm));
    let attachable = vm.ask(|reply| Ask::Attach(console, reply)).await?;
    let output = reader(&attachable, how.history)
        .map_err(|e| ApiError::new(Code::Host, format!("the console's output: {e}")))?;
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            let (from, to) = tokio::io::split(TokioIo::new(upgraded));
            let Attachable { rings, keys, .. } = attachable;
            tokio::select! {
                () = show(output, rings, to) => {}
                () = listen(from, &keys, &vm) => {}
            }
        }
        drop(permit);
    });
    let response = Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, CONSOLE_PROTOCOL)
        .body(Body::empty());
    response.map_err(|error| ApiError::new(Code::Internal, error.to_string()))
}

/// The console that the VM file says a terminal attaches to.
fn default_console(vm: &Vm) -> ConsoleName {
    let file = vm.view.borrow().record.vm_file.clone();
    let draft = vmfile::parse("", Path::new("/"), &file).unwrap_or_default();
    match draft.console_attach.map(|choice| choice.value) {
        Some(ConsoleChoice::Virtio) => ConsoleName::Virtio,
        Some(ConsoleChoice::Serial) | None => ConsoleName::Serial,
    }
}

fn reader(attachable: &Attachable, history: bool) -> io::Result<OutputReader> {
    let mut output = OutputReader::new(File::open(&attachable.ring)?)?;
    if !history {
        output.seek_to_end()?;
    }
    Ok(output)
}

/// Sends output until the machine or the client is gone.
async fn show(
    mut output: OutputReader,
    mut rings: tokio::sync::watch::Receiver<()>,
    mut to: impl AsyncWrite + Unpin,
) {
    let (mut buffer, mut bytes) = (vec![0; PAYLOAD_BYTES_MAX], Vec::new());
    let mut over = false;
    loop {
        rings.mark_unchanged();
        let Ok(got) = output.read(&mut buffer) else {
            return;
        };
        bytes.clear();
        if got.bytes > 0 {
            if got.lost > 0 {
                Frame::Lost(got.lost).write(&mut bytes);
            }
            let part = buffer.get(..got.bytes).unwrap_or(&[]);
            Frame::Bytes(part.to_vec()).write(&mut bytes);
        } else if over {
            Frame::Ended.write(&mut bytes);
            let _told = tokio::time::timeout(DRAIN_PATIENCE, to.write_all(&bytes)).await;
            let _closed = tokio::time::timeout(DRAIN_PATIENCE, to.shutdown()).await;
            return;
        } else {
            over = rings.changed().await.is_err();
            continue;
        }
        let sent = async { to.write_all(&bytes).await.is_ok() && to.flush().await.is_ok() };
        let sent = match over {
            true => tokio::time::timeout(DRAIN_PATIENCE, sent)
                .await
                .unwrap_or(false),
            false => sent.await,
        };
        if !sent {
            return;
        }
    }
}

/// Takes keys until the client is gone or talks nonsense. A guest that does not read its keyboard
/// makes the client wait, not the daemon.
async fn listen(mut from: impl AsyncRead + Unpin, keys: &mpsc::Sender<Vec<u8>>, vm: &Vm) {
    let (mut frames, mut buffer) = (Reader::default(), vec![0; 4096]);
    loop {
        let read = from.read(&mut buffer).await;
        let Ok(n @ 1..) = read else {
            return;
        };
        frames.add(buffer.get(..n).unwrap_or(&[]));
        loop {
            match frames.take() {
                Ok(Some(Frame::Bytes(bytes))) => {
                    if keys.send(bytes).await.is_err() {
                        return std::future::pending().await;
                    }
                }
                Ok(Some(Frame::Size { columns, rows })) => {
                    let resize = Command::Resize { columns, rows };
                    // A machine that has just ended has no size.
                    let _ended = vm.ask(|reply| Ask::Command(resize, reply)).await;
                }
                Ok(None) => break,
                Ok(Some(Frame::Lost(_) | Frame::Ended)) | Err(_) => return,
            }
        }
    }
}
