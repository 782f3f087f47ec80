//! The requests of the API: each takes its parts from the request, asks, and answers with JSON.

use super::host::Host;
use super::{attach, devices, networks, shutdown, stats, stream, vsock};
use crate::api::{
    ApiError, Code, Create, HostShutdown, REQUEST_BYTES_MAX, SCHEMA_VERSION, Stop, Version,
};
use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;

/// How long a client may take to send the body of its request.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The user at the other end of the socket, as the kernel says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Caller(pub(super) Option<u32>);

type Hosted = State<Arc<Host>>;
pub(super) type Answer = Result<Response, ApiError>;

/// Everything that can be asked.
pub(super) fn router(host: Arc<Host>) -> Router {
    Router::new()
        .route("/v1/version", get(version))
        .route("/v1/vms", get(list).post(create))
        .route("/v1/vms/{name}", get(inspect).delete(remove))
        .route("/v1/vms/{name}/start", post(start))
        .route("/v1/vms/{name}/stop", post(stop))
        .route("/v1/vms/{name}/kill", post(kill))
        .route("/v1/vms/{name}/restart", post(restart))
        .route("/v1/vms/{name}/reset", post(reset))
        .route("/v1/vms/{name}/pause", post(pause))
        .route("/v1/vms/{name}/resume", post(resume))
        .route("/v1/vms/{name}/wait", get(wait))
        .route("/v1/vms/{name}/stats", get(stats::stats))
        .route("/v1/vms/{name}/events", get(stream::events))
        .route("/v1/vms/{name}/output", get(stream::output))
        .route("/v1/vms/{name}/console", get(attach::console))
        .route("/v1/vms/{name}/vsock", get(vsock::connect))
        .route("/v1/vms/{name}/devices", get(devices::list))
        .route(
            "/v1/vms/{name}/devices/{device}/restart",
            post(devices::restart),
        )
        .route(
            "/v1/vms/{name}/devices/{device}/upgrade",
            post(devices::upgrade),
        )
        .route(
            "/v1/vms/{name}/devices/{device}/limit",
            post(devices::limit),
        )
        .route(
            "/v1/vms/{name}/devices/{device}/resize",
            post(devices::resize),
        )
        .route(
            "/v1/vms/{name}/devices/{device}/medium",
            post(devices::medium),
        )
        .route("/v1/vms/{name}/devices/{device}/link", post(devices::link))
        .route("/v1/networks", get(networks::list).post(networks::create))
        .route(
            "/v1/networks/{name}",
            get(networks::show).delete(networks::remove),
        )
        .route("/v1/networks/{name}/capture", get(networks::capture))
        .route("/v1/host/shutdown", post(host_shutdown))
        .fallback(nothing_there)
        .method_not_allowed_fallback(wrong_method)
        .with_state(host)
}

/// A JSON object of the API.
pub(super) fn json<T: Serialize>(value: &T) -> Answer {
    let text = serde_json::to_vec(value)
        .map_err(|error| ApiError::new(Code::Internal, error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code.status());
        let status = status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let text = serde_json::to_vec(&self).unwrap_or_default();
        let kind = [(header::CONTENT_TYPE, "application/json")];
        (status, kind, text).into_response()
    }
}

/// A body of JSON: bounded in size and time.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Json<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bad = |line: String| ApiError::new(Code::BadRequest, line);
        let body = Limited::new(request.into_body(), REQUEST_BYTES_MAX);
        let collected = tokio::time::timeout(BODY_TIMEOUT, body.collect()).await;
        let Ok(collected) = collected else {
            return Err(bad(format!(
                "the body did not come within {BODY_TIMEOUT:?}"
            )));
        };
        let bytes = collected.map_err(|error| match error.is::<LengthLimitError>() {
            true => bad(format!("the body is larger than {REQUEST_BYTES_MAX} bytes")),
            false => bad("the body ended early".to_owned()),
        })?;
        let value = serde_json::from_slice(&bytes.to_bytes());
        let value = value.map_err(|error| {
            let what = crate::escape::excerpt(&error.to_string(), 256);
            bad(format!("the body is not what was expected: {what}"))
        })?;
        Ok(Self(value))
    }
}

/// The name of a machine in the path.
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let name = Path::<String>::from_request_parts(parts, state).await;
        match name {
            Ok(Path(name)) if crate::vmfile::is_name(&name) => Ok(Self(name)),
            Ok(Path(name)) => Err(ApiError::no_machine(&name)),
            Err(_) => Err(ApiError::new(Code::BadRequest, "the name is not UTF-8")),
        }
    }
}

/// The part of a path behind the question mark.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Asked<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match Query::<T>::from_request_parts(parts, state).await {
            Ok(Query(value)) => Ok(Self(value)),
            Err(error) => {
                let what = crate::escape::excerpt(&error.body_text(), 256);
                Err(ApiError::new(Code::BadRequest, what))
            }
        }
    }
}

async fn nothing_there(method: Method, uri: Uri) -> ApiError {
    let path = crate::escape::excerpt(uri.path(), 128);
    ApiError::new(Code::NotFound, format!("there is no {method} {path}"))
}

async fn wrong_method(method: Method, uri: Uri) -> Response {
    let path = crate::escape::excerpt(uri.path(), 128);
    let line = format!("{path} cannot be asked with {method}");
    let mut response = ApiError::new(Code::BadRequest, line).into_response();
    *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
    response
}

async fn version() -> Answer {
    json(&Version {
        schema_version: SCHEMA_VERSION,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
    })
}

async fn list(State(host): Hosted) -> Answer {
    // Those whose broker has just gone, too.
    host.gather().await;
    let summaries: Vec<_> = host
        .all()
        .iter()
        .map(|vm| vm.view.borrow().summary())
        .collect();
    json(&summaries)
}

async fn create(
    State(host): Hosted,
    Extension(caller): Extension<Caller>,
    Json(wish): Json<Create>,
) -> Answer {
    let changed = host.create(wish).await?;
    tracing::info!(vm = changed.name, user = caller.0, "create");
    json(&changed)
}

async fn inspect(State(host): Hosted, Name(name): Name) -> Answer {
    let vm = host.vm(&name).await?;
    let details = vm.view.borrow().details(&host.shared.places.runtime);
    json(&details)
}

#[derive(Deserialize)]
struct Force {
    #[serde(default)]
    force: bool,
}

/// Does what was asked to its end, even if the client goes away meanwhile.
pub(super) async fn carried_out<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::spawn(work).await;
    done.unwrap_or_else(|lost| Err(ApiError::new(Code::Internal, lost.to_string())))
}

async fn remove(
    State(host): Hosted,
    Extension(caller): Extension<Caller>,
    Name(name): Name,
    Asked(Force { force }): Asked<Force>,
) -> Answer {
    tracing::info!(vm = name, user = caller.0, force, "remove");
    let removed = carried_out(async move { host.remove(&name, force).await });
    json(&removed.await?)
}

/// A verb without a body.
macro_rules! plain_verbs {
    ($($verb:ident $starts:literal),*) => {$(
        async fn $verb(
            State(host): Hosted,
            Extension(caller): Extension<Caller>,
            Name(name): Name,
        ) -> Answer {
            let vm = host.vm(&name).await?;
            if $starts {
                host.check_up()?;
            }
            tracing::info!(vm = name, user = caller.0, stringify!($verb));
            json(&carried_out(async move { vm.$verb().await }).await?)
        }
    )*};
}
plain_verbs!(start true, kill false, reset true, pause false, resume false);

async fn stop(
    State(host): Hosted,
    Extension(caller): Extension<Caller>,
    Name(name): Name,
    Json(how): Json<Stop>,
) -> Answer {
    let vm = host.vm(&name).await?;
    tracing::info!(vm = name, user = caller.0, force = how.force, "stop");
    json(&carried_out(async move { vm.stop(how).await }).await?)
}

async fn restart(
    State(host): Hosted,
    Extension(caller): Extension<Caller>,
    Name(name): Name,
    Json(how): Json<Stop>,
) -> Answer {
    let vm = host.vm(&name).await?;
    host.check_up()?;
    tracing::info!(vm = name, user = caller.0, force = how.force, "restart");
    json(&carried_out(async move { vm.restart(how).await }).await?)
}

async fn wait(State(host): Hosted, Name(name): Name) -> Answer {
    let vm = host.vm(&name).await?;
    json(&vm.wait().await?)
}

async fn host_shutdown(
    State(host): Hosted,
    Extension(caller): Extension<Caller>,
    Json(how): Json<HostShutdown>,
) -> Answer {
    tracing::info!(
        user = caller.0,
        deadline_ms = how.deadline_ms,
        "host shutdown"
    );
    let done = carried_out(async move { Ok(shutdown::shutdown(&host, how).await) });
    json(&done.await?)
}

/// A body that is made while it is sent.
pub(super) fn streamed(kind: &'static str, body: Body) -> Answer {
    Ok(([(header::CONTENT_TYPE, kind)], body).into_response())
}
