//! What is held in memory of each snapshot: what lists show and filter by, and nothing else.
//!
//! A record has the whole configuration of its source. A summary is about a fifth of it, so that a hundred thousand
//! of them are held, and lists touch neither the database nor a parser.

use std::sync::Arc;

use hypeman_vmm::VmmKind;
use jiff::Timestamp;

use super::model::{CompressionChoice, CompressionState, SnapshotKind, SnapshotRecord};

/// A snapshot as lists show it. It never changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotSummary {
    /// Where it is in the list: newer ones are higher.
    pub(crate) position: i64,
    /// Id, 24 characters.
    pub id: Box<str>,
    /// Unique among the snapshots of the source.
    pub name: Option<Box<str>>,
    /// What it holds.
    pub kind: SnapshotKind,
    /// User-defined tags, sorted by key; each key once.
    pub tags: Box<[(Box<str>, Box<str>)]>,
    /// Commit of the capture.
    pub created_at: Timestamp,
    /// Instance that it is of.
    pub source_id: Box<str>,
    /// Name of that instance then.
    pub source_name: Box<str>,
    /// Hypervisor of that instance then.
    pub source_hypervisor: VmmKind,
    /// Snapshot that the source was last restored or forked from.
    pub parent: Option<Box<str>>,
    /// Schedule that made it.
    pub schedule: Option<Box<str>>,
    /// Bytes of all parts as captured, without holes.
    pub size_bytes: u64,
    /// Memory, for [`SnapshotKind::Standby`].
    pub memory: Option<MemorySummary>,
}

/// The memory of a listed snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemorySummary {
    /// Memory image in the snapshot store.
    pub(crate) image: Box<str>,
    /// Bytes of the guest's pages that are not zero.
    pub bytes: u64,
    /// What was decided about compression.
    pub compression: CompressionChoice,
}

/// A row of a list.
#[derive(Debug, Clone)]
pub struct ListedSnapshot {
    /// What does not change.
    pub summary: Arc<SnapshotSummary>,
    /// Where the compression of its memory is; [`CompressionState::None`] without memory.
    pub compression: CompressionState,
}

impl SnapshotSummary {
    /// What lists show of a record; `position` is where it is in them.
    #[must_use]
    pub fn new(position: i64, record: &SnapshotRecord) -> Self {
        Self {
            position,
            id: boxed(&record.id),
            name: record.name.as_deref().map(boxed),
            kind: record.kind,
            tags: record
                .tags
                .iter()
                .map(|(key, value)| (boxed(key), boxed(value)))
                .collect(),
            created_at: record.created_at,
            source_id: boxed(&record.source.id),
            source_name: boxed(&record.source.name),
            source_hypervisor: record.source.hypervisor,
            parent: record.parent.as_deref().map(boxed),
            schedule: record.scheduled_for.as_deref().map(boxed),
            size_bytes: record.size_bytes,
            memory: record.memory.as_ref().map(|memory| MemorySummary {
                image: boxed(&memory.image),
                bytes: memory.bytes,
                compression: memory.compression,
            }),
        }
    }

    /// The value of one tag.
    pub(crate) fn tag(&self, key: &str) -> Option<&str> {
        let place = self.tags.binary_search_by(|(known, _)| (**known).cmp(key)).ok()?;
        self.tags.get(place).map(|(_, value)| &**value)
    }
}

fn boxed(text: impl AsRef<str>) -> Box<str> {
    text.as_ref().into()
}
