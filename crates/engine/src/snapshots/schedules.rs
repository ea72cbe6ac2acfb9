//! Snapshots by the clock.
//!
//! ```text
//!  due ─► next run set, durably ─► capture by the instance's state ─► outcome noted ─► retention
//! ```
//!
//! The next run is committed before the capture: a crash in between costs one snapshot and never makes two. Runs
//! that were missed are not made up. A schedule outlives its instance until the last of its snapshots is gone.

use std::sync::Arc;

use hypeman_core::instance::InstanceState;
use hypeman_core::schedule::{self, Retention, Scheduled};
use hypeman_store::schedules;
use jiff::Timestamp;

use super::model::{ScheduleRecord, ScheduleRequest, SnapshotFilter, SnapshotKind, SnapshotRequest};
use crate::shared::Shared;
use crate::{Engine, EngineError, clock, faults};

fn not_found(instance: &str) -> EngineError {
    EngineError::NotFound {
        kind: "snapshot schedule of instance",
        name: instance.to_owned(),
    }
}

/// The schedule of an instance.
pub(super) fn get(shared: &Shared, instance: &str) -> Result<ScheduleRecord, EngineError> {
    let found: Option<ScheduleRecord> = shared
        .store
        .read(|connection| schedules::get(connection, instance))?;
    found.ok_or_else(|| not_found(instance))
}

/// Sets or changes it. The next run moves only with the interval.
pub(super) async fn set(
    shared: &Arc<Shared>,
    instance: &str,
    request: ScheduleRequest,
) -> Result<ScheduleRecord, EngineError> {
    let now = clock::now();
    let before = match get(shared, instance) {
        Ok(before) => Some(before),
        Err(EngineError::NotFound { .. }) => None,
        Err(error) => return Err(error),
    };
    let known = before
        .as_ref()
        .map(|before| (before.request.interval, before.next_run_at));
    let next_run_at = schedule::next_run_after_change(now, request.interval, instance, known);
    let record = match before {
        Some(before) => ScheduleRecord {
            request,
            next_run_at,
            updated_at: now,
            ..before
        },
        None => ScheduleRecord {
            instance_id: instance.to_owned(),
            request,
            next_run_at,
            last_run_at: None,
            last_snapshot_id: None,
            last_error: None,
            created_at: now,
            updated_at: now,
        },
    };
    put(shared, record.clone()).await?;
    Ok(record)
}

/// Ends it.
pub(super) async fn delete(shared: &Arc<Shared>, instance: &str) -> Result<(), EngineError> {
    let id = instance.to_owned();
    let removed = shared
        .store
        .write(move |connection| schedules::delete(connection, &id))
        .await?;
    if removed { Ok(()) } else { Err(not_found(instance)) }
}

async fn put(shared: &Arc<Shared>, record: ScheduleRecord) -> Result<(), EngineError> {
    let written = shared.store.write(move |connection| {
        let due = record.next_run_at.as_millisecond();
        schedules::put(connection, &record.instance_id, due, &record)
    });
    Ok(written.await?)
}

/// After an instance or one of its snapshots is gone: a schedule ends when neither is left.
pub(crate) async fn forget_orphan(shared: &Arc<Shared>, instance: &str) {
    if shared.table.get(instance).is_ok() {
        return;
    }
    let left = shared
        .store
        .read(|connection| hypeman_store::snapshots::any_of(connection, instance));
    if matches!(left, Ok(false)) {
        // Somebody may have ended it before.
        let _ = delete(shared, instance).await;
    }
}

/// Runs what is due, until the server closes.
pub(crate) async fn run_forever(engine: Arc<Engine>) {
    let shared = Arc::clone(engine.shared());
    loop {
        tokio::select! {
            () = shared.closing.cancelled() => return,
            () = tokio::time::sleep(clock::look_again()) => {}
        }
        let now = clock::now();
        let due = shared
            .store
            .read(|connection| schedules::due::<ScheduleRecord>(connection, now.as_millisecond()));
        match due {
            Ok(due) => {
                for record in due {
                    run(&engine, record, now).await;
                }
            }
            Err(error) => tracing::error!(%error, "schedules can't be read"),
        }
    }
}

async fn run(engine: &Engine, mut record: ScheduleRecord, now: Timestamp) {
    let shared = engine.shared();
    let instance = record.instance_id.clone();
    record.next_run_at = schedule::next_run(now, record.request.interval, &instance);
    if let Err(error) = put(shared, record.clone()).await {
        tracing::error!(instance, %error, "a scheduled run can't be recorded");
        return;
    }
    faults::point("schedule.recorded");
    let outcome = capture(engine, &record, now).await;
    faults::point("schedule.captured");
    record.last_run_at = Some(now);
    match outcome {
        Ok(snapshot) => {
            record.last_snapshot_id = Some(snapshot);
            record.last_error = retain(engine, &record, now)
                .await
                .err()
                .map(|error| format!("former snapshots were not removed: {error}"));
        }
        Err(error) => record.last_error = Some(error.to_string()),
    }
    // The client may have changed or ended it meanwhile: only the outcome is added.
    if let Ok(present) = get(shared, &instance) {
        let noted = ScheduleRecord {
            last_run_at: record.last_run_at,
            last_snapshot_id: record.last_snapshot_id,
            last_error: record.last_error,
            ..present
        };
        if let Err(error) = put(shared, noted).await {
            tracing::error!(instance, %error, "the outcome of a scheduled run can't be recorded");
        }
    }
}

async fn capture(engine: &Engine, record: &ScheduleRecord, now: Timestamp) -> Result<String, EngineError> {
    let state = engine.get_instance(&record.instance_id)?.state;
    let kind = match state {
        InstanceState::Running | InstanceState::Standby => SnapshotKind::Standby,
        InstanceState::Stopped => SnapshotKind::Stopped,
        other => {
            return Err(EngineError::InvalidState(format!(
                "the instance was {other}, neither running nor stopped nor in standby"
            )));
        }
    };
    let request = SnapshotRequest {
        kind,
        name: Some(schedule::snapshot_name(
            record.request.name_prefix.as_deref(),
            now,
        )),
        tags: record.request.metadata.clone(),
        compression: None,
    };
    let owner = Some(record.instance_id.clone());
    let snapshot = engine
        .capture_snapshot(&record.instance_id, request, owner)
        .await?;
    Ok(snapshot.id.clone())
}

/// Removes what the schedule's rules no longer keep.
async fn retain(engine: &Engine, record: &ScheduleRecord, now: Timestamp) -> Result<(), EngineError> {
    let filter = SnapshotFilter {
        source_instance_id: Some(record.instance_id.clone()),
        ..SnapshotFilter::default()
    };
    let mine: Vec<_> = engine
        .list_snapshots(filter)
        .await?
        .into_iter()
        .map(|listed| listed.summary)
        .filter(|snapshot| snapshot.scheduled)
        .collect();
    let listed: Vec<Scheduled<'_>> = mine
        .iter()
        .map(|snapshot| Scheduled {
            id: &snapshot.id,
            created_at: snapshot.created_at,
        })
        .collect();
    let rules = Retention {
        max_count: record.request.max_count,
        max_age: record.request.max_age,
    };
    for id in schedule::expired(rules, now, &listed) {
        match engine.delete_snapshot(id).await {
            Ok(()) | Err(EngineError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
