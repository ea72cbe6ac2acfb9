//! VMM processes: who they are, how they start, how their end is learnt.
//!
//! ```text
//! spawn ──► ProcessHandle (our child) ─┐                                                      (start.rs)
//!                                      ├─► pidfd readable ──► reaped ──► Ended
//! open(identity) ──► ProcessHandle ────┘   (a stranger's child: only its end is known)
//! ```
//!
//! Invariant: a signal goes through a pidfd whose process was compared with its [`ProcessIdentity`] after the
//! pidfd was opened, so it never reaches a process that merely got the same number.

mod by_name;
mod confine;
mod filter;
mod identity;
mod own_filter;
mod spawn;
#[cfg(test)]
pub(crate) mod stand_in;
mod start;
mod watch;
mod words;

pub(crate) use by_name::{ByName, program_files};
pub(crate) use confine::{confines, limits};
pub(crate) use identity::processes_with_argument;
pub use identity::{ProcessIdentity, boot_id};
pub(crate) use spawn::{Confinement, Detached};
pub(crate) use start::Starting;
pub(crate) use watch::{Ended, ProcessHandle, readable};
pub(crate) use words::Words;
