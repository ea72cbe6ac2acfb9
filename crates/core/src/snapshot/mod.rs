//! What may be made of a snapshot, as pure rules.
//!
//! ```text
//!   kind      holds                     becomes (default first)        another hypervisor
//!   Standby   memory, devices, disk     Running, Standby, Stopped      no: memory and devices are its own
//!   Stopped   disk                      Stopped, Running               yes
//! ```
//!
//! Invariants, held by the tests:
//! - What has no memory never becomes `Standby`.
//! - A [`CompressionChoice`] that exists is in the range of its algorithm.
//! - The names of counted forks are valid, different from each other, and all of them or none are accepted.

mod compression;
mod forks;
mod target;

use serde::{Deserialize, Serialize};

pub use compression::{
    Algorithm, CompressionChoice, choose_compression, choose_delay, choose_memory_compression,
};
pub use forks::{MAX_FORKS, fork_names};
pub use target::{Target, TargetRefusal, fork_target, hypervisor_of, snapshot_target};

/// What a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum SnapshotKind {
    /// Memory, devices and disk of one instant.
    Standby,
    /// The disk alone.
    Stopped,
}

impl SnapshotKind {
    /// The name used by the contract.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standby => "Standby",
            Self::Stopped => "Stopped",
        }
    }

    /// Whether it holds memory.
    #[must_use]
    pub fn has_memory(self) -> bool {
        self == Self::Standby
    }
}

impl std::fmt::Display for SnapshotKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}
