//! Metadata: what exists, what was intended, and which operations are unfinished.
//!
//! ```text
//!   callers ──closure──► writer thread ──► one transaction for all that wait ──► fsync ──► answers
//!   callers ◄── rows ─── reader connection (WAL: never waits for the writer)
//! ```
//!
//! Invariants:
//! - A write that was answered survives power loss (`synchronous=FULL`).
//! - Writes that wait at the same time share one commit; each fails or succeeds on its own (savepoints).
//! - Documents are JSON with the columns that lists and constraints need beside them; what a document means is
//!   known to the engine alone.

mod database;
mod error;
pub mod images;
pub mod instances;
pub mod journal;
mod migrations;
pub mod registry;
pub mod schedules;
pub mod snapshots;

pub use database::Store;
pub use error::StoreError;
pub use rusqlite::Connection;
