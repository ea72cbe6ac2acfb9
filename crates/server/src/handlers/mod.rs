//! The handlers: parse, call the engine, map. Nothing is decided here.

pub mod copy;
pub mod events;
pub mod exec;
pub mod images;
pub mod instances;
pub mod logs;
pub mod pagers;
pub mod resources;
pub mod schedules;
pub mod service;
pub mod snapshots;
pub mod socket;
pub mod standby;
pub mod travel;
pub mod verify;

use axum::body::Body;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use hypeman_engine::{Engine, EngineError};

use crate::error::{ApiError, ApiResult};

/// The one parameter of a path.
pub(crate) type PathId = Result<Path<String>, PathRejection>;

/// The two parameters of a path.
pub(crate) type PathIds = Result<Path<(String, String)>, PathRejection>;

/// A path parameter, decoded; 400 in the envelope when it is not UTF-8.
pub(crate) fn path_text(path: Result<Path<String>, PathRejection>) -> ApiResult<String> {
    path.map(|Path(text)| text)
        .map_err(|_| ApiError::schema("the path is not valid UTF-8"))
}

/// Two path parameters, decoded; 400 in the envelope when they are not UTF-8.
pub(crate) fn path_texts(path: PathIds) -> ApiResult<(String, String)> {
    path.map(|Path(texts)| texts)
        .map_err(|_| ApiError::schema("the path is not valid UTF-8"))
}

/// Server-sent events that nothing on the way holds back.
pub(crate) fn event_stream(
    events: impl futures::Stream<Item = Result<Bytes, std::io::Error>> + Send + 'static,
) -> Response {
    let mut response = Body::from_stream(events).into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream"),
    );
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("keep-alive"));
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// The id behind an id, name or id prefix.
pub(crate) fn resolve(engine: &Engine, text: &str) -> ApiResult<String> {
    engine.resolve_instance(text).map_err(|error| match error {
        EngineError::NotFound { .. } => {
            ApiError::not_found(format!("no instance has the id, name or id prefix {text:?}"))
        }
        other => other.into(),
    })
}
