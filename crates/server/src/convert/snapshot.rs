//! Snapshots: requests for them checked and answers written as the contract wants them.

use hypeman_api::error::code;
use hypeman_api::snapshot as api;
use hypeman_core::snapshot::{CompressionChoice, SnapshotKind, choose_compression};
use hypeman_core::{name, tags};
use hypeman_engine::{
    CompressionState, SnapshotFilter, SnapshotRecord, SnapshotRequest, SnapshotUsage, StandbyRequest,
    VerifyOutcome, VerifyProgress,
};

use super::compression;
use super::instance::hypervisor_to_api;
use crate::error::{ApiError, ApiResult};

/// A snapshot as clients see it.
#[must_use]
pub fn to_api(record: &SnapshotRecord) -> api::Snapshot {
    let memory = record.memory.as_ref();
    let (state, error, compressed) = match memory.map(|memory| &memory.state) {
        None => (None, None, None),
        Some(CompressionState::None) => (Some(api::SnapshotCompressionState::None), None, None),
        Some(CompressionState::Compressing) => (Some(api::SnapshotCompressionState::Compressing), None, None),
        Some(CompressionState::Compressed { bytes, .. }) => {
            let compressed = api::SnapshotCompressionState::Compressed;
            (Some(compressed), None, Some(signed(*bytes)))
        }
        Some(CompressionState::Error { reason }) => {
            let failed = api::SnapshotCompressionState::Error;
            (Some(failed), Some(reason.clone()), None)
        }
    };
    api::Snapshot {
        id: record.id.clone(),
        name: record.name.clone(),
        kind: kind_to_api(record.kind),
        tags: record.tags.clone(),
        source_instance_id: record.source.id.clone(),
        source_instance_name: record.source.name.clone(),
        source_hypervisor: hypervisor_to_api(record.source.hypervisor),
        created_at: record.created_at,
        size_bytes: signed(record.size_bytes),
        compression: memory.and_then(|memory| compression::of_memory(memory.compression, &memory.state)),
        compression_state: state,
        compression_error: error,
        compressed_size_bytes: compressed,
        uncompressed_size_bytes: memory.map(|memory| signed(memory.bytes)),
        parent: record.parent.clone(),
    }
}

pub(super) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

pub(super) fn kind_to_api(kind: SnapshotKind) -> api::SnapshotKind {
    match kind {
        SnapshotKind::Standby => api::SnapshotKind::Standby,
        SnapshotKind::Stopped => api::SnapshotKind::Stopped,
    }
}

fn kind_to_core(kind: api::SnapshotKind) -> SnapshotKind {
    match kind {
        api::SnapshotKind::Standby => SnapshotKind::Standby,
        api::SnapshotKind::Stopped => SnapshotKind::Stopped,
    }
}
/// A request for a snapshot, checked.
///
/// # Errors
/// 400 with the code of the offending field.
pub fn create(request: api::CreateSnapshotRequest) -> ApiResult<SnapshotRequest> {
    if let Some(name) = &request.name {
        name::check(name).map_err(|error| ApiError::schema(error.message))?;
    }
    tags::check(&request.tags)?;
    let kind = kind_to_core(request.kind);
    let compression = request
        .compression
        .as_ref()
        .map(compression::choice)
        .transpose()?;
    choose_compression(kind, compression, None, CompressionChoice::Off)?;
    Ok(SnapshotRequest {
        kind,
        name: request.name,
        tags: request.tags,
        compression,
    })
}

/// A request for standby, checked.
///
/// # Errors
/// 400 with the code of the offending field.
pub fn standby(request: &api::StandbyInstanceRequest) -> ApiResult<StandbyRequest> {
    Ok(StandbyRequest {
        compression: request
            .compression
            .as_ref()
            .map(compression::choice)
            .transpose()?,
        compression_delay: compression::delay(request.compression_delay.as_deref()).map_err(|error| {
            error
                .in_field("compression_delay")
                .with_code(code::INVALID_COMPRESSION_DELAY)
        })?,
    })
}

/// A filter of snapshots, checked.
///
/// # Errors
/// 400 for a limit of 0.
pub fn filter(query: api::ListSnapshotsQuery, tags: tags::Tags) -> ApiResult<SnapshotFilter> {
    if query.limit == Some(0) {
        return Err(ApiError::schema("invalid query: limit must be at least 1"));
    }
    Ok(SnapshotFilter {
        kind: query.kind.map(kind_to_core),
        name: query.name,
        source_instance_id: query.source_instance_id,
        tags,
        limit: query.limit,
        cursor: query.cursor.filter(|cursor| !cursor.is_empty()),
    })
}

/// What a snapshot costs.
#[must_use]
pub fn usage_to_api(usage: SnapshotUsage) -> api::SnapshotUsage {
    api::SnapshotUsage {
        own_bytes: signed(usage.own_bytes),
        shared_bytes: signed(usage.shared_bytes),
        freed_by_delete_bytes: signed(usage.freed_by_delete_bytes),
    }
}

/// How far a verification is. It is only judged when it is over.
#[must_use]
pub fn verification_to_api(progress: VerifyProgress) -> api::SnapshotVerification {
    use api::VerificationState as State;
    let (mut damage, mut error, mut unchecked) = (None, None, None);
    let state = match progress.outcome {
        None => State::Running,
        Some(VerifyOutcome::Intact { unchecked: part }) => {
            unchecked = part;
            State::Intact
        }
        Some(VerifyOutcome::Damaged(part)) => {
            damage = Some(part);
            State::Damaged
        }
        Some(VerifyOutcome::Unreadable(reason)) => {
            error = Some(reason);
            State::Unreadable
        }
        Some(VerifyOutcome::Cancelled) => State::Cancelled,
    };
    api::SnapshotVerification {
        state,
        verified_bytes: signed(progress.verified_bytes),
        total_bytes: signed(progress.total_bytes),
        damage,
        error,
        unchecked,
    }
}

#[cfg(test)]
mod tests {
    use hypeman_core::snapshot::Algorithm;
    use serde_json::{Value, json};

    use super::super::samples::record;
    use super::*;

    fn shown(memory: Value, state: CompressionState) -> Value {
        let mut record = record(memory);
        if let Some(memory) = record.memory.as_mut() {
            memory.state = state;
        }
        serde_json::to_value(to_api(&record)).unwrap()
    }

    #[test]
    fn every_moment_of_compression_is_told() {
        let on = json!({"On": {"algorithm": "zstd", "level": 3}});
        let memory = |compression: &Value| json!({"image": "m", "bytes": 4096, "compression": compression, "agent_key": ""});
        let raw = shown(memory(&json!("Off")), CompressionState::None);
        assert_eq!(raw["compression_state"], "none");
        assert_eq!(raw["uncompressed_size_bytes"], 4096);
        assert_eq!(raw.get("compression"), None);
        let compressing = shown(memory(&on), CompressionState::Compressing);
        assert_eq!(compressing["compression_state"], "compressing");
        assert_eq!(
            compressing["compression"],
            json!({"enabled": true, "algorithm": "zstd", "level": 3})
        );
        assert_eq!(compressing.get("compressed_size_bytes"), None);
        let done = |algorithm| CompressionState::Compressed {
            bytes: 1024,
            algorithm,
        };
        let compressed = shown(memory(&on), done(Some(Algorithm::Zstd)));
        assert_eq!(compressed["compression_state"], "compressed");
        assert_eq!(compressed["compressed_size_bytes"], 1024);
        assert_eq!(compressed["compression"]["level"], 3);
        // Another snapshot of the same memory was faster.
        let shared = shown(memory(&on), done(Some(Algorithm::Lz4)));
        assert_eq!(
            shared["compression"],
            json!({"enabled": true, "algorithm": "lz4"})
        );
        assert_eq!(shown(memory(&on), done(None))["compression"]["algorithm"], "zstd");
        let reason = "no space left on device".to_owned();
        let failed = shown(memory(&on), CompressionState::Error { reason });
        assert_eq!(failed["compression_state"], "error");
        assert_eq!(failed["compression_error"], "no space left on device");
    }

    #[test]
    fn a_snapshot_without_memory_says_nothing_of_it() {
        assert_eq!(
            shown(Value::Null, CompressionState::None),
            json!({
                "id": "q7z1w7l2af4l8y7q1h7g2m3s", "name": "baseline", "kind": "Stopped",
                "tags": {"team": "backend"}, "created_at": "2026-03-06T13:56:11Z", "size_bytes": 104_857_600,
                "source_instance_id": "qilviffnqzck2jrim1x6s2b1", "source_instance_name": "nginx1",
                "source_hypervisor": "qemu-microvm"
            })
        );
    }

    #[test]
    fn a_verification_is_judged_when_it_is_over() {
        let at = |outcome| {
            verification_to_api(VerifyProgress {
                verified_bytes: 1,
                total_bytes: 2,
                outcome,
            })
        };
        let named = |part: &str| Some(part.to_owned());
        assert_eq!(at(None).state, api::VerificationState::Running);
        let intact = VerifyOutcome::Intact {
            unchecked: named("the root disk"),
        };
        let intact = at(Some(intact));
        assert_eq!(
            (intact.state, intact.damage, intact.unchecked),
            (api::VerificationState::Intact, None, named("the root disk"))
        );
        let damaged = at(Some(VerifyOutcome::Damaged("frame 3".into())));
        assert_eq!(
            (damaged.state, damaged.damage),
            (api::VerificationState::Damaged, named("frame 3"))
        );
        // A disk that fails is no proof against what lies on it.
        let unreadable = at(Some(VerifyOutcome::Unreadable("input/output error".into())));
        assert_eq!(
            (unreadable.state, unreadable.damage, unreadable.error),
            (
                api::VerificationState::Unreadable,
                None,
                named("input/output error")
            )
        );
        let cancelled = at(Some(VerifyOutcome::Cancelled));
        assert_eq!(cancelled.state, api::VerificationState::Cancelled);
    }
}
