//! Snapshots by the clock.
//!
//! ```text
//!  due ─► next run and this one's begin, durably ─► capture by the instance's state ─► retention ─► outcome, durably
//!                     └── crash: made already? noted; not made? run again ──────────────────────────────┘
//! ```
//!
//! Invariants:
//! - A run that has begun makes one snapshot, whatever is cut; what was missed meanwhile is made up for by one run.
//! - What a client sets or ends is never undone by a run: records are changed as they are, not as they were.
//! - Only snapshots of this very schedule are retired: one that is set anew does not know those of its predecessor.
//!
//! A schedule outlives its instance until the last of its snapshots is gone.

use std::sync::Arc;

use hypeman_core::instance::InstanceState;
use hypeman_core::schedule::{self, Retention, Scheduled};
use hypeman_store::{Connection, Store, StoreError, schedules};
use jiff::Timestamp;

use super::model::{ScheduleRecord, ScheduleRequest, SnapshotFilter, SnapshotKind, SnapshotRequest};
use super::summary::SnapshotSummary;
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
    let fresh =
        crate::random::hex::<8>().map_err(|error| EngineError::io("random number of a schedule", error))?;
    let instance = instance.to_owned();
    let written = shared.store.write(move |connection| {
        let before: Option<ScheduleRecord> = schedules::get(connection, &instance)?;
        let known = before
            .as_ref()
            .map(|before| (before.request.interval, before.next_run_at));
        let next_run_at = schedule::next_run_after_change(now, request.interval, &instance, known);
        let record = match before {
            Some(before) => ScheduleRecord {
                request,
                next_run_at,
                updated_at: now,
                ..before
            },
            None => ScheduleRecord {
                id: fresh,
                instance_id: instance,
                request,
                next_run_at,
                running_since: None,
                last_run_at: None,
                last_snapshot_id: None,
                last_error: None,
                created_at: now,
                updated_at: now,
            },
        };
        put(connection, &record)?;
        Ok::<_, StoreError>(record)
    });
    Ok(written.await?)
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

/// Writes it. One with a run under way is due: it is looked at again until that run is over.
fn put(connection: &Connection, record: &ScheduleRecord) -> Result<(), StoreError> {
    let due = record.running_since.unwrap_or(record.next_run_at);
    schedules::put(connection, &record.instance_id, due.as_millisecond(), record)
}

/// Changes a schedule as it is when it is written; `None` when it is gone, or `change` wants nothing of what it is now.
async fn change(
    store: &Store,
    instance: &str,
    change: impl FnOnce(ScheduleRecord) -> Option<ScheduleRecord> + Send + 'static,
) -> Result<Option<ScheduleRecord>, StoreError> {
    let instance = instance.to_owned();
    let written = store.write(move |connection| {
        let present: Option<ScheduleRecord> = schedules::get(connection, &instance)?;
        let changed = present.and_then(change);
        if let Some(changed) = &changed {
            put(connection, changed)?;
        }
        Ok::<_, StoreError>(changed)
    });
    written.await
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
    // Nobody knows how the clock stood before.
    let mut last = Timestamp::MAX;
    loop {
        tokio::select! {
            () = shared.closing.cancelled() => return,
            () = tokio::time::sleep(clock::look_again()) => {}
        }
        let now = clock::now();
        if now < last
            && let Err(error) = bring_near(&shared.store, now).await
        {
            tracing::error!(%error, "schedules that were set by a wrong clock can't be set right");
        }
        last = now;
        let due = shared
            .store
            .read(|connection| schedules::due::<ScheduleRecord>(connection, now.as_millisecond()));
        match due {
            Ok(due) => {
                for record in due {
                    let instance = record.instance_id.clone();
                    if let Err(error) = run(&engine, record).await {
                        tracing::error!(instance, %error, "a scheduled run can't be recorded");
                    }
                }
            }
            Err(error) => tracing::error!(%error, "schedules can't be read"),
        }
    }
}

/// After the clock was set back: nothing waits longer than for its interval.
async fn bring_near(store: &Store, now: Timestamp) -> Result<(), StoreError> {
    let all = store.read(|connection| schedules::due::<ScheduleRecord>(connection, i64::MAX))?;
    for seen in all {
        let (instance, interval) = (seen.instance_id.clone(), seen.request.interval);
        let known = Some((interval, seen.next_run_at));
        let next_run_at = schedule::next_run_after_change(now, interval, &instance, known);
        if next_run_at != seen.next_run_at {
            let nearer = move |present: ScheduleRecord| {
                (present == seen).then_some(ScheduleRecord {
                    next_run_at,
                    ..present
                })
            };
            change(store, &instance, nearer).await?;
        }
    }
    Ok(())
}

async fn run(engine: &Engine, seen: ScheduleRecord) -> Result<(), EngineError> {
    let store = &engine.shared().store;
    let now = clock::now();
    if let Some(began) = seen.running_since {
        // A run that was cut. Its snapshot may be there already.
        let made = made_by(engine, &seen).await?;
        if let Some(snapshot) = made.iter().find(|snapshot| snapshot.created_at >= began) {
            let outcome = Ok(snapshot.id.to_string());
            return Ok(note(store, &seen, outcome).await?);
        }
    }
    let Some(record) = begin(store, seen, now).await? else {
        // Somebody changed it just now: it is looked at again.
        return Ok(());
    };
    faults::point("schedule.recorded");
    let outcome = match capture(engine, &record, now).await {
        Ok(snapshot) => {
            faults::point("schedule.captured");
            match retain(engine, &record, now).await {
                Ok(()) => Ok(snapshot),
                Err(error) => Err((
                    Some(snapshot),
                    format!("former snapshots were not removed: {error}"),
                )),
            }
        }
        // Left as it is: the next server runs it again.
        Err(EngineError::ShuttingDown) => return Ok(()),
        Err(error) => Err((None, error.to_string())),
    };
    Ok(note(store, &record, outcome).await?)
}

/// Records that a run begins, and when the next one will. `None` when the schedule is not what was seen of it.
async fn begin(
    store: &Store,
    seen: ScheduleRecord,
    now: Timestamp,
) -> Result<Option<ScheduleRecord>, StoreError> {
    let instance = seen.instance_id.clone();
    let begun = move |present: ScheduleRecord| {
        // One that was cut and is run again takes nothing from the next, unless that is due as well.
        let next_run_at = if present.next_run_at > now {
            present.next_run_at
        } else {
            schedule::next_run(now, present.request.interval, &present.instance_id)
        };
        (present == seen).then_some(ScheduleRecord {
            next_run_at,
            running_since: Some(now),
            ..present
        })
    };
    change(store, &instance, begun).await
}

/// What a run made, or why it did not go well and what it made all the same.
type Outcome = Result<String, (Option<String>, String)>;

/// Records what became of a run. The client may have changed the schedule meanwhile: only the outcome is added; of one
/// that it ended, or set anew, nothing is.
async fn note(store: &Store, begun: &ScheduleRecord, outcome: Outcome) -> Result<(), StoreError> {
    let (id, began) = (begun.id.clone(), begun.running_since);
    let noted = move |present: ScheduleRecord| {
        let (snapshot, error) = match outcome {
            Ok(snapshot) => (Some(snapshot), None),
            Err((snapshot, error)) => (snapshot, Some(error)),
        };
        (present.id == id && present.running_since == began).then_some(ScheduleRecord {
            running_since: None,
            last_run_at: began,
            last_snapshot_id: snapshot.or(present.last_snapshot_id),
            last_error: error,
            ..present
        })
    };
    change(store, &begun.instance_id, noted).await.map(drop)
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
    let schedule = Some(record.mark().to_owned());
    let snapshot = engine
        .capture_snapshot(&record.instance_id, request, schedule)
        .await?;
    Ok(snapshot.id.clone())
}

/// What a schedule has made and is still there, newest first.
async fn made_by(engine: &Engine, record: &ScheduleRecord) -> Result<Vec<Arc<SnapshotSummary>>, EngineError> {
    let filter = SnapshotFilter {
        source_instance_id: Some(record.instance_id.clone()),
        ..SnapshotFilter::default()
    };
    let listed = engine.list_snapshots(filter).await?.into_iter();
    Ok(listed
        .map(|listed| listed.summary)
        .filter(|snapshot| snapshot.schedule.as_deref() == Some(record.mark()))
        .collect())
}

/// Removes what the schedule's rules no longer keep: those rules that hold now.
async fn retain(engine: &Engine, begun: &ScheduleRecord, now: Timestamp) -> Result<(), EngineError> {
    let record = match get(engine.shared(), &begun.instance_id) {
        Ok(record) if record.id == begun.id => record,
        Ok(_) | Err(EngineError::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let made = made_by(engine, &record).await?;
    let made: Vec<Scheduled<'_>> = made
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
    for id in schedule::expired(rules, now, &made) {
        match engine.delete_snapshot(id).await {
            Ok(()) | Err(EngineError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
