//! What a transfer tells its caller while it runs, and how the caller stops it.

use tokio_util::sync::CancellationToken;

use crate::digest::Digest;
use crate::manifest::Descriptor;

/// One step of a pull or push.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum TransferEvent {
    /// The blobs that will be transferred or found present, in the manifest's order, config included.
    Planned {
        /// The blobs.
        blobs: Vec<Descriptor>,
        /// Sum of their sizes in bytes.
        total: u64,
    },
    /// Bytes of a blob have gone over. Counts never go back, except when a server cannot continue a broken download.
    Progress {
        /// The blob.
        digest: Digest,
        /// Bytes of it so far, earlier attempts included.
        done: u64,
        /// Its size in bytes.
        size: u64,
        /// Bytes of all blobs so far.
        total_done: u64,
        /// Sum of all sizes in bytes.
        total: u64,
    },
    /// A blob is complete and verified.
    Finished {
        /// The blob.
        digest: Digest,
        /// Whether it was there already.
        reused: bool,
    },
}

/// Gets the events of a transfer and can cancel it. Dropping the transfer's future cancels too.
pub trait TransferObserver: Send + Sync {
    /// Called often; must not block.
    fn event(&self, event: &TransferEvent) {
        let _ = event;
    }

    /// Asked once at the start; the transfer ends with `Cancelled` soon after the token fires.
    fn cancellation(&self) -> CancellationToken {
        CancellationToken::new()
    }
}

/// Ignores everything.
impl TransferObserver for () {}
