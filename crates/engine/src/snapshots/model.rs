//! What a snapshot is: its stored record and what can be asked of it.

use std::collections::BTreeMap;
use std::time::Duration;

use hypeman_core::instance::InstanceState;
pub use hypeman_core::snapshot::{Algorithm, CompressionChoice, SnapshotKind};
use hypeman_vmm::VmmKind;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::InstanceRecord;

/// Which forms of the memory exist.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CompressionState {
    /// Raw.
    #[default]
    None,
    /// Raw; a job is queued or runs.
    Compressing,
    /// Framed.
    Compressed {
        /// Bytes of all frames that the memory is made of, others' included; of pages where those have no frames.
        bytes: u64,
        /// How it was compressed; `None` when that could not make it smaller.
        algorithm: Option<Algorithm>,
    },
    /// Raw; the job failed and is tried again later.
    Error {
        /// Why, for people.
        reason: String,
    },
}

/// Request for a snapshot.
#[derive(Debug, Clone)]
pub struct SnapshotRequest {
    /// What to keep.
    pub kind: SnapshotKind,
    /// Unique among the snapshots of the instance.
    pub name: Option<String>,
    /// User-defined tags.
    pub tags: BTreeMap<String, String>,
    /// Overrides the instance's and the server's choice.
    pub compression: Option<CompressionChoice>,
}

/// Options of a standby.
#[derive(Debug, Clone, Copy, Default)]
pub struct StandbyRequest {
    /// Overrides the instance's and the server's choice.
    pub compression: Option<CompressionChoice>,
    /// Compression begins this much later.
    pub compression_delay: Option<Duration>,
}

/// Options of restoring a snapshot in place.
#[derive(Debug, Clone, Copy, Default)]
pub struct RestoreRequest {
    /// `Running`, `Standby` or `Stopped`; the kind's default when absent.
    pub target_state: Option<InstanceState>,
    /// Another hypervisor; only for stopped snapshots.
    pub target_hypervisor: Option<VmmKind>,
}

/// Request for forks, of an instance or a snapshot.
#[derive(Debug, Clone)]
pub struct ForkRequest {
    /// Name of the fork. With a count above 1 each gets `-1`, `-2`, … appended.
    pub name: String,
    /// How many: 1 to 100.
    pub count: u32,
    /// Allow a running source (instances only): it is captured without being stopped.
    pub from_running: bool,
    /// `Running`, `Standby` or `Stopped`; the source's or the kind's default when absent.
    pub target_state: Option<InstanceState>,
    /// Another hypervisor; only for stopped snapshots.
    pub target_hypervisor: Option<VmmKind>,
}

/// What became of one of several forks.
#[derive(Debug)]
pub struct ForkOutcome {
    /// Name that it has or would have had.
    pub name: String,
    /// The instance, or why there is none.
    pub result: Result<std::sync::Arc<crate::Instance>, crate::EngineError>,
}

/// What is stored of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// Id, 24 characters.
    pub id: String,
    /// Unique among the snapshots of the source.
    pub name: Option<String>,
    /// What it holds.
    pub kind: SnapshotKind,
    /// User-defined tags.
    pub tags: BTreeMap<String, String>,
    /// Commit of the capture.
    pub created_at: Timestamp,
    /// The source as it was: name, hypervisor, machine, image.
    pub source: InstanceRecord,
    /// Snapshot that the source was last restored or forked from.
    pub parent: Option<String>,
    /// Schedule that made it: [`ScheduleRecord::mark`].
    pub scheduled_for: Option<String>,
    /// Bytes of all parts as captured, without holes.
    pub size_bytes: u64,
    /// Memory, for [`SnapshotKind::Standby`].
    pub memory: Option<MemoryRecord>,
    /// Bytes of the disk without holes.
    pub disk_bytes: u64,
    /// Digest of what the disk holds, hex.
    pub disk_digest: String,
    /// BLAKE3 of the manifest, hex; empty without memory.
    pub manifest: String,
}

/// The memory of a snapshot or of an instance in standby.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MemoryRecord {
    /// Memory image in the snapshot store.
    pub image: String,
    /// Bytes of the guest's pages that are not zero, wherever they are stored. Early records have those of the image
    /// itself.
    pub bytes: u64,
    /// What was decided about compression.
    pub compression: CompressionChoice,
    /// Where that is. Read from the store and its jobs whenever a record is shown, never from the record.
    #[serde(skip)]
    pub state: CompressionState,
    /// Secret that the guest in this memory shares with the server, hex.
    pub agent_key: String,
}

/// A snapshot as read: immutable, shared.
pub type Snapshot = std::sync::Arc<SnapshotRecord>;

/// Which snapshots a list shows. Everything is ANDed.
#[derive(Debug, Clone, Default)]
pub struct SnapshotFilter {
    /// Only this kind.
    pub kind: Option<SnapshotKind>,
    /// Only with this name, exactly.
    pub name: Option<String>,
    /// Only of this instance.
    pub source_instance_id: Option<String>,
    /// Only with these tags, exactly.
    pub tags: BTreeMap<String, String>,
    /// At most so many, newest first.
    pub limit: Option<u32>,
    /// Only those after this snapshot id in the order of the list.
    pub cursor: Option<String>,
}

/// What a snapshot costs, bytes on disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SnapshotUsage {
    /// Stored for this snapshot alone.
    pub own_bytes: u64,
    /// Stored once for this and others.
    pub shared_bytes: u64,
    /// What deleting it would give back now.
    pub freed_by_delete_bytes: u64,
}

/// How far a verification is; the last one has an outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Bytes read and right.
    pub verified_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// What came of it. Nothing follows.
    pub outcome: Option<VerifyOutcome>,
}

/// What came of a verification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerifyOutcome {
    /// Every byte is what was stored.
    Intact {
        /// A part that there is nothing to compare with.
        unchecked: Option<String>,
    },
    /// A part is not what was stored: which, and how.
    Damaged(String),
    /// Not all of it could be read: why. Nothing is known of the rest.
    Unreadable(String),
    /// Ended early by a client that went away, or by the end of the server.
    Cancelled,
}

/// What an instance says of its memory, in place of the server's choice.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotPolicy {
    /// Compression of all its snapshots.
    pub compression: Option<CompressionChoice>,
    /// After a standby compression begins this much later.
    pub standby_compression_delay: Option<Duration>,
}

/// A schedule as asked for; checked for grammar.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScheduleRequest {
    /// Time between two snapshots: at least a minute.
    pub interval: Duration,
    /// Keep at most so many; `None` or 0: no such rule.
    pub max_count: Option<u32>,
    /// Keep none older than this.
    pub max_age: Option<Duration>,
    /// Begins the names.
    pub name_prefix: Option<String>,
    /// Tags of the snapshots.
    pub metadata: BTreeMap<String, String>,
}

/// A schedule as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScheduleRecord {
    /// Tells it from those that the same instance has had before. Empty in records of earlier servers.
    #[serde(default)]
    pub id: String,
    /// Whose.
    pub instance_id: String,
    /// What.
    pub request: ScheduleRequest,
    /// Next run.
    pub next_run_at: Timestamp,
    /// When the run began that is under way, or was when the server ended.
    #[serde(default)]
    pub running_since: Option<Timestamp>,
    /// Last run, whatever came of it.
    pub last_run_at: Option<Timestamp>,
    /// What the last good run made.
    pub last_snapshot_id: Option<String>,
    /// Why the last run failed.
    pub last_error: Option<String>,
    /// Set first.
    pub created_at: Timestamp,
    /// Set last.
    pub updated_at: Timestamp,
}

impl ScheduleRecord {
    /// By what its snapshots name it. Earlier servers knew schedules by their instance alone.
    #[must_use]
    pub fn mark(&self) -> &str {
        if self.id.is_empty() {
            &self.instance_id
        } else {
            &self.id
        }
    }
}

/// What an import made.
pub type ImportedSnapshot = Snapshot;
