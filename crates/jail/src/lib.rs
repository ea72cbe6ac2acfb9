//! The jail of a VMM process: what it can reach when its guest has taken it over.
//!
//! ```text
//!  once:        a shell: /usr, /lib…, a few files of /etc, read-only; no way back to the host's root   (shell.rs)
//!
//!  each start:  a user of its own                        (user.rs)
//!               a control group with limits              (groups.rs)
//!               a thread of ours ─► its copy of the shell, what the machine needs, empty namespaces  (stage.rs)
//!                    └─ clone ─► a process ─► /proc of its own ─► user, capabilities, filters ─► the VMM
//!                                                                                    (spawn.rs, child.rs)
//! ```
//!
//! A [`JailSpec`] is plain data: what to show, under the names that it has on the host, so that nobody translates a
//! path. All that is laborious happens on a thread, which may allocate and tell what went wrong; between clone and
//! exec there are only system calls.
//!
//! Invariants:
//! - What a host refuses is missing item by item, and told: [`Report`]. Nothing is silently weaker than it says.
//! - A user id belongs to one live process: the process itself holds its lock, also when the server is gone.
//! - The VMM owns no directory in which the server opens files by name.

mod child;
mod filter;
mod groups;
mod host;
mod later;
mod launch;
mod opener;
mod options;
mod report;
mod restraint;
mod shell;
mod spawn;
mod spec;
mod stage;
mod system;
mod tap;
mod user;

pub use host::Jail;
pub use later::{hide_from, show_to};
pub use launch::{Confined, Launch, Lent, Memory, Tap};
pub use options::{JailOptions, Mode};
pub use report::{Item, Report};
pub use restraint::Restraint;
pub use spec::{Access, Grant, JailSpec, Limits, Show};

use std::io;

/// Why a process could not be started in a jail.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// This host cannot confine a process, or not as it must.
    #[error("{0}")]
    Unavailable(String),
    /// What was asked for makes no sense.
    #[error("the jail cannot be built: {0}")]
    Invalid(String),
    /// Every user id is taken.
    #[error("all {0} user ids of hypervisor.jail_uids are taken by machines that run: name a larger range")]
    NoUser(u32),
    /// A step failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done.
        context: String,
        /// The cause.
        source: io::Error,
    },
}

impl JailError {
    fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            context: context.into(),
            source: source.into(),
        }
    }
}
