//! Snapshots of instances and their schedules: what is asked for and what is answered.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::error::ErrorBody;
use crate::instance::{Hypervisor, Instance};
use crate::policy::SnapshotCompressionConfig;

/// What a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
pub enum SnapshotKind {
    /// Memory, devices and disk of one instant.
    Standby,
    /// The disk alone.
    Stopped,
}

impl SnapshotKind {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standby => "Standby",
            Self::Stopped => "Stopped",
        }
    }
}

impl std::fmt::Display for SnapshotKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl std::str::FromStr for SnapshotKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Standby, Self::Stopped]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or_else(|| format!("{text:?} is not a kind of snapshot: Standby or Stopped"))
    }
}

/// Where the compression of a snapshot's memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotCompressionState {
    /// Memory is raw.
    None,
    /// Memory is raw; compressing it waits or runs.
    Compressing,
    /// Memory is compressed.
    Compressed,
    /// Memory is raw and usable; compressing it failed and is tried again.
    Error,
}

impl SnapshotCompressionState {
    /// The name on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Compressing => "compressing",
            Self::Compressed => "compressed",
            Self::Error => "error",
        }
    }
}

/// An instance as it was at one instant. It outlives the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// Its identifier.
    #[schema(example = "q7z1w7l2af4l8y7q1h7g2m3s")]
    pub id: String,
    /// Its name, unique among the snapshots of its source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "baseline-standby")]
    pub name: Option<String>,
    /// What it holds.
    pub kind: SnapshotKind,
    /// Its tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::tags::schema)]
    pub tags: BTreeMap<String, String>,
    /// Instance that it was taken of.
    pub source_instance_id: String,
    /// Name of that instance then.
    pub source_instance_name: String,
    /// Hypervisor of that instance then.
    pub source_hypervisor: Hypervisor,
    /// When it was taken.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// Bytes of all its parts, without holes.
    pub size_bytes: i64,
    /// How its memory is to be compressed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub compression: Option<SnapshotCompressionConfig>,
    /// Where that is; absent without memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub compression_state: Option<SnapshotCompressionState>,
    /// Why compressing failed; only in state `error`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub compression_error: Option<String>,
    /// Bytes of its compressed memory, with what it shares with others; only in state `compressed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub compressed_size_bytes: Option<i64>,
    /// Bytes of its memory before compression, without pages of zeros; absent without memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub uncompressed_size_bytes: Option<i64>,
    /// Snapshot that its source had been restored or forked from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub parent: Option<String>,
}

/// Asks for a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CreateSnapshotRequest {
    /// What to keep: `Standby` of a running instance or one in standby, `Stopped` of a stopped one.
    pub kind: SnapshotKind,
    /// Its name: lower-case letters, digits and dashes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(
        pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        min_length = 1,
        max_length = 63,
        example = "baseline-standby"
    )]
    pub name: Option<String>,
    /// Its tags.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::tags::schema)]
    pub tags: BTreeMap<String, String>,
    /// Compression of its memory; the instance's or the server's choice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<SnapshotCompressionConfig>,
}

/// States that an instance can be restored or forked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum SnapshotTargetState {
    /// Only its disk is used.
    Stopped,
    /// Its memory stays stored.
    Standby,
    /// It goes on, or boots when there is no memory.
    Running,
}

impl std::str::FromStr for SnapshotTargetState {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "Stopped" => Ok(Self::Stopped),
            "Standby" => Ok(Self::Standby),
            "Running" => Ok(Self::Running),
            other => Err(format!("{other:?} is not a target: Running, Standby or Stopped")),
        }
    }
}

/// Restores a snapshot in place.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RestoreSnapshotRequest {
    /// State afterwards; Running for snapshots of kind Standby and Stopped for the others when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_state: Option<SnapshotTargetState>,
    /// Another hypervisor; only for snapshots of kind Stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_hypervisor: Option<Hypervisor>,
}

/// Forks a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkSnapshotRequest {
    /// Name of the new instance; with a `count` above 1 each gets `-1`, `-2`, … appended.
    #[schema(
        pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        min_length = 1,
        max_length = 63,
        example = "web-2"
    )]
    pub name: String,
    /// State of the new instance; Running for snapshots of kind Standby and Stopped for the others when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_state: Option<SnapshotTargetState>,
    /// Another hypervisor; only for snapshots of kind Stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_hypervisor: Option<Hypervisor>,
    /// How many forks. When given, the answer has a result for each of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100)]
    pub count: Option<u32>,
}

/// Forks an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkInstanceRequest {
    /// Name of the new instance; with a `count` above 1 each gets `-1`, `-2`, … appended.
    #[schema(
        pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        min_length = 1,
        max_length = 63,
        example = "web-2"
    )]
    pub name: String,
    /// Whether the source may be running. It is captured without being stopped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(default = false)]
    pub from_running: Option<bool>,
    /// State of the new instance; the source's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_state: Option<SnapshotTargetState>,
    /// How many forks. When given, the answer has a result for each of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 100)]
    pub count: Option<u32>,
}

/// What a fork answers: the new instance, or with a `count` what became of each fork.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum ForkResponse {
    /// Without `count`.
    One(Box<Instance>),
    /// With `count`.
    Several(ForkResults),
}

/// What became of several forks, in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ForkResults {
    /// One for each.
    pub forks: Vec<ForkResult>,
}

/// What became of one of several forks: an instance or an error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ForkResult {
    /// Name that it has or would have had.
    pub name: String,
    /// The new instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub instance: Option<Instance>,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<ErrorBody>,
}

/// Puts an instance to standby.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StandbyInstanceRequest {
    /// Compression of its memory; the instance's or the server's choice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<SnapshotCompressionConfig>,
    /// How long its memory stays uncompressed, as a Go duration; the instance's choice when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "30s")]
    pub compression_delay: Option<String>,
}

/// Result or progress of reading a snapshot back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotVerification {
    /// How far it is.
    pub state: VerificationState,
    /// Bytes that were read and are right.
    pub verified_bytes: i64,
    /// Bytes in all.
    pub total_bytes: i64,
    /// The damaged part and what is wrong with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub damage: Option<String>,
    /// Why not all of it could be read. It says nothing of what was stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub error: Option<String>,
    /// A part that there is nothing to compare with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub unchecked: Option<String>,
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VerificationState {
    /// It reads.
    Running,
    /// Every byte is what was stored.
    Intact,
    /// A part is not what was stored, see `damage`.
    Damaged,
    /// Not all of it could be read, see `error`; it may be intact.
    Unreadable,
    /// It was ended early.
    Cancelled,
}

/// What a snapshot costs on disk, now. Other snapshots and forks change it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotUsage {
    /// Bytes stored for this snapshot alone.
    pub own_bytes: i64,
    /// Bytes stored once for this and others.
    pub shared_bytes: i64,
    /// Bytes that deleting it would give back.
    pub freed_by_delete_bytes: i64,
}

/// Which snapshots of a schedule stay; at least one rule.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotScheduleRetention {
    /// The newest so many; 0 is no such rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 0, nullable = false)]
    pub max_count: Option<u32>,
    /// Those no older than this Go duration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(example = "168h", nullable = false)]
    pub max_age: Option<String>,
}

/// Sets the schedule of an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SetSnapshotScheduleRequest {
    /// Time between two snapshots as a Go duration, at least `1m`.
    #[schema(example = "1h")]
    pub interval: String,
    /// Which snapshots stay.
    pub retention: SnapshotScheduleRetention,
    /// Begins the names of the snapshots; a time follows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length = 47)]
    pub name_prefix: Option<String>,
    /// Tags of the snapshots.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::tags::schema)]
    pub metadata: BTreeMap<String, String>,
}

/// The schedule of an instance. It outlives the instance while its snapshots exist.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotSchedule {
    /// The instance.
    pub instance_id: String,
    /// Time between two snapshots as a Go duration.
    #[schema(example = "1h0m0s")]
    pub interval: String,
    /// Which snapshots stay.
    pub retention: SnapshotScheduleRetention,
    /// Begins the names of the snapshots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name_prefix: Option<String>,
    /// Tags of the snapshots.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(schema_with = crate::tags::schema)]
    pub metadata: BTreeMap<String, String>,
    /// The next run.
    #[schema(value_type = String, format = DateTime)]
    pub next_run_at: Timestamp,
    /// The last run, whatever came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime, nullable = false)]
    pub last_run_at: Option<Timestamp>,
    /// What the last good run made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_snapshot_id: Option<String>,
    /// Why the last run failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub last_error: Option<String>,
    /// When it was set first.
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    /// When it was set last.
    #[schema(value_type = String, format = DateTime)]
    pub updated_at: Timestamp,
}

/// Of `POST /snapshots/import`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ImportSnapshotQuery {
    /// Name of the new snapshot; the one in the file when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(
        nullable = false,
        pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
        max_length = 63
    )]
    pub name: Option<String>,
}

/// Of `GET /snapshots`. The `tags[key]=value` filter is read separately.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ListSnapshotsQuery {
    /// Only snapshots of this kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false, inline)]
    pub kind: Option<SnapshotKind>,
    /// Only snapshots with this name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false)]
    pub name: Option<String>,
    /// Only snapshots of this instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false)]
    pub source_instance_id: Option<String>,
    /// At most so many, the newest first; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false, minimum = 1)]
    pub limit: Option<u32>,
    /// Id of the last snapshot of the page before: only older ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(nullable = false)]
    pub cursor: Option<String>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The example of the contract, field by field, with the `parent` that is ours.
    #[test]
    fn the_contracts_example_is_read_and_written_back() {
        let example = json!({
            "id": "q7z1w7l2af4l8y7q1h7g2m3s",
            "created_at": "2026-03-06T13:56:11Z",
            "kind": "Standby",
            "size_bytes": 104_857_600,
            "source_hypervisor": "cloud-hypervisor",
            "source_instance_id": "qilviffnqzck2jrim1x6s2b1",
            "source_instance_name": "nginx1",
            "compressed_size_bytes": 73_400_320,
            "compression": {"enabled": true, "algorithm": "zstd", "level": 1},
            "compression_error": "write compressed stream: no space left on device",
            "compression_state": "compressed",
            "name": "baseline-standby",
            "tags": {"team": "backend", "env": "staging"},
            "uncompressed_size_bytes": 4_294_967_296_i64,
            "parent": "aaaaaaaaaaaaaaaaaaaaaaaa"
        });
        let snapshot: Snapshot = serde_json::from_value(example.clone()).unwrap();
        assert_eq!(serde_json::to_value(&snapshot).unwrap(), example);
    }

    #[test]
    fn what_is_optional_is_left_out() {
        let bare = json!({
            "id": "q7z1w7l2af4l8y7q1h7g2m3s",
            "created_at": "2026-03-06T13:56:11Z",
            "kind": "Stopped",
            "size_bytes": 0,
            "source_hypervisor": "qemu-microvm",
            "source_instance_id": "qilviffnqzck2jrim1x6s2b1",
            "source_instance_name": "nginx1"
        });
        let snapshot: Snapshot = serde_json::from_value(bare.clone()).unwrap();
        assert_eq!(serde_json::to_value(&snapshot).unwrap(), bare);
    }

    #[test]
    fn forks_are_told_apart_by_their_answer() {
        let several = json!({"forks": [
            {"name": "web-1", "error": {"code": "name_conflict", "message": "taken"}},
        ]});
        let read: ForkResponse = serde_json::from_value(several.clone()).unwrap();
        assert!(matches!(&read, ForkResponse::Several(results) if results.forks.len() == 1));
        assert_eq!(serde_json::to_value(&read).unwrap(), several);
    }
}
