//! Why a bench ended without numbers.

use std::io;

/// A failure of a bench.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// Something that is compared with, or that is needed, is not here: the bench is skipped.
    #[error("{0}")]
    Missing(String),
    /// The system refused.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// Its answer.
        source: io::Error,
    },
    /// The server answered something unexpected.
    #[error("{0}")]
    Answer(String),
    /// A document was not the JSON that it should be.
    #[error("unexpected JSON: {0}")]
    Json(#[from] serde_json::Error),
}

impl BenchError {
    /// Wraps the system's answer to `action`.
    pub fn io(action: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            action: action.into(),
            source,
        }
    }
}

/// The result of a step.
pub type Result<T> = std::result::Result<T, BenchError>;
