//! What the guest reports on its own.

use serde::{Deserialize, Serialize};

/// An event of the guest, in the order in which it happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestEvent {
    /// The image's program was started (exec mode) or its init was handed over to (systemd mode).
    ProgramStarted,
    /// Exec, copy and stat are served from now on.
    AgentReady,
    /// Every process was asked to end: the image's init is about to power off (systemd mode).
    AskedToEnd,
    /// The program ended; the guest powers off after this is acknowledged or after a short time.
    Exited(ExitReason),
    /// The guest could not become the instance: a mount, a volume or the network failed.
    SetupFailed {
        /// What failed, for people.
        message: String,
    },
}

/// How the program ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitReason {
    /// Exit code as a shell would report it: 126 not executable, 127 not found, 128+n for signal n.
    pub code: i32,
    /// Signal that ended it.
    pub signal: Option<i32>,
    /// The kernel's memory killer ended it.
    pub out_of_memory: bool,
    /// For people: `command not found: foo`, `killed by SIGKILL (out of memory)`, …
    pub message: String,
}
