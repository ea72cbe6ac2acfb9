//! The engine: instances, images and everything that joins the other crates.
//!
//! ```text
//!  server ──► Engine ──┬─► image jobs ────► registry client, blob store, converter
//!                      └─► one driver task per instance ──► VMM, guest agent, network, disks
//!                               │ publishes                        ▲
//!                               ▼                                  │ recovery at start
//!                          snapshot of its state ◄── queries     journal (SQLite)
//! ```
//!
//! Invariants:
//! - Queries read what drivers publish; they never wait for a driver, a VMM or a lock that is held over I/O.
//! - Before the first effect of an operation its intent is in the journal; the API answers only after recovery
//!   has finished or undone every operation found there.
//! - No other crate knows all of these parts; they do not know each other.

mod blocking;
mod capabilities;
mod clock;
mod durable;
mod engine;
mod error;
mod events;
pub mod faults;
mod images;
mod instances;
mod layout;
mod options;
mod pagers;
mod paging;
mod random;
mod resources;
mod shared;
mod snapshots;

pub use capabilities::{HostCapabilities, RuntimeCapabilities};
pub use engine::Engine;
pub use error::EngineError;
pub use events::{CursorRefusal, Event, EventKind, EventListener, ListenerEnd};
pub use hypeman_pager::{CacheStats, Latency, MachineState};
pub use images::{CreateImage, Image, ImageStatus, RegistryManifest};
pub use instances::{
    CreateInstance, Expiry, Instance, InstanceFilter, InstanceRecord, InstanceStats, InstanceUpdate,
    LogFollower, LogSource, NetworkRecord, NetworkRequest, RunRecord, StandbyRecord, StartOverrides,
    WaitOutcome,
};
pub use options::{EngineOptions, ImageOptions, Limits, LogOptions, SnapshotOptions};
pub use pagers::{MachineNumbers, PagedMachine, PagerNumbers, PagerReport, pager_directory};
pub use paging::{PagingMode, PagingOptions};
pub use resources::{DiskUse, ResourceReport, Usage};
pub use snapshots::{
    Algorithm, CompressionChoice, CompressionState, ForkOutcome, ForkRequest, ImportedSnapshot,
    ListedSnapshot, MemorySummary, RestoreRequest, ScheduleRecord, ScheduleRequest, Snapshot, SnapshotExport,
    SnapshotFilter, SnapshotKind, SnapshotPolicy, SnapshotRecord, SnapshotRequest, SnapshotSummary,
    SnapshotUsage, StandbyRequest, VerifyOutcome, VerifyProgress,
};
