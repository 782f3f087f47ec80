//! The client of the API: one connection for each request, over the daemon's Unix socket.

use super::{ApiError, CONSOLE_PROTOCOL, SOCKET_NAME, VSOCK_PROTOCOL};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use tokio::net::UnixStream;

/// Largest answer that is taken, in bytes; streams have no end.
const ANSWER_BYTES_MAX: usize = 80 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no daemon answers at {socket}: {cause} (start it with 'bulkhead serve')")]
    NoDaemon {
        /// Where it was looked for.
        socket: PathBuf,
        /// What the kernel said.
        cause: io::Error,
    },
    /// The daemon went away, or is no Bulkhead.
    #[error("the daemon did not answer: {0}")]
    Broken(String),
    /// The daemon says no.
    #[error(transparent)]
    Api(#[from] ApiError),
}

impl ClientError {
    /// The exit code of a command that gets it.
    #[must_use]
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NoDaemon { .. } => 4,
            Self::Broken(_) => 6,
            Self::Api(error) => error.code.exit_code(),
        }
    }
}

fn broken(error: impl ToString) -> ClientError {
    ClientError::Broken(error.to_string())
}

/// Where the daemon is.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

/// An answer without an end.
#[derive(Debug)]
pub struct Stream(Incoming);

impl Stream {
    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// When the daemon went away.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        loop {
            match self.0.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(broken(error)),
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }
}

impl Client {
    /// The daemon of a runtime directory.
    #[must_use]
    pub fn of_runtime(directory: &Path) -> Self {
        Self {
            socket: directory.join(SOCKET_NAME),
        }
    }

    /// The daemon that `--host` names: `unix://PATH` or a path.
    ///
    /// # Errors
    /// What was expected.
    pub fn of_host(host: &str) -> Result<Self, String> {
        let path = host.strip_prefix("unix://").unwrap_or(host);
        if path.is_empty() || !path.starts_with('/') {
            return Err("expected unix:///PATH or /PATH of the daemon's socket".to_owned());
        }
        Ok(Self {
            socket: path.into(),
        })
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        let connected = UnixStream::connect(&self.socket).await;
        let stream = connected.map_err(|cause| ClientError::NoDaemon {
            socket: self.socket.clone(),
            cause,
        })?;
        let shaken = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = shaken.map_err(broken)?;
        // Its errors are those of the request.
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.map_err(broken)
    }

    async fn ask(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Response<Incoming>, ClientError> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "bulkhead")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::from(body));
        let response = self.send(request.map_err(broken)?).await?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(refusal(response).await)
    }

    async fn object<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<T, ClientError> {
        let response = self.ask(method, path, body).await?;
        let bytes = collect(response).await?;
        serde_json::from_slice(&bytes).map_err(broken)
    }

    /// Asks for an object.
    ///
    /// # Errors
    /// The daemon's, or that there is none.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.object(Method::GET, path, Vec::new()).await
    }

    /// Has something done, with an object if there is more to say.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: Option<&(impl Serialize + Sync)>,
    ) -> Result<T, ClientError> {
        let body = body.map(serde_json::to_vec).transpose();
        let body = body.map_err(broken)?.unwrap_or_default();
        self.object(Method::POST, path, body).await
    }

    /// Has something removed.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.object(Method::DELETE, path, Vec::new()).await
    }

    /// Asks for bytes as they come.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn stream(&self, path: &str) -> Result<Stream, ClientError> {
        let response = self.ask(Method::GET, path, Vec::new()).await?;
        Ok(Stream(response.into_body()))
    }

    /// Attaches to a console, by default the one that the VM file says. The descriptor speaks
    /// [`super::frame`] and is non-blocking.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn console(
        &self,
        name: &str,
        console: Option<&str>,
        history: bool,
    ) -> Result<Attached, ClientError> {
        let which = console.map(|which| format!("&console={which}"));
        let which = which.unwrap_or_default();
        let path = format!("/v1/vms/{name}/console?history={history}{which}");
        self.upgraded(path, CONSOLE_PROTOCOL).await
    }

    /// Connects to a machine's vsock socket. The descriptor is non-blocking.
    ///
    /// # Errors
    /// As [`Client::get`].
    pub async fn vsock(&self, name: &str) -> Result<Attached, ClientError> {
        self.upgraded(format!("/v1/vms/{name}/vsock"), VSOCK_PROTOCOL)
            .await
    }

    async fn upgraded(&self, path: String, protocol: &str) -> Result<Attached, ClientError> {
        let request = Request::builder()
            .uri(path)
            .header(HOST, "bulkhead")
            .header(CONNECTION, "upgrade")
            .header(UPGRADE, protocol)
            .body(Full::default());
        let response = self.send(request.map_err(broken)?).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await);
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(broken)?;
        relay(upgraded).map_err(broken)
    }
}

/// An attached console, or another connection.
#[derive(Debug)]
pub struct Attached {
    /// The near end of the connection.
    pub socket: OwnedFd,
}

/// Passes an upgraded connection on to a socket, which a thread without a runtime can poll. What
/// hyper has read already is not lost that way.
fn relay(upgraded: hyper::upgrade::Upgraded) -> io::Result<Attached> {
    let (near, far) = std::os::unix::net::UnixStream::pair()?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    let mut far = UnixStream::from_std(far)?;
    tokio::spawn(async move {
        let mut upgraded = TokioIo::new(upgraded);
        // An end on one side is passed on to the other.
        let _ended = tokio::io::copy_bidirectional(&mut upgraded, &mut far).await;
    });
    Ok(Attached {
        socket: near.into(),
    })
}

async fn collect(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
    let collected = body.collect().await.map_err(broken)?;
    Ok(collected.to_bytes())
}

/// The error that a response tells.
async fn refusal(response: Response<Incoming>) -> ClientError {
    let status = response.status();
    let bytes = match collect(response).await {
        Ok(bytes) => bytes,
        Err(error) => return error,
    };
    match serde_json::from_slice::<ApiError>(&bytes) {
        Ok(error) => error.into(),
        Err(_) => ClientError::Broken(format!("it answered {status} without saying why")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_sockets() {
        let path = |host: &str| Client::of_host(host).map(|c| c.socket);
        assert_eq!(path("unix:///run/b.sock"), Ok("/run/b.sock".into()));
        assert_eq!(path("/run/b.sock"), Ok("/run/b.sock".into()));
        for wrong in ["", "unix://", "ssh://host", "run/b.sock"] {
            assert!(path(wrong).is_err(), "{wrong}");
        }
    }

    #[tokio::test]
    async fn missing_daemon_is_told_with_a_cure() {
        let dir = tempfile::tempdir().unwrap();
        let client = Client::of_runtime(dir.path());
        let error = client.get::<super::super::Version>("/v1/version").await;
        let error = error.unwrap_err();
        assert_eq!(error.exit_code(), 4);
        assert!(error.to_string().contains("bulkhead serve"), "{error}");
    }
}
