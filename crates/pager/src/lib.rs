//! Serves page faults of machines from stored memory images, in one process a host.
//!
//! ```text
//!  server ── Pager ──► control socket ──┐  register: this socket, this image, nothing else
//!            events ◄───────────────────┤
//!                                       │ hypeman pager
//!                                       │   machine ─ thread ─ ledger ──┐
//!  VMM ── its userfaultfd, its regions ─┤   machine ─ thread ─ ledger ──┼─► cache of verified pieces ─► images
//!   ▲                                   │   fetch ahead, let go ────────┘      (bounded, shared)       (open files)
//!   └────── pages appear ◄──────────────┘
//! ```
//! [`Pager`] is for the server: it starts a pager when one is needed, takes back those that run, and says when one is
//! gone. [`serve`] is the process itself. It outlives the server; a later release starts its own and has this one
//! drain.
//!
//! Invariants:
//! * A VMM gets pages of the one image that its socket was made for, whatever it says. What it says is checked against
//!   the size of that image before anything is served.
//! * Every byte from a store was compared with its BLAKE3 in this process. When that fails, the fault is never
//!   answered: the machine is reported as failed, and can only be killed.
//! * Pages that a guest gave back are zero when it asks again.
//! * Who depends on a pager hears of its end.
//!
//! # Capturing a machine that is served
//! Its memory is anonymous, and read from outside. With the machine standing still and [`PagerClient::settle`] done,
//! pages that `/proc/PID/pagemap` shows, the shared page of zeros included, are what the guest has; those that it does
//! not show are what the base image has. Once a machine has graduated, pages that are not shown are zero. The kernel
//! tells which of the two holds: `VmFlags` in `/proc/PID/smaps` has `um` while faults of a mapping are served.

mod audience;
mod background;
mod cache;
mod client;
mod connection;
mod error;
mod handshake;
mod host;
mod image;
mod latency;
mod ledger;
mod machine;
pub mod memory;
mod protocol;
mod recorder;
mod regions;
mod service;
mod session;
mod survey;
pub mod uffd;

pub use cache::CacheStats;
pub use client::{Condition, PagerClient, drain};
pub use error::PagerError;
pub use host::{Pager, PagerEvent, PagerOptions, Served};
pub use latency::Latency;
pub use protocol::{
    Event, Health, Hello, MAX_OVERLAY_PAGES, MachineReport, MachineState, MemoryRegion, OverlayPage,
    PROTOCOL, Refused, RefusedCode, Registration, Stats,
};
pub use recorder::Recording;
pub use service::{ServiceOptions, serve};
pub use survey::{Found, Sighting, survey};
