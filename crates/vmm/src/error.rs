//! What can go wrong with a VMM.

use std::io;
use std::time::Duration;

use tokio::task::JoinError;

use crate::VmmKind;

/// Why a VMM could not do something.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// This VMM has no such ability.
    #[error("{kind:?} does not support {feature}")]
    Unsupported {
        /// Which VMM.
        kind: VmmKind,
        /// What was asked.
        feature: &'static str,
    },
    /// The machine cannot be built as described.
    #[error("the machine cannot be built: {0}")]
    InvalidSpec(String),
    /// The VMM cannot run on this host.
    #[error("{0}")]
    Unavailable(String),
    /// The process ended before it was usable; carries the end of its log.
    #[error("the VMM exited during start: {0}")]
    StartFailed(String),
    /// The process is gone.
    #[error("the VMM process is gone")]
    Gone,
    /// The control socket did not answer in time.
    #[error("the VMM did not answer {command} within {after:?}")]
    Unresponsive {
        /// Command that was sent.
        command: String,
        /// How long was waited.
        after: Duration,
    },
    /// The connection ended before there was a whole answer: nobody knows whether the command was carried out.
    #[error("the VMM gave no answer to {command}: {reason}")]
    Unanswered {
        /// Command that was sent.
        command: String,
        /// What became of the answer.
        reason: String,
    },
    /// The VMM refused a command: its own no.
    #[error("the VMM refused {command}: {message}")]
    Refused {
        /// Command that was sent.
        command: String,
        /// The VMM's own words.
        message: String,
    },
    /// The guest still has memory that was added to it, which a captured state does not hold.
    #[error("the guest still has {bytes} bytes of the memory that was added to it")]
    MemoryInUse {
        /// How much of it.
        bytes: u64,
    },
    /// Host I/O failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, with the path.
        context: String,
        /// The cause.
        source: io::Error,
    },
}

impl VmmError {
    /// Says what was being done when the host failed.
    pub(crate) fn io(context: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let context = context.into();
        move |source| Self::Io { context, source }
    }

    /// The VMM will not, in its own words.
    pub(crate) fn refused(command: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Refused {
            command: command.into(),
            message: message.into(),
        }
    }

    /// What the VMM answered, if it did, was lost.
    pub(crate) fn unanswered(command: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Unanswered {
            command: command.into(),
            reason: reason.into(),
        }
    }

    /// The VMM said nothing for so long.
    pub(crate) fn unresponsive(command: impl Into<String>, after: Duration) -> Self {
        Self::Unresponsive {
            command: command.into(),
            after,
        }
    }

    /// A refusal, or the lack of an answer, as the reason why a machine does not start.
    pub(crate) fn of_start(self) -> Self {
        match self {
            Self::Refused { message, .. } => Self::StartFailed(message),
            Self::Unanswered { .. } => Self::StartFailed(self.to_string()),
            other => other,
        }
    }
}

impl From<JoinError> for VmmError {
    fn from(error: JoinError) -> Self {
        Self::Io {
            context: "work on a thread of its own failed".to_owned(),
            source: error.into(),
        }
    }
}
