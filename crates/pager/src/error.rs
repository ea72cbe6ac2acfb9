//! What a server is told when a pager cannot do what it should.

use std::io;
use std::path::PathBuf;

use crate::protocol::Refused;

/// Why a pager did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// Nobody listens.
    #[error("no pager listens at {}: {source}", socket.display())]
    Connect {
        /// Where.
        socket: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It could not be started.
    #[error("the pager cannot be started: {0}; `hypeman doctor` checks what it needs")]
    Start(#[source] io::Error),
    /// It has ended, and with it the service of all its machines.
    #[error("the pager is gone ({0}); machines that it served must be stopped and restored again")]
    Gone(String),
    /// It said no.
    #[error("the pager refuses: {0}")]
    Refused(#[from] Refused),
    /// It does not speak as it should.
    #[error("the pager cannot be understood: {0}")]
    Protocol(&'static str),
    /// The connection failed.
    #[error("the connection to the pager failed: {0}")]
    Io(#[source] io::Error),
}
