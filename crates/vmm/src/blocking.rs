//! Work that waits for disks or for the kernel, away from the threads that serve everybody.

use tokio::task::{JoinError, spawn_blocking};

/// Does the work on a thread that may wait, and returns its outcome. A panic there is an error here.
pub(crate) async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<JoinError> + Send + 'static,
{
    spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(error.into()))
}
