//! Who a VMM process is, beyond its number.

use serde::{Deserialize, Serialize};

/// Identity of a process that outlives the server. A pid alone is never trusted: numbers are reused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id` when it was started: after a reboot nothing matches.
    pub boot_id: String,
    /// Executable, as resolved from `/proc/<pid>/exe` after the start.
    pub executable: String,
}
