//! Why the engine could not do something: one enum, mapped once at the HTTP edge.

use hypeman_core::InvalidValue;
use hypeman_core::instance::Refusal;
use hypeman_core::snapshot::TargetRefusal;
use hypeman_guest_api::ChannelError;
use hypeman_images::ImageError;
use hypeman_network::NetworkError;
use hypeman_store::StoreError;
use hypeman_vmm::VmmError;

/// An operation that did not succeed. Messages are for clients: they say what to do and hide host details.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// No such object.
    #[error("{kind} {name:?} not found")]
    NotFound {
        /// `instance`, `image`, …
        kind: &'static str,
        /// What was looked for.
        name: String,
    },
    /// A name or prefix means several objects.
    #[error("multiple resources match {name:?}, use the full id")]
    Ambiguous {
        /// What was looked for.
        name: String,
    },
    /// The state of the object does not allow it; permanent.
    #[error("{0}")]
    InvalidState(String),
    /// The time to live is over.
    #[error("the instance has expired and is being deleted")]
    Expired,
    /// The name is taken.
    #[error("an instance named {0:?} already exists; choose another name or delete it first")]
    NameConflict(String),
    /// The name of a fork is taken.
    #[error("an instance named {0:?} already exists; choose another name for the fork or delete it first")]
    ForkNameConflict(String),
    /// Another object has what was asked for; permanent.
    #[error("{0}")]
    Conflict(String),
    /// What was captured can't go on here; says what differs and what to do. Permanent.
    #[error("this cannot be restored here: {0}")]
    Incompatible(String),
    /// A stored part is not what was stored. Permanent.
    #[error("{0}; nothing was started from it")]
    Damaged(String),
    /// The guest was loaded and did not go on.
    #[error("the restored guest did not go on: {0}")]
    RestoreFailed(String),
    /// The guest uses memory that was added to it, and would not fit into what is captured.
    #[error(
        "the guest still uses {bytes} bytes of its hotplug_size, which are not captured; let it use less and retry, or \
         stop it first"
    )]
    MemoryInUse {
        /// What it did not give back.
        bytes: u64,
    },
    /// Memory could not be kept or read.
    #[error(transparent)]
    Memory(hypeman_snapshots::Error),
    /// The request can't be carried out as it is. `code` is the contract's.
    #[error("{message}")]
    Invalid {
        /// Code of the contract, such as `invalid_size`.
        code: &'static str,
        /// What is wrong and what would be right.
        message: String,
    },
    /// The image is still being prepared, or failed.
    #[error("{0}")]
    ImageNotReady(String),
    /// The host has too little of something (memory, disk, addresses).
    #[error("{0}")]
    InsufficientResources(String),
    /// Another pull of the same digest runs with other credentials.
    #[error("the same image is being pulled with other credentials; retry when that pull has finished")]
    CredentialConflict,
    /// The log does not exist yet.
    #[error("this log has not been written yet")]
    LogNotFound,
    /// A registry said something, or an archive is not what it should be.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The VMM refused or failed.
    #[error(transparent)]
    Vmm(VmmError),
    /// The guest's agent refused or failed.
    #[error(transparent)]
    Guest(#[from] ChannelError),
    /// The network could not be set up.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Metadata could not be read or written.
    #[error(transparent)]
    Store(StoreError),
    /// Host I/O failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done.
        context: String,
        /// The cause.
        source: std::io::Error,
    },
    /// The guest kernel can't be had.
    #[error(transparent)]
    Kernel(#[from] hypeman_kernel::KernelError),
    /// The server is going down.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl EngineError {
    /// Shorthand for a request error with one of the contract's codes.
    pub fn invalid(code: &'static str, message: impl Into<String>) -> Self {
        Self::Invalid {
            code,
            message: message.into(),
        }
    }

    /// Shorthand for a part whose digest is wrong.
    pub(crate) fn damaged(part: &str) -> Self {
        Self::Damaged(format!("{part} is damaged: its digest is not the recorded one"))
    }

    /// Whether the data disk is full: repeating helps once there is space.
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        matches!(
            self,
            Self::Store(StoreError::NoSpace) | Self::Image(ImageError::NoSpace(_))
        )
    }

    /// Wraps an I/O error with what was being done. A full disk becomes [`EngineError::InsufficientResources`].
    pub fn io(context: impl Into<String>, source: std::io::Error) -> Self {
        let context = context.into();
        if matches!(
            source.kind(),
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
        ) {
            Self::InsufficientResources(format!(
                "{context}: no space left on the data disk; free some and retry"
            ))
        } else {
            Self::Io { context, source }
        }
    }
}

impl From<StoreError> for EngineError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NoSpace => Self::InsufficientResources(error.to_string()),
            other => Self::Store(other),
        }
    }
}

impl From<VmmError> for EngineError {
    fn from(error: VmmError) -> Self {
        match error {
            // Only the lack of space is the client's business, not which file lacked it.
            VmmError::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => {
                Self::io("start the VMM", source)
            }
            VmmError::MemoryInUse { bytes } => Self::MemoryInUse { bytes },
            other => Self::Vmm(other),
        }
    }
}

impl From<hypeman_snapshots::Error> for EngineError {
    fn from(error: hypeman_snapshots::Error) -> Self {
        if error.is_damage() {
            Self::Damaged(error.to_string())
        } else if error.is_no_space() {
            Self::InsufficientResources(
                "keep guest memory: no space left on the data disk; free some and retry".into(),
            )
        } else {
            Self::Memory(error)
        }
    }
}

impl From<TargetRefusal> for EngineError {
    fn from(refusal: TargetRefusal) -> Self {
        Self::invalid("invalid_request", refusal.to_string())
    }
}

impl From<InvalidValue> for EngineError {
    fn from(error: InvalidValue) -> Self {
        if error.field.is_empty() {
            Self::invalid(error.code, error.message)
        } else {
            Self::invalid(error.code, format!("{}: {}", error.field, error.message))
        }
    }
}

impl From<Refusal> for EngineError {
    fn from(refusal: Refusal) -> Self {
        Self::InvalidState(refusal.to_string())
    }
}
