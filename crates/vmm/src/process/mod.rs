//! VMM processes: who they are, how they start, how their end is learnt.
//!
//! ```text
//! spawn ──► ProcessHandle (our child) ─┐
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
mod watch;
mod words;

pub(crate) use by_name::{ByName, program_files};
pub(crate) use confine::{confines, limits};
pub use identity::{ProcessIdentity, boot_id};
pub(crate) use identity::{processes_with_argument, resident_and_cpu};
pub(crate) use own_filter::note_own_filter;
pub(crate) use spawn::{Confinement, Detached, Spawned, spawn_detached};
pub(crate) use watch::{Ended, KillOnDrop, ProcessHandle, readable};
pub(crate) use words::Words;
