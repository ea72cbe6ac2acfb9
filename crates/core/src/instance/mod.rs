//! The life of an instance, as pure rules.
//!
//! ```text
//!            launch                 ready                       exit / kill
//!  Created ─────────► Initializing ────────► Running ─┬────────────────────────► Stopped
//!     ▲                     │                 │   ▲   │ shutdown asked              │
//!     │ create              │ exit            ▼   │   ▼                             │ start
//!     │                     └──────────►   Paused │ Shutdown ──── exit ──► Stopped   └─► Initializing
//!                                             (resume)
//!  any state with a VMM ── VMM or agent does not answer ──► Unknown ── answers / exits ──► as observed
//!
//!  any state ──── memory and devices are on disk, no VMM ────► Standby ─┬─ memory dropped ─► Stopped
//!                                                                       │ restored
//!  Created, Stopped ── restored (fork, snapshot in place) ──────────────┴─► Initializing ── agent answers ─► Running
//! ```
//!
//! Two functions decide everything and touch nothing: [`permit`] says whether a command may run in a state,
//! [`Lifecycle::observe`] says what the state becomes after something was seen.
//!
//! Invariants, held by the property tests below:
//! - A refusal never changes the state.
//! - Only an observation leads to `Stopped`; a stopped instance has no VMM.
//! - Readiness is only ever gained within one run, never lost except by leaving the run.
//! - What clears `Unknown` is decided by its [`UnknownCause`], never by the words of its reason.

mod command;
mod lifecycle;
mod phases;

pub use command::{Command, Refusal, permit};
pub use lifecycle::{Exit, InstanceState, Lifecycle, Observation, Readiness, UnknownCause};
pub use phases::PhaseClock;
