//! Snapshots, their policies and schedules: requests checked and answers written as the contract wants them.

use std::time::Duration;

use hypeman_api::error::code;
use hypeman_api::instance::Instance;
use hypeman_api::policy::{CompressionAlgorithm, SnapshotCompressionConfig, SnapshotPolicy};
use hypeman_api::snapshot as api;
use hypeman_core::instance::InstanceState;
use hypeman_core::snapshot::{
    Algorithm, CompressionChoice, MAX_FORKS, SnapshotKind, choose_compression, fork_names,
};
use hypeman_core::{InvalidValue, duration, name, schedule, tags};
use hypeman_engine::{
    CompressionState, ForkRequest, RestoreRequest, ScheduleRecord, ScheduleRequest, SnapshotFilter,
    SnapshotRecord, SnapshotRequest, SnapshotUsage, StandbyRequest, VerifyOutcome, VerifyProgress,
};

use super::instance::{hypervisor_to_api, hypervisor_to_engine};
use crate::error::{ApiError, ApiResult};

/// Bounds of a level in the document, whatever the algorithm.
const LEVELS: std::ops::RangeInclusive<i32> = 0..=19;

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
        compression: memory.and_then(|memory| compression_of(memory.compression, &memory.state)),
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

fn target_to_core(target: api::SnapshotTargetState) -> InstanceState {
    match target {
        api::SnapshotTargetState::Stopped => InstanceState::Stopped,
        api::SnapshotTargetState::Standby => InstanceState::Standby,
        api::SnapshotTargetState::Running => InstanceState::Running,
    }
}

fn algorithm_to_api(algorithm: Algorithm) -> CompressionAlgorithm {
    match algorithm {
        Algorithm::Zstd => CompressionAlgorithm::Zstd,
        Algorithm::Lz4 => CompressionAlgorithm::Lz4,
    }
}

/// The compression of captured memory, where it is wanted. Snapshots that share memory share its compression: once it
/// is done, what was done is told.
pub(super) fn compression_of(
    choice: CompressionChoice,
    state: &CompressionState,
) -> Option<SnapshotCompressionConfig> {
    let CompressionChoice::On {
        algorithm: wanted, ..
    } = choice
    else {
        return None;
    };
    let mut told = compression_to_api(choice);
    if let CompressionState::Compressed {
        algorithm: Some(used),
        ..
    } = state
        && *used != wanted
    {
        told.algorithm = Some(algorithm_to_api(*used));
        // The level of another's wish is not kept.
        told.level = None;
    }
    Some(told)
}

pub(super) fn compression_to_api(choice: CompressionChoice) -> SnapshotCompressionConfig {
    match choice {
        CompressionChoice::Off => SnapshotCompressionConfig {
            enabled: false,
            algorithm: None,
            level: None,
        },
        CompressionChoice::On { algorithm, level } => SnapshotCompressionConfig {
            enabled: true,
            algorithm: Some(algorithm_to_api(algorithm)),
            level: Some(i32::from(level)),
        },
    }
}

fn compression(config: &SnapshotCompressionConfig) -> Result<CompressionChoice, InvalidValue> {
    if let Some(level) = config.level.filter(|level| !LEVELS.contains(level)) {
        let message = format!("a level is 0 to 19, not {level}");
        return Err(
            InvalidValue::new(code::INVALID_SNAPSHOT_COMPRESSION, message).in_field("compression.level")
        );
    }
    let algorithm = config.algorithm.map(|algorithm| match algorithm {
        CompressionAlgorithm::Zstd => Algorithm::Zstd,
        CompressionAlgorithm::Lz4 => Algorithm::Lz4,
    });
    CompressionChoice::new(config.enabled, algorithm, config.level.map(i64::from))
}

fn delay(text: Option<&str>) -> Result<Option<Duration>, InvalidValue> {
    text.filter(|text| !text.is_empty())
        .map(duration::parse_non_negative)
        .transpose()
}

/// The policy of a new instance, checked.
///
/// # Errors
/// 400 `invalid_snapshot_policy`.
pub fn policy(policy: Option<&SnapshotPolicy>) -> ApiResult<Option<hypeman_engine::SnapshotPolicy>> {
    let Some(policy) = policy else { return Ok(None) };
    let refuse = |error: InvalidValue, field: &str| {
        ApiError::from(
            error
                .in_field(format!("snapshot_policy.{field}"))
                .with_code(code::INVALID_SNAPSHOT_POLICY),
        )
    };
    Ok(Some(hypeman_engine::SnapshotPolicy {
        compression: policy
            .compression
            .as_ref()
            .map(compression)
            .transpose()
            .map_err(|error| refuse(error, "compression"))?,
        standby_compression_delay: delay(policy.standby_compression_delay.as_deref())
            .map_err(|error| refuse(error, "standby_compression_delay"))?,
    }))
}

/// The policy of an instance as clients see it.
#[must_use]
pub fn policy_to_api(policy: hypeman_engine::SnapshotPolicy) -> SnapshotPolicy {
    SnapshotPolicy {
        compression: policy.compression.map(compression_to_api),
        standby_compression_delay: policy.standby_compression_delay.map(duration::format),
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
    let compression = request.compression.as_ref().map(compression).transpose()?;
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
        compression: request.compression.as_ref().map(compression).transpose()?,
        compression_delay: delay(request.compression_delay.as_deref()).map_err(|error| {
            error
                .in_field("compression_delay")
                .with_code(code::INVALID_COMPRESSION_DELAY)
        })?,
    })
}

/// A request to restore a snapshot in place.
#[must_use]
pub fn restore(request: api::RestoreSnapshotRequest) -> RestoreRequest {
    RestoreRequest {
        target_state: request.target_state.map(target_to_core),
        target_hypervisor: request.target_hypervisor.map(hypervisor_to_engine),
    }
}

/// A request to fork an instance, checked.
///
/// # Errors
/// 400 for a name or a count that cannot be.
pub fn fork_instance(request: api::ForkInstanceRequest) -> ApiResult<ForkRequest> {
    Ok(ForkRequest {
        count: forks(&request.name, request.count)?,
        name: request.name,
        from_running: request.from_running.unwrap_or(false),
        target_state: request.target_state.map(target_to_core),
        target_hypervisor: None,
    })
}

/// A request to fork a snapshot, checked.
///
/// # Errors
/// 400 for a name or a count that cannot be.
pub fn fork_snapshot(request: api::ForkSnapshotRequest) -> ApiResult<ForkRequest> {
    Ok(ForkRequest {
        count: forks(&request.name, request.count)?,
        name: request.name,
        from_running: false,
        target_state: request.target_state.map(target_to_core),
        target_hypervisor: request.target_hypervisor.map(hypervisor_to_engine),
    })
}

fn forks(base: &str, count: Option<u32>) -> ApiResult<u32> {
    name::check(base).map_err(|error| ApiError::schema(error.message))?;
    let count = count.unwrap_or(1);
    if !(1..=MAX_FORKS).contains(&count) {
        return Err(ApiError::schema(format!("count must be 1 to {MAX_FORKS}")));
    }
    fork_names(base, count)?;
    Ok(count)
}

/// What became of one of several forks.
#[must_use]
pub fn fork_result(name: String, result: Result<Instance, ApiError>) -> api::ForkResult {
    let (instance, error) = match result {
        Ok(instance) => (Some(instance), None),
        Err(error) => (None, Some(error.into_body())),
    };
    api::ForkResult {
        name,
        instance,
        error,
    }
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

/// A schedule, checked.
///
/// # Errors
/// 400 `invalid_request`, naming the field.
pub fn schedule(request: api::SetSnapshotScheduleRequest) -> ApiResult<ScheduleRequest> {
    let wrong = |error: InvalidValue, field: &str| error.in_field(field).with_code(code::INVALID_REQUEST);
    let interval =
        duration::parse_non_negative(&request.interval).map_err(|error| wrong(error, "interval"))?;
    let max_age =
        delay(request.retention.max_age.as_deref()).map_err(|error| wrong(error, "retention.max_age"))?;
    let max_count = request.retention.max_count;
    let name_prefix = request.name_prefix.filter(|prefix| !prefix.is_empty());
    let retention = schedule::Retention { max_count, max_age };
    schedule::check(interval, retention, name_prefix.as_deref())?;
    tags::check(&request.metadata).map_err(|error| wrong(error, "metadata"))?;
    Ok(ScheduleRequest {
        interval,
        max_count,
        max_age,
        name_prefix,
        metadata: request.metadata,
    })
}

/// A schedule as clients see it.
#[must_use]
pub fn schedule_to_api(record: ScheduleRecord) -> api::SnapshotSchedule {
    api::SnapshotSchedule {
        instance_id: record.instance_id,
        interval: duration::format(record.request.interval),
        retention: api::SnapshotScheduleRetention {
            max_count: record.request.max_count,
            max_age: record.request.max_age.map(duration::format),
        },
        name_prefix: record.request.name_prefix,
        metadata: record.request.metadata,
        next_run_at: record.next_run_at,
        last_run_at: record.last_run_at,
        last_snapshot_id: record.last_snapshot_id,
        last_error: record.last_error,
        created_at: record.created_at,
        updated_at: record.updated_at,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use serde::de::DeserializeOwned;
    use serde_json::{Value, json};

    use super::*;

    fn body<T: DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    fn code_of<T: std::fmt::Debug>(result: ApiResult<T>) -> String {
        result.unwrap_err().code().to_owned()
    }

    pub(in crate::convert) fn record(memory: Value) -> SnapshotRecord {
        let source = json!({
            "id": "qilviffnqzck2jrim1x6s2b1", "name": "nginx1", "image": "docker.io/library/nginx:latest",
            "image_digest": "sha256:aa", "platform": "linux/amd64", "memory_bytes": 1 << 30, "hotplug_bytes": 0,
            "overlay_bytes": 1 << 30, "vcpus": 1, "disk_io_bytes_per_second": null, "environment": {},
            "network": null, "hypervisor": "qemu-microvm", "entrypoint": null, "command": null, "tags": {},
            "skip_kernel_headers": false, "skip_guest_agent": false, "created_at": "2026-03-06T13:00:00Z",
            "expires_at": null, "started_at": null, "stopped_at": null, "exit": null,
            "phases": hypeman_core::instance::PhaseClock::start(InstanceState::Running, "2026-03-06T13:00:00Z".parse().unwrap()),
            "boot_artifacts": "x", "run": null
        });
        body(json!({
            "id": "q7z1w7l2af4l8y7q1h7g2m3s", "name": "baseline", "kind": if memory.is_null() { "Stopped" } else { "Standby" },
            "tags": {"team": "backend"}, "created_at": "2026-03-06T13:56:11Z", "source": source,
            "parent": null, "scheduled_for": null, "size_bytes": 104_857_600, "memory": memory,
            "disk_bytes": 1000, "disk_digest": "00", "manifest": "00"
        }))
    }

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
    fn compression_is_checked_with_the_code_of_its_request() {
        for compression in [
            json!({"enabled": true, "algorithm": "zstd", "level": 0}),
            json!({"enabled": true, "algorithm": "lz4", "level": 10}),
            json!({"enabled": true, "level": 20}),
            json!({"enabled": false, "level": -1}),
        ] {
            let snapshot = create(body(json!({"kind": "Standby", "compression": compression})));
            assert_eq!(code_of(snapshot), "invalid_snapshot_compression", "{compression}");
            let suspended = standby(&body(json!({"compression": compression})));
            assert_eq!(
                code_of(suspended),
                "invalid_snapshot_compression",
                "{compression}"
            );
            let kept = policy(Some(&body(json!({"compression": compression}))));
            assert_eq!(code_of(kept), "invalid_snapshot_policy", "{compression}");
        }
        let stopped = json!({"kind": "Stopped", "compression": {"enabled": true}});
        assert_eq!(code_of(create(body(stopped))), "invalid_snapshot_compression");
        let off =
            json!({"kind": "Stopped", "compression": {"enabled": false, "algorithm": "lz4", "level": 19}});
        assert_eq!(
            create(body(off)).unwrap().compression,
            Some(CompressionChoice::Off)
        );
    }

    #[test]
    fn delays_are_go_durations() {
        let delayed = |text: &str| standby(&body(json!({"compression_delay": text})));
        assert_eq!(
            delayed("1m30s").unwrap().compression_delay,
            Some(Duration::from_secs(90))
        );
        assert_eq!(delayed("").unwrap().compression_delay, None);
        for text in ["soon", "-1s", "5"] {
            assert_eq!(code_of(delayed(text)), "invalid_compression_delay", "{text}");
            let kept = policy(Some(&body(json!({"standby_compression_delay": text}))));
            assert_eq!(code_of(kept), "invalid_snapshot_policy", "{text}");
        }
    }

    #[test]
    fn a_policy_comes_back_complete() {
        let given = json!({"compression": {"enabled": true}, "standby_compression_delay": "90s"});
        let stored = policy(Some(&body(given))).unwrap().unwrap();
        assert_eq!(
            serde_json::to_value(policy_to_api(stored)).unwrap(),
            json!({
                "compression": {"enabled": true, "algorithm": "zstd", "level": 1},
                "standby_compression_delay": "1m30s"
            })
        );
        assert_eq!(policy(None).unwrap(), None);
    }

    #[test]
    fn names_and_counts_of_forks_are_checked() {
        let fork = |value: Value| fork_snapshot(body(value));
        assert_eq!(fork(json!({"name": "web"})).unwrap().count, 1);
        assert_eq!(fork(json!({"name": "web", "count": 100})).unwrap().count, 100);
        for (value, code) in [
            (json!({"name": "Web"}), "Bad Request"),
            (json!({"name": "web", "count": 0}), "Bad Request"),
            (json!({"name": "web", "count": 101}), "Bad Request"),
            (json!({"name": "a".repeat(63), "count": 2}), "invalid_request"),
        ] {
            assert_eq!(code_of(fork(value.clone())), code, "{value}");
        }
        let instance = fork_instance(body(json!({"name": "web", "target_state": "Standby"}))).unwrap();
        assert!(!instance.from_running);
        assert_eq!(instance.target_state, Some(InstanceState::Standby));
    }

    #[test]
    fn schedules_are_checked_and_echoed() {
        let ok = json!({
            "interval": "90m", "retention": {"max_count": 3, "max_age": "168h"}, "name_prefix": "nightly",
            "metadata": {"by": "schedule"}
        });
        let request = schedule(body(ok)).unwrap();
        assert_eq!(request.interval, Duration::from_secs(5400));
        for (change, value) in [
            ("interval", json!("59s")),
            ("interval", json!("often")),
            ("retention", json!({})),
            ("retention", json!({"max_count": 0})),
            ("retention", json!({"max_age": "old"})),
            ("name_prefix", json!("-bad")),
            ("name_prefix", json!("a".repeat(48))),
            ("metadata", json!({"": "x"})),
        ] {
            let mut wrong = json!({"interval": "1h", "retention": {"max_count": 1}});
            wrong[change] = value;
            assert_eq!(
                code_of(schedule(body(wrong.clone()))),
                "invalid_request",
                "{wrong}"
            );
        }
        let time: jiff::Timestamp = "2026-06-01T00:00:00Z".parse().unwrap();
        let record = ScheduleRecord {
            id: "ab12".into(),
            instance_id: "i".into(),
            request,
            next_run_at: time,
            running_since: None,
            last_run_at: None,
            last_snapshot_id: None,
            last_error: None,
            created_at: time,
            updated_at: time,
        };
        assert_eq!(
            serde_json::to_value(schedule_to_api(record)).unwrap(),
            json!({
                "instance_id": "i", "interval": "1h30m0s", "retention": {"max_count": 3, "max_age": "168h0m0s"},
                "name_prefix": "nightly", "metadata": {"by": "schedule"}, "next_run_at": "2026-06-01T00:00:00Z",
                "created_at": "2026-06-01T00:00:00Z", "updated_at": "2026-06-01T00:00:00Z"
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
