//! Requests, answers and the messages that follow them on one stream.
//!
//! ```text
//! host                                guest
//!  │ header Request                     │
//!  ├───────────────────────────────────►│
//!  │                       header Reply │
//!  │◄───────────────────────────────────┤
//!  │ Exec:     data = stdin, header ExecControl   │ data = stdout, error data = stderr, header ExecEvent
//!  │ CopyTo:   data = content, header CopyMessage │ header Reply with the bytes written
//!  │ CopyFrom:                                    │ header CopyMessage, data = content of the last entry
//!  │ Events:   header EventMessage::Acknowledge   │ header EventMessage::Event
//! ```
//!
//! All other requests are over with the reply.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{GuestConfig, GuestEvent, Reconfiguration};

/// First header of a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Become the instance. Answered when the program runs or the setup failed.
    Configure(Box<GuestConfig>),
    /// Follow the guest's events from the first one of this boot.
    Events,
    /// Run a command.
    Exec(ExecRequest),
    /// Describe a path.
    Stat {
        /// Absolute path in the container.
        path: String,
        /// Describe what a symbolic link points to instead of the link.
        follow_links: bool,
    },
    /// Write one file, directory or link.
    CopyTo(CopyTo),
    /// Read a file or a tree.
    CopyFrom(CopyFrom),
    /// End the program, then the machine.
    Shutdown {
        /// Time between the polite signal and the end by force, milliseconds.
        grace_milliseconds: u64,
    },
    /// Set the wall clock.
    SetTime {
        /// Nanoseconds since 1970.
        time_unix_nanos: i128,
    },
    /// Hold everything but the agent still. Answered when it does; refused, it goes on.
    Freeze,
    /// Let it go on. Also answered when nothing stands still.
    Thaw,
    /// Take over a new identity (after a fork).
    Reconfigure(Box<Reconfiguration>),
    /// Answer.
    Ping,
}

/// First header from the guest on a stream, and the last one of a copy to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Accepted or done.
    Done,
    /// A path's description.
    Path(PathInfo),
    /// A copy is complete.
    Written {
        /// Bytes of content; 0 for directories and links.
        bytes: u64,
    },
    /// No.
    Refused(Refusal),
}

/// Why the guest refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// For programs.
    pub code: RefusalCode,
    /// For people.
    pub message: String,
}

/// Kind of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalCode {
    /// The request makes no sense.
    Invalid,
    /// The guest is too old for this request.
    Unsupported,
    /// The guest waits for its configuration.
    NotConfigured,
    /// The guest has its configuration.
    AlreadyConfigured,
    /// The guest could not become the instance.
    SetupFailed,
    /// The instance was created without an agent.
    AgentDisabled,
    /// The machine is about to power off.
    ShuttingDown,
    /// No such command in the container (exit code 127).
    CommandNotFound,
    /// The command cannot be executed (exit code 126).
    CommandNotExecutable,
    /// No such path.
    NotFound,
    /// A directory is in the way.
    IsDirectory,
    /// Something that is not a directory is in the way.
    NotDirectory,
    /// The container's file system is full.
    NoSpace,
    /// Any other failure inside the guest.
    #[serde(other)]
    Failed,
}

/// A command to run in the container, as root.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecRequest {
    /// Program and arguments. Empty: `/bin/sh`.
    pub command: Vec<String>,
    /// Rows and columns of a terminal; `None` runs on pipes.
    pub tty: Option<(u16, u16)>,
    /// Added to the environment of the container.
    pub environment: Vec<(String, String)>,
    /// Working directory; `None`: `/`.
    pub working_directory: Option<String>,
    /// The session's processes are killed after this time, with exit code 124.
    pub timeout: Option<Duration>,
}

/// What the host says during an exec session, besides data frames for the standard input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecControl {
    /// The standard input ends here.
    CloseStdin,
    /// The terminal has a new size.
    Resize {
        /// Rows.
        rows: u16,
        /// Columns.
        columns: u16,
    },
}

/// What the guest says during an exec session, besides data frames with output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecEvent {
    /// The command ended; nothing follows.
    Exited {
        /// Exit code, 128+n for signal n, 124 for the timeout.
        code: i32,
    },
}

/// A path as `GET /instances/{id}/stat` shows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PathInfo {
    /// The path exists.
    pub exists: bool,
    /// It is a directory.
    #[serde(default)]
    pub is_directory: bool,
    /// It is a regular file.
    #[serde(default)]
    pub is_file: bool,
    /// It is a symbolic link (only where links are not followed).
    #[serde(default)]
    pub is_symlink: bool,
    /// What the link says.
    #[serde(default)]
    pub link_target: Option<String>,
    /// Permission bits, at most `0o7777`.
    #[serde(default)]
    pub mode: u32,
    /// Bytes.
    #[serde(default)]
    pub size: u64,
    /// Why the path could not be looked at, when the reason is not absence.
    #[serde(default)]
    pub error: Option<String>,
}

/// One entry to write. Missing parents are created with mode 0755.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyTo {
    /// Absolute path in the container.
    pub path: String,
    /// Make a directory (or keep the one that is there).
    #[serde(default)]
    pub is_directory: bool,
    /// Make a symbolic link that says this.
    #[serde(default)]
    pub symlink_target: Option<String>,
    /// Mode bits, at most `0o7777`. `None`: that of the file replaced, else 0644 or 0755.
    #[serde(default)]
    pub mode: Option<u32>,
    /// User and group. `None`: those of the file replaced, else root.
    #[serde(default)]
    pub owner: Option<(u32, u32)>,
    /// Modification time, nanoseconds since 1970. `None`: now.
    #[serde(default)]
    pub modification_time_nanos: Option<i64>,
}

/// What to read.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyFrom {
    /// Absolute path in the container.
    pub path: String,
    /// Send what symbolic links point to instead of the links.
    #[serde(default)]
    pub follow_links: bool,
}

/// Header of one entry of a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyEntry {
    /// Base name of the requested path, then `/` and the path below it. Never absolute, no `.` or `..`.
    pub path: String,
    /// What it is.
    pub kind: EntryKind,
    /// Mode bits, at most `0o7777`.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of content that follow; 0 unless a regular file.
    pub size: u64,
    /// Modification time, nanoseconds since 1970.
    pub modification_time_nanos: i64,
    /// What a symbolic link says.
    #[serde(default)]
    pub link_target: Option<String>,
}

/// Kind of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EntryKind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Device, FIFO or socket: named, never copied.
    #[serde(other)]
    Special,
}

/// Headers within a copy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyMessage {
    /// An entry begins; exactly `size` bytes of data follow.
    Entry(CopyEntry),
    /// This entry could not be read (whole); the copy goes on with the next.
    Failed {
        /// Path as in [`CopyEntry::path`].
        path: String,
        /// For people.
        message: String,
    },
    /// All is said.
    End,
}

/// Headers of the stream of events.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventMessage {
    /// From the guest: the event with this number, from 0, counted over the boot.
    Event {
        /// Number.
        number: u64,
        /// Event.
        event: GuestEvent,
    },
    /// From the host: all events below this number are dealt with.
    Acknowledge {
        /// Number of the first event that is not.
        below: u64,
    },
}
