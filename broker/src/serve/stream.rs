//! Answers that are made while they are sent: a machine's log, and the kept output of a console.

use super::actor::Ask;
use super::consoles::ring_path;
use super::host::Host;
use super::journal::{self, Line};
use super::routes::{Asked, Name, streamed};
use crate::api::{ApiError, Code, ConsoleName};
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::Response;
use bulkhead_ipc::output_ring::OutputReader;
use hyper::body::Frame;
use serde::Deserialize;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;

/// Pieces that wait for a slow client.
const PIECES: usize = 4;
/// Largest kept output in bytes, as VM files allow.
const OUTPUT_BYTES_MAX: usize = 64 << 20;

#[derive(Deserialize)]
pub(super) struct Follow {
    #[serde(default)]
    follow: bool,
}

/// A body from a channel.
struct Pieces(mpsc::Receiver<Bytes>);

impl hyper::body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let piece = self.0.poll_recv(context);
        piece.map(|piece| piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// An answer that is what comes through a channel.
pub(super) fn pieces(kind: &'static str) -> (mpsc::Sender<Bytes>, Result<Response, ApiError>) {
    let (send, pieces) = mpsc::channel(PIECES);
    (send, streamed(kind, Body::new(Pieces(pieces))))
}

/// `GET /v1/vms/NAME/events?follow=`: JSON lines.
pub(super) async fn events(
    State(host): State<Arc<Host>>,
    Name(name): Name,
    Asked(Follow { follow }): Asked<Follow>,
) -> Result<Response, ApiError> {
    let vm = host.vm(&name).await?;
    // Before the file is read, so that no line falls between the two.
    let lines = vm.ask(Ask::Follow).await?;
    let directory = host.shared.places.vm_state(&name);
    let bytes_max = host.shared.config.log_bytes();
    let kept = super::blocking(move || {
        journal::read(&directory, bytes_max)
            .map_err(|e| ApiError::new(Code::Host, format!("the log cannot be read: {e}")))
    });
    let kept = kept.await?;
    let kind = "application/x-ndjson";
    if !follow {
        return streamed(kind, Body::from(kept));
    }
    let (send, pieces) = mpsc::channel(PIECES);
    tokio::spawn(async move {
        let mut last = kept
            .rsplit(|&b| b == b'\n')
            .filter(|line| !line.is_empty())
            .find_map(journal::number)
            .unwrap_or(0);
        let mut lines = lines;
        if send.send(Bytes::from(kept)).await.is_err() {
            return;
        }
        loop {
            let line = tokio::select! {
                line = lines.recv() => line,
                () = send.closed() => return,
            };
            match line {
                Ok(Line { number, text }) if number > last => {
                    last = number;
                    if send.send(Bytes::from(text)).await.is_err() {
                        return;
                    }
                }
                // Seen in the file, or lost by a reader that was too slow: the numbers tell.
                Ok(_) | Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
        }
    });
    streamed(kind, Body::new(Pieces(pieces)))
}

#[derive(Deserialize)]
pub(super) struct Which {
    #[serde(default = "serial")]
    console: ConsoleName,
}

const fn serial() -> ConsoleName {
    ConsoleName::Serial
}

/// `GET /v1/vms/NAME/output?console=`: the kept output, as the guest wrote it.
pub(super) async fn output(
    State(host): State<Arc<Host>>,
    Name(name): Name,
    Asked(Which { console }): Asked<Which>,
) -> Result<Response, ApiError> {
    let vm = host.vm(&name).await?;
    let rings = vm.view.borrow().rings.clone();
    let rings = rings.unwrap_or_else(|| host.shared.places.vm_state(&name));
    let path = ring_path(&rings, console);
    let kept = super::blocking(move || match read_ring(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => {
            let line = format!("the console's output cannot be read: {error}");
            Err(ApiError::new(Code::Host, line))
        }
        Ok(bytes) => Ok(bytes),
    });
    streamed("application/octet-stream", Body::from(kept.await?))
}

fn read_ring(path: PathBuf) -> io::Result<Vec<u8>> {
    let mut reader = OutputReader::new(File::open(path)?)?;
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        let got = reader.read(&mut buffer)?;
        let room = OUTPUT_BYTES_MAX.saturating_sub(bytes.len());
        let part = buffer.get(..got.bytes.min(room)).unwrap_or(&[]);
        if part.is_empty() {
            return Ok(bytes);
        }
        bytes.extend_from_slice(part);
    }
}
