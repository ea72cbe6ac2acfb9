//! Snapshots of instances: captured, listed, restored, multiplied, compressed, verified.
//!
//! ```text
//!  service ──► a driver captures (instances::capture) ──► rows: a committed row makes it a snapshot
//!          ──► a driver restores (instances::rewind) or a fork is made of it (instances::fork)
//!  vault   ──► memory images: kept, laid out for machines, compressed behind their back, swept
//!  export  ──► one file ──► import, here or on another server: described by papers
//!  table   ──► what the rows say, in memory: lists read it alone
//!  leases  ──► files are not removed from under a reader
//! ```

mod export;
mod import;
pub(crate) mod leases;
mod model;
mod papers;
pub(crate) mod rows;
pub(crate) mod schedules;
mod service;
pub(crate) mod state;
mod summary;
pub(crate) mod table;
pub(crate) mod vault;
mod verify;

pub use export::SnapshotExport;
pub use model::{
    Algorithm, CompressionChoice, CompressionState, ForkOutcome, ForkRequest, ImportedSnapshot, MemoryRecord,
    RestoreRequest, ScheduleRecord, ScheduleRequest, Snapshot, SnapshotFilter, SnapshotKind, SnapshotPolicy,
    SnapshotRecord, SnapshotRequest, SnapshotUsage, StandbyRequest, VerifyOutcome, VerifyProgress,
};
pub use summary::{ListedSnapshot, MemorySummary, SnapshotSummary};
