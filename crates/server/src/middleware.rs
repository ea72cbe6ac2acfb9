//! What surrounds every request: its id, the access log, recovery from panics, authorisation, time limits.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures::FutureExt as _;
use tracing::Instrument as _;

use crate::auth::{Identity, Scope, Verifier};
use crate::error::ApiError;
use crate::state::AppState;

/// Header that names a request in answers and logs.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id that is taken over from a client.
const MAX_REQUEST_ID: usize = 128;

/// Who may use a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Everyone.
    Public,
    /// Everyone without a token; a token that is limited must have the scope.
    PublicUnlessLimited(Scope),
    /// Tokens with the scope.
    Scoped(Scope),
    /// Registry tokens as well as users; checked by the registry itself.
    Registry,
}

/// What a route's guard needs to know.
#[derive(Clone)]
pub struct Guard {
    /// Shared state.
    pub state: AppState,
    /// Who may use it.
    pub access: Access,
    /// How long its handler may take; `None` for routes that are long by nature.
    pub limit: Option<Duration>,
}

/// Checks who asks, then runs the handler within its limit.
pub async fn guard(State(guard): State<Guard>, mut request: Request, next: Next) -> Response {
    let header = request
        .headers()
        .get(header::AUTHORIZATION)
        .map(HeaderValue::as_bytes);
    let identity = match authorize(&guard.state.verifier, guard.access, header) {
        Ok(identity) => identity,
        Err(error) => return error.into_response(),
    };
    if let Some(identity) = &identity {
        request.extensions_mut().insert(identity.clone());
    }
    let run = next.run(request);
    let mut response = match guard.limit {
        None => run.await,
        Some(limit) => match tokio::time::timeout(limit, run).await {
            Ok(response) => response,
            Err(_) => ApiError::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "timeout",
                format!(
                    "the request took longer than {} s; look at the resource before repeating it",
                    limit.as_secs()
                ),
            )
            .into_response(),
        },
    };
    if let Some(identity) = identity {
        response.extensions_mut().insert(identity);
    }
    response
}

fn authorize(
    verifier: &Verifier,
    access: Access,
    header: Option<&[u8]>,
) -> Result<Option<Identity>, ApiError> {
    let require = |identity: Identity, scope: Scope| {
        if identity.permissions.allow(scope) {
            Ok(Some(identity))
        } else {
            Err(ApiError::layer(
                StatusCode::FORBIDDEN,
                format!("missing required scope: {scope}"),
            ))
        }
    };
    match access {
        Access::Public | Access::Registry => Ok(None),
        Access::PublicUnlessLimited(scope) => match verifier.verify(header) {
            Ok(identity) => require(identity, scope),
            Err(_) => Ok(None),
        },
        Access::Scoped(scope) => {
            let identity = verifier
                .verify(header)
                .map_err(|error| ApiError::layer(StatusCode::UNAUTHORIZED, error.to_string()))?;
            require(identity, scope)
        }
    }
}

/// The line of the access log that a request gets, also when its client leaves before the answer.
struct AccessLog {
    method: Method,
    route: String,
    path: String,
    started: Instant,
    span: tracing::Span,
    written: bool,
}

impl AccessLog {
    fn milliseconds(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn write(&mut self, status: StatusCode, subject: &str) {
        self.written = true;
        let Self {
            method, route, path, ..
        } = &*self;
        let milliseconds = self.milliseconds();
        self.span.in_scope(|| {
            tracing::info!(%method, route, path, status = status.as_u16(), milliseconds, subject, "served");
        });
    }
}

impl Drop for AccessLog {
    fn drop(&mut self) {
        if !self.written {
            let Self {
                method, route, path, ..
            } = &*self;
            let milliseconds = self.milliseconds();
            self.span.in_scope(|| {
                tracing::info!(%method, route, path, milliseconds, "the client left before the answer");
            });
        }
    }
}

/// Names the request, logs it, and turns a panic of its handler into a 500.
pub async fn envelope(request: Request, next: Next) -> Response {
    let id = request_id(&request);
    let span = tracing::info_span!("request", id = %id.to_str().unwrap_or_default());
    let mut log = AccessLog {
        method: request.method().clone(),
        route: request
            .extensions()
            .get::<MatchedPath>()
            .map_or_else(|| "-".to_owned(), |path| path.as_str().to_owned()),
        // The query may hold secrets and never enters.
        path: request.uri().path().to_owned(),
        started: Instant::now(),
        span: span.clone(),
        written: false,
    };
    let mut response = async {
        AssertUnwindSafe(next.run(request))
            .catch_unwind()
            .await
            .unwrap_or_else(|panic| {
                let cause = panic
                    .downcast_ref::<&str>()
                    .map(|text| (*text).to_owned())
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_else(|| "unknown panic".to_owned());
                ApiError::internal(&format!("panic: {cause}")).into_response()
            })
    }
    .instrument(span)
    .await;
    let subject = response
        .extensions()
        .get::<Identity>()
        .map_or("-", |identity| identity.subject.as_str());
    log.write(response.status(), subject);
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// The client's id when it can be logged safely, else a fresh one.
fn request_id(request: &Request) -> HeaderValue {
    let given = request.headers().get(REQUEST_ID).filter(|value| {
        !value.is_empty()
            && value.len() <= MAX_REQUEST_ID
            && value
                .as_bytes()
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=".contains(byte))
    });
    given.cloned().unwrap_or_else(|| {
        let text = format!("{:032x}", rand::random::<u128>());
        HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static("-"))
    })
}
