//! Compression of captured memory: as it is asked for, as an instance keeps it, as it is told.

use std::ops::RangeInclusive;
use std::time::Duration;

use hypeman_api::error::code;
use hypeman_api::policy::{CompressionAlgorithm, SnapshotCompressionConfig, SnapshotPolicy};
use hypeman_core::snapshot::{Algorithm, CompressionChoice};
use hypeman_core::{InvalidValue, duration};
use hypeman_engine::CompressionState;

use crate::error::{ApiError, ApiResult};

/// Bounds of a level in the document, whatever the algorithm.
const LEVELS: RangeInclusive<i32> = 0..=19;

fn algorithm_to_api(algorithm: Algorithm) -> CompressionAlgorithm {
    match algorithm {
        Algorithm::Zstd => CompressionAlgorithm::Zstd,
        Algorithm::Lz4 => CompressionAlgorithm::Lz4,
    }
}

/// The compression of captured memory, where it is wanted. Snapshots that share memory share its compression: once it
/// is done, what was done is told.
pub(super) fn of_memory(
    choice: CompressionChoice,
    state: &CompressionState,
) -> Option<SnapshotCompressionConfig> {
    let CompressionChoice::On {
        algorithm: wanted, ..
    } = choice
    else {
        return None;
    };
    let mut told = to_api(choice);
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

fn to_api(choice: CompressionChoice) -> SnapshotCompressionConfig {
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

/// What is asked for, checked.
pub(super) fn choice(config: &SnapshotCompressionConfig) -> Result<CompressionChoice, InvalidValue> {
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

/// A delay or an age that may be left out.
pub(super) fn delay(text: Option<&str>) -> Result<Option<Duration>, InvalidValue> {
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
            .map(choice)
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
        compression: policy.compression.map(to_api),
        standby_compression_delay: policy.standby_compression_delay.map(duration::format),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::samples::{body, code_of};
    use super::super::snapshot::{create, standby};
    use super::*;

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
}
