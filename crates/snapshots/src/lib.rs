//! Snapshots as plain files: guest memory in layers, disks, manifests, and one portable file of them all.
//!
//! Knows neither instances nor VMMs nor a database. Every call blocks; long ones use all cores, and can be
//! cancelled where that makes sense.
//!
//! # Memory
//! [`MemoryStore`] keeps immutable images of guest memory. An image owns a set of 4 KiB pages over an optional parent.
//!
//! ```text
//!  <root>/<id>/index        which pages the image owns, which of them are not zero, a BLAKE3 of each chunk
//!             /memory.raw   raw form: owned pages at their own offset, everything else a hole
//!             /frames.index framed form: where the frame of each chunk lies, here or in another image
//!             /frames.dat   compressed frames, in no order
//!             /verified     which raw file was verified since the host booted; a hint, never needed
//!             /touched      which pages guests touch first; a hint, never needed
//!  <root>/.tmp-*            work in progress; whatever a crash left is removed by `MemoryStore::open`
//! ```
//!
//! Invariants:
//! * A file that has its final name is complete, was synced, and never changes, but for the hints. Two exceptions give
//!   space back and keep what is needed: `memory.raw` goes once frames exist, and frames that nobody needs are cut out
//!   of an image that is otherwise deleted.
//! * A directory with `index` is an image. One without holds only frames that other images need.
//! * No byte leaves this crate that was not compared with its BLAKE3, in this call or since the host booted.
//! * An image is kept while it or a descendant is live or held; its frames, while a kept image uses them.
//!
//! # Everything else
//! [`disk`] copies disks and recognises them, a [`Manifest`] says what belongs together, [`export()`] and [`import()`]
//! carry all of it as one stream. Where those files lie, and where they can go on, is the caller's business.

mod archive;
mod capture;
mod codec;
mod compress;
pub mod disk;
mod draft;
mod error;
mod export;
mod extents;
mod files;
mod frames;
mod id;
mod import;
mod index;
mod layout;
mod manifest;
mod materialize;
mod memo;
mod outline;
mod parallel;
mod patch;
mod pieces;
mod reader;
mod sealed;
mod store;
mod sweep;
mod usage;
mod verify;
mod working_set;
mod writeback;

pub use blake3::Hash as Digest;
pub use capture::{Captured, Elsewhere, MemorySource};
pub use codec::Codec;
pub use compress::Compressed;
pub use disk::DiskDigest;
pub use error::{Error, Form, Part, Result};
pub use export::{Export, export};
pub use extents::shared_bytes;
pub use id::MemoryId;
pub use import::{Bounds, Imported, import};
pub use layout::{CHUNK_BYTES, MAX_DEPTH, PAGE_BYTES};
pub use manifest::{Blob, MAX_MANIFEST, Manifest, MemoryPart, SnapshotKind, Vmm};
pub use materialize::{Base, Materialized};
pub use outline::{Compressor, Outline};
pub use patch::Patch;
pub use pieces::{MemoryReader, Piece, PieceBuffers};
pub use store::{Forms, Hold, MemoryStore, Options};
pub use sweep::{Sweep, Swept};
pub use usage::Usage;
pub use verify::Verified;
pub use working_set::WorkingSet;
