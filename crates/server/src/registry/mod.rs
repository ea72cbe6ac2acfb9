//! The OCI registry below `/v2/`: any client that speaks the distribution specification can push and pull.
//!
//! ```text
//!  raw path ─► path::parse ─► who may (auth) ─► blobs / uploads / manifests / tags ─► blob store, engine
//! ```
//!
//! Repository names have any depth, so the path is parsed here and not by the router. Errors use the
//! specification's own envelope.

mod blobs;
mod error;
mod manifests;
mod path;
mod tags;
mod uploads;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::auth::RegistryAccess;
use crate::state::AppState;
use error::{RegistryFailure, RegistryResult};
use path::Target;

const VERSION_HEADER: HeaderName = HeaderName::from_static("docker-distribution-api-version");
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// Answers everything below `/v2`.
pub async fn dispatch(State(state): State<AppState>, request: Request) -> Response {
    let mut response = answer(state, request)
        .await
        .unwrap_or_else(IntoResponse::into_response);
    response
        .headers_mut()
        .insert(VERSION_HEADER, HeaderValue::from_static("registry/2.0"));
    response
}

async fn answer(state: AppState, request: Request) -> RegistryResult<Response> {
    let header = request
        .headers()
        .get(header::AUTHORIZATION)
        .map(HeaderValue::as_bytes);
    let grant = state
        .verifier
        .verify_registry(header)
        .map_err(|_| RegistryFailure::unauthorized())?;
    let raw = request.uri().path();
    let rest = raw
        .strip_prefix("/v2")
        .unwrap_or(raw)
        .trim_start_matches('/')
        .to_owned();
    let target = path::parse(&rest)?;
    let method = request.method().clone();
    let access = match method {
        Method::GET | Method::HEAD => RegistryAccess::Pull,
        // Giving up one's own upload deletes nothing that anyone has.
        Method::DELETE if !matches!(target, Target::Upload { .. }) => RegistryAccess::Delete,
        _ => RegistryAccess::Push,
    };
    // The catalogue shows all repositories, so it needs the right to see any.
    let repository = if matches!(target, Target::Catalog) {
        Some("")
    } else {
        target.repository()
    };
    if !grant.allows(repository, access) {
        return Err(RegistryFailure::denied());
    }
    match (method, target) {
        (Method::GET | Method::HEAD, Target::Base) => Ok(base()),
        (Method::GET | Method::HEAD, Target::Catalog) => Err(RegistryFailure::unsupported()),
        (method @ (Method::GET | Method::HEAD), Target::Blob { digest, .. }) => {
            blobs::read(&state, &method, request.headers(), &digest).await
        }
        (Method::POST, Target::Uploads { repository }) => {
            uploads::start(&state, &grant, repository, request).await
        }
        (Method::GET | Method::HEAD, Target::Upload { repository, id }) => {
            uploads::status(&state, &repository, &id).await
        }
        (Method::PATCH, Target::Upload { repository, id }) => {
            uploads::append(&state, &repository, &id, request).await
        }
        (Method::PUT, Target::Upload { repository, id }) => {
            uploads::finish(&state, &repository, &id, request).await
        }
        (Method::DELETE, Target::Upload { id, .. }) => uploads::cancel(&state, &id).await,
        (
            method @ (Method::GET | Method::HEAD),
            Target::Manifest {
                repository,
                reference,
            },
        ) => manifests::read(&state, &method, &repository, &reference).await,
        (
            Method::PUT,
            Target::Manifest {
                repository,
                reference,
            },
        ) => manifests::write(&state, &repository, &reference, request).await,
        (
            Method::DELETE,
            Target::Manifest {
                repository,
                reference,
            },
        ) => manifests::delete(&state, &repository, &reference).await,
        (Method::GET, Target::Tags { repository }) => tags::list(&state, &repository, request.uri().query()),
        _ => Err(RegistryFailure::unsupported()),
    }
}

fn base() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], "{}").into_response()
}

/// An empty answer with headers.
fn empty(status: StatusCode) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

/// Adds a header whose value is our own text.
fn set(response: &mut Response, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        response.headers_mut().insert(name, value);
    }
}
