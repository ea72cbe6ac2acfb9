//! Schedules of snapshots: requests checked, answers written.

use hypeman_api::error::code;
use hypeman_api::snapshot as api;
use hypeman_core::{InvalidValue, duration, schedule, tags};
use hypeman_engine::{ScheduleRecord, ScheduleRequest};

use super::compression::delay;
use crate::error::ApiResult;

/// A schedule, checked.
///
/// # Errors
/// 400 `invalid_request`, naming the field.
pub fn to_engine(request: api::SetSnapshotScheduleRequest) -> ApiResult<ScheduleRequest> {
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
pub fn to_api(record: ScheduleRecord) -> api::SnapshotSchedule {
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
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::super::samples::{body, code_of};
    use super::*;

    #[test]
    fn schedules_are_checked_and_echoed() {
        let ok = json!({
            "interval": "90m", "retention": {"max_count": 3, "max_age": "168h"}, "name_prefix": "nightly",
            "metadata": {"by": "schedule"}
        });
        let request = to_engine(body(ok)).unwrap();
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
                code_of(to_engine(body(wrong.clone()))),
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
            serde_json::to_value(to_api(record)).unwrap(),
            json!({
                "instance_id": "i", "interval": "1h30m0s", "retention": {"max_count": 3, "max_age": "168h0m0s"},
                "name_prefix": "nightly", "metadata": {"by": "schedule"}, "next_run_at": "2026-06-01T00:00:00Z",
                "created_at": "2026-06-01T00:00:00Z", "updated_at": "2026-06-01T00:00:00Z"
            })
        );
    }
}
