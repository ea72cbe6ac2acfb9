//! Images: what references point to, the jobs that make root disks, and the registry's repositories.
//!
//! ```text
//!   POST /images ─ resolve ─► Pending ─► Pulling ─► Converting ─► Ready
//!   PUT manifest ───────────► Pending ──────────────────┘  └─ any error ─► Failed (asked again: Pending)
//! ```
//!
//! Invariants:
//! - A root disk under its final name is complete and synced; a content is `Ready` in the store only after that.
//! - A content without references and without instances is removed: first its row, then its files. Files without
//!   a row are swept at the next start.
//! - A root disk that an imported snapshot brought along has a name of its own kind: nobody who asks for a manifest's
//!   digest is ever given what somebody only says was made of it.
//! - Borrowed credentials live in the job's memory only. A pull that a crash cut goes on with the server's own.

mod carried;
mod catalog;
mod collect;
mod job;
mod model;
mod own_name;
mod promises;
mod registry;
mod seals;
mod supply;
#[cfg(test)]
mod tests;

pub(crate) use carried::{Carried, is_carried_name};
pub(crate) use catalog::Catalog;
pub(crate) use model::RuntimeConfig;
pub use model::{CreateImage, Image, ImageStatus};
pub use registry::RegistryManifest;
