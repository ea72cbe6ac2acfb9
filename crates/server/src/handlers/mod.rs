//! The handlers: parse, call the engine, map. Nothing is decided here.

pub mod copy;
pub mod exec;
pub mod images;
pub mod instances;
pub mod logs;
pub mod resources;
pub mod service;
pub mod socket;

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use hypeman_engine::{Engine, EngineError};

use crate::error::{ApiError, ApiResult};

/// A path parameter, decoded; 400 in the envelope when it is not UTF-8.
pub(crate) fn path_text(path: Result<Path<String>, PathRejection>) -> ApiResult<String> {
    path.map(|Path(text)| text)
        .map_err(|_| ApiError::schema("the path is not valid UTF-8"))
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
