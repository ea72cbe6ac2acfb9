//! Who reads the parts of a snapshot, so that deleting it never takes them from under anybody.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::durable;
use crate::layout::Layout;
use crate::snapshots::vault::Hold;

#[derive(Debug, Default)]
struct Readers {
    count: usize,
    doomed: bool,
}

/// The readers of all snapshots.
#[derive(Debug, Clone)]
pub(crate) struct Leases {
    layout: Layout,
    readers: Arc<Mutex<HashMap<String, Readers>>>,
}

/// The right to read one snapshot's files, and its memory.
#[derive(Debug)]
pub(crate) struct Lease {
    leases: Leases,
    id: String,
    memory: Option<Hold>,
}

impl Leases {
    pub(crate) fn new(layout: Layout) -> Self {
        Self {
            layout,
            readers: Arc::default(),
        }
    }

    /// Keeps the files of a snapshot until the lease is dropped.
    pub(crate) fn take(&self, id: &str) -> Lease {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        readers.entry(id.to_owned()).or_default().count += 1;
        Lease {
            leases: self.clone(),
            id: id.to_owned(),
            memory: None,
        }
    }

    /// Removes the files of a snapshot that no row names any more: now, or when its last reader is done.
    pub(crate) fn doom(&self, id: &str) -> Option<PathBuf> {
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        match readers.get_mut(id) {
            Some(present) => {
                present.doomed = true;
                None
            }
            None => Some(self.layout.snapshot(id)),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut readers = self.leases.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(present) = readers.get_mut(&self.id) else {
            return;
        };
        present.count -= 1;
        if present.count > 0 {
            return;
        }
        let doomed = present.doomed;
        readers.remove(&self.id);
        drop(readers);
        if doomed && let Err(error) = durable::remove_tree(&self.leases.layout.snapshot(&self.id)) {
            tracing::warn!(snapshot = self.id, %error, "left for the next start");
        }
    }
}

impl Lease {
    /// Keeps the memory as long as the files.
    pub(crate) fn keep(&mut self, memory: Option<Hold>) {
        self.memory = memory;
    }

    /// Id of the snapshot.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }
}
