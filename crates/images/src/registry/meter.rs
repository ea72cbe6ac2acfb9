//! The progress of a pull or push, added up over its blobs, which go in parallel.

use std::sync::atomic::{AtomicU64, Ordering};

use super::progress::{TransferEvent, TransferObserver};
use crate::manifest::Descriptor;

/// Adds up progress over all blobs.
pub(super) struct Meter<'a> {
    observer: &'a dyn TransferObserver,
    done: AtomicU64,
    total: u64,
}

impl<'a> Meter<'a> {
    /// Tells the observer what will be transferred.
    pub(super) fn planned(observer: &'a dyn TransferObserver, blobs: &[Descriptor]) -> Self {
        let sum = |total: u64, blob: &Descriptor| total.saturating_add(blob.size);
        let total = blobs.iter().fold(0, sum);
        observer.event(&TransferEvent::Planned {
            blobs: blobs.to_vec(),
            total,
        });
        Self {
            observer,
            done: AtomicU64::new(0),
            total,
        }
    }

    /// Reports that a blob went from `before` to `after` bytes.
    pub(super) fn advance(&self, blob: &Descriptor, before: u64, after: u64) {
        let total_done = if after >= before {
            self.done.fetch_add(after - before, Ordering::Relaxed) + (after - before)
        } else {
            self.done.fetch_sub(before - after, Ordering::Relaxed) - (before - after)
        };
        let (digest, size, total) = (blob.digest, blob.size, self.total);
        self.observer.event(&TransferEvent::Progress {
            digest,
            done: after,
            size,
            total_done,
            total,
        });
    }

    /// Reports that a blob is complete.
    pub(super) fn finish(&self, blob: &Descriptor, reused: bool) {
        self.observer.event(&TransferEvent::Finished {
            digest: blob.digest,
            reused,
        });
    }
}
