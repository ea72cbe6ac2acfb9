use std::collections::BTreeMap;
use std::time::Duration;

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn noon() -> Timestamp {
    "2026-06-01T12:00:00Z".parse().unwrap()
}

fn due_at_noon() -> ScheduleRecord {
    ScheduleRecord {
        id: "first".into(),
        instance_id: "web".into(),
        request: ScheduleRequest {
            interval: HOUR,
            max_count: Some(1),
            max_age: None,
            name_prefix: None,
            metadata: BTreeMap::new(),
        },
        next_run_at: noon(),
        running_since: None,
        last_run_at: None,
        last_snapshot_id: Some("former".into()),
        last_error: None,
        created_at: noon() - HOUR,
        updated_at: noon() - HOUR,
    }
}

/// A store with one schedule in it.
struct Book {
    store: Store,
    _directory: tempfile::TempDir,
}

impl Book {
    async fn with(record: &ScheduleRecord) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let book = Self {
            store: Store::open(&directory.path().join("metadata.db")).unwrap(),
            _directory: directory,
        };
        book.write(record).await;
        book
    }

    async fn write(&self, record: &ScheduleRecord) {
        let record = record.clone();
        let written = self.store.write(move |connection| put(connection, &record));
        written.await.unwrap();
    }

    async fn delete(&self) {
        let deleted = self
            .store
            .write(|connection| schedules::delete(connection, "web"));
        assert!(deleted.await.unwrap());
    }

    fn read(&self) -> Option<ScheduleRecord> {
        let read: Result<_, StoreError> = self.store.read(|connection| schedules::get(connection, "web"));
        read.unwrap()
    }

    fn due(&self, now: Timestamp) -> Vec<ScheduleRecord> {
        let due: Result<_, StoreError> = self
            .store
            .read(|connection| schedules::due(connection, now.as_millisecond()));
        due.unwrap()
    }

    async fn begin(&self, seen: &ScheduleRecord, now: Timestamp) -> Option<ScheduleRecord> {
        begin(&self.store, seen.clone(), now).await.unwrap()
    }
}

#[tokio::test]
async fn what_a_client_does_before_a_run_begins_is_not_undone_by_it() {
    let seen = due_at_noon();
    let book = Book::with(&seen).await;
    let mut changed = seen.clone();
    changed.request.max_count = Some(9);
    book.write(&changed).await;
    assert_eq!(book.begin(&seen, noon()).await, None);
    assert_eq!(book.read(), Some(changed.clone()));
    book.delete().await;
    assert_eq!(book.begin(&changed, noon()).await, None);
    assert_eq!(book.read(), None);
}

#[tokio::test]
async fn what_a_client_does_during_a_run_is_not_undone_by_its_end() {
    let book = Book::with(&due_at_noon()).await;
    let begun = book.begin(&due_at_noon(), noon()).await.unwrap();
    let mut changed = begun.clone();
    changed.request.max_count = Some(9);
    book.write(&changed).await;
    note(&book.store, &begun, Ok("made".into())).await.unwrap();
    let noted = book.read().unwrap();
    assert_eq!(noted.request.max_count, Some(9));
    assert_eq!(
        (
            noted.running_since,
            noted.last_run_at,
            noted.last_snapshot_id.as_deref()
        ),
        (None, Some(noon()), Some("made"))
    );

    // Ended, and set anew: the outcome is that of another one.
    let begun = book.begin(&noted, noon()).await.unwrap();
    book.delete().await;
    note(&book.store, &begun, Ok("late".into())).await.unwrap();
    assert_eq!(book.read(), None);
    let anew = ScheduleRecord {
        id: "second".into(),
        ..due_at_noon()
    };
    book.write(&anew).await;
    note(&book.store, &begun, Ok("late".into())).await.unwrap();
    assert_eq!(book.read(), Some(anew));
}

#[tokio::test]
async fn a_failure_is_told_until_the_next_good_run() {
    let book = Book::with(&due_at_noon()).await;
    for (outcome, snapshot, error) in [
        (Err((None, "no room".to_owned())), "former", Some("no room")),
        (
            Err((Some("made".to_owned()), "not removed".to_owned())),
            "made",
            Some("not removed"),
        ),
        (Ok("good".to_owned()), "good", None),
    ] {
        let seen = book.read().unwrap();
        let begun = book.begin(&seen, noon()).await.unwrap();
        note(&book.store, &begun, outcome).await.unwrap();
        let noted = book.read().unwrap();
        assert_eq!(noted.last_snapshot_id.as_deref(), Some(snapshot));
        assert_eq!(noted.last_error.as_deref(), error);
    }
}

#[tokio::test]
async fn a_run_that_was_cut_is_due_until_it_is_over_and_what_was_missed_is_one_run() {
    let book = Book::with(&due_at_noon()).await;
    assert!(book.due(noon() - HOUR).is_empty());
    let begun = book.begin(&due_at_noon(), noon()).await.unwrap();
    assert!(begun.next_run_at >= noon() + HOUR);
    assert_eq!(
        book.due(noon()),
        std::slice::from_ref(&begun),
        "whatever becomes of the server"
    );
    // Run again a little later, it takes nothing from the next one.
    let soon = noon() + Duration::from_secs(600);
    let again = book.begin(&begun, soon).await.unwrap();
    assert_eq!(
        (again.next_run_at, again.running_since),
        (begun.next_run_at, Some(soon))
    );
    // A day later: one run for all that was missed.
    let late = noon() + 24 * HOUR;
    let last = book.begin(&again, late).await.unwrap();
    note(&book.store, &last, Ok("made".into())).await.unwrap();
    assert!(book.due(late).is_empty());
    assert_eq!(
        book.read().unwrap().next_run_at,
        schedule::next_run(late, HOUR, "web")
    );
}

#[tokio::test]
async fn a_clock_that_is_set_back_brings_near_what_it_had_put_off() {
    let mut astray = due_at_noon();
    astray.next_run_at = noon() + 10_000 * HOUR;
    let book = Book::with(&astray).await;
    bring_near(&book.store, noon()).await.unwrap();
    let near = schedule::next_run(noon(), HOUR, "web");
    assert_eq!(book.read().unwrap().next_run_at, near);
    assert_eq!(book.due(near).len(), 1);
    // What is near enough stays.
    bring_near(&book.store, noon() + HOUR).await.unwrap();
    assert_eq!(book.read().unwrap().next_run_at, near);
}

#[test]
fn a_schedule_of_an_earlier_server_keeps_its_snapshots() {
    let mut stored = serde_json::to_value(due_at_noon()).unwrap();
    let fields = stored.as_object_mut().unwrap();
    fields.remove("id").unwrap();
    fields.remove("running_since").unwrap();
    let read: ScheduleRecord = serde_json::from_value(stored).unwrap();
    assert_eq!((read.mark(), read.running_since), ("web", None));
    assert_eq!(due_at_noon().mark(), "first");
}
