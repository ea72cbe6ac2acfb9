//! Why metadata could not be read or written.

/// A failed read or write. Nothing of a failed write remains.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// A unique column already has this value.
    #[error("{0} already exists")]
    Conflict(String),
    /// The disk is full.
    #[error("no space left for metadata; free some on the data disk and retry")]
    NoSpace,
    /// A newer version of the server wrote this database.
    #[error("the database has version {found}, this server knows {known}: run the newer server")]
    TooNew {
        /// Version in the file.
        found: u32,
        /// Newest version that this server knows.
        known: u32,
    },
    /// A stored document does not parse.
    #[error("corrupt document of {object}: {source}")]
    Corrupt {
        /// Which object.
        object: String,
        /// The cause.
        source: serde_json::Error,
    },
    /// The transaction that this write shared with others could not be committed.
    #[error("the metadata transaction could not be committed; retry")]
    NotCommitted,
    /// The store was closed.
    #[error("the metadata store is closed")]
    Closed,
    /// Any other failure of the database.
    #[error("metadata database: {0}")]
    Database(rusqlite::Error),
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => Self::NoSpace,
            Some(rusqlite::ErrorCode::ConstraintViolation) => Self::Conflict(error.to_string()),
            _ => Self::Database(error),
        }
    }
}
