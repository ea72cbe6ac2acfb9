//! Work that blocks, beside the runtime.

use std::io;

use crate::EngineError;

/// Carries out work with errors of the engine.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| EngineError::io("work on files", error.into()))?
}

/// Carries out file work; `what` is said with its errors.
pub(crate) async fn blocking_io<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, EngineError> {
    blocking(move || work().map_err(|error| EngineError::io(what, error))).await
}
