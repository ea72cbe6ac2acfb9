//! Why a request to the guest failed.

use crate::message::{Refusal, RefusalCode};

/// Failure of the channel or of one request on it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ChannelError {
    /// The connection is gone: the guest powered off, the VMM died, or either end closed it.
    #[error("the connection to the guest agent is closed")]
    Closed,
    /// The connection ended because the VMM wrote the state of the guest's machine: for a snapshot, or because some can
    /// go on with their log only so.
    #[error(
        "ended by a snapshot of this instance, or the rotation of its logs: its hypervisor drops the connections to a guest whose state it writes"
    )]
    Captured,
    /// The guest did not answer in time.
    #[error("the guest agent did not answer in time")]
    Deadline,
    /// The guest is configured and the host has no key for it.
    #[error("the guest is already configured and a key is needed to reach it")]
    KeyRequired,
    /// The guest could not prove that it knows the key of this boot.
    #[error("the guest could not prove its identity")]
    NotAuthentic,
    /// The guest broke the rules of the channel.
    #[error("the guest broke the channel protocol: {0}")]
    Protocol(String),
    /// The guest understood and refused.
    #[error("{}", .0.message)]
    Refused(Refusal),
}

impl ChannelError {
    /// The guest's reason if it refused.
    pub fn refusal(&self) -> Option<RefusalCode> {
        match self {
            ChannelError::Refused(refusal) => Some(refusal.code),
            _ => None,
        }
    }
}

impl From<std::io::Error> for ChannelError {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::InvalidData => ChannelError::Protocol(error.to_string()),
            _ => ChannelError::Closed,
        }
    }
}
