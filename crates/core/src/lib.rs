//! The pure domain: identifiers, names, the grammars of sizes, rates and durations, tags, the instance state
//! machine, the rules of snapshots and their schedules, and the guard that undoes what then failed.
//!
//! Nothing here does input or output, reads a clock or knows an async runtime. What needs randomness or the
//! time is handed both, so that every rule can be tested as a function.

pub mod bandwidth;
pub mod duration;
mod error;
pub mod id;
pub mod instance;
pub mod name;
pub mod platform;
pub mod rate;
pub mod schedule;
pub mod size;
pub mod snapshot;
pub mod tags;
pub mod time;
mod undo;

pub use error::InvalidValue;
pub use undo::Undo;
