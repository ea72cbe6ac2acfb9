//! Snapshot schedules: one for an instance, found by when it is due.

use rusqlite::{Connection, OptionalExtension, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::StoreError;
use crate::instances::{decode, encode};

/// Adds or replaces the schedule of an instance. `next_run_at` is in milliseconds since 1970.
///
/// # Errors
/// The database fails.
pub fn put(
    connection: &Connection,
    instance_id: &str,
    next_run_at: i64,
    document: &impl Serialize,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "INSERT INTO schedules (instance_id, next_run_at, document) VALUES (?1, ?2, ?3)
             ON CONFLICT (instance_id) DO UPDATE SET next_run_at = excluded.next_run_at, document = excluded.document",
        )?
        .execute(params![instance_id, next_run_at, encode(instance_id, document)?])?;
    Ok(())
}

/// The schedule of an instance.
///
/// # Errors
/// The database fails or the document does not parse.
pub fn get<T: DeserializeOwned>(connection: &Connection, instance_id: &str) -> Result<Option<T>, StoreError> {
    let found: Option<String> = connection
        .prepare_cached("SELECT document FROM schedules WHERE instance_id = ?1")?
        .query_row([instance_id], |row| row.get(0))
        .optional()?;
    found.map(|document| decode(instance_id, &document)).transpose()
}

/// Removes the schedule of an instance. `false` when there was none.
///
/// # Errors
/// The database fails.
pub fn delete(connection: &Connection, instance_id: &str) -> Result<bool, StoreError> {
    let removed = connection
        .prepare_cached("DELETE FROM schedules WHERE instance_id = ?1")?
        .execute([instance_id])?;
    Ok(removed > 0)
}

/// Schedules due at `now` (milliseconds since 1970), the longest due first.
///
/// # Errors
/// The database fails or a document does not parse.
pub fn due<T: DeserializeOwned>(connection: &Connection, now: i64) -> Result<Vec<T>, StoreError> {
    let mut statement = connection.prepare_cached(
        "SELECT instance_id, document FROM schedules WHERE next_run_at <= ?1 ORDER BY next_run_at",
    )?;
    let mut rows = statement.query([now])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(decode(&row.get::<_, String>(0)?, &row.get::<_, String>(1)?)?);
    }
    Ok(found)
}

/// When the next schedule is due, milliseconds since 1970; `None` without schedules.
///
/// # Errors
/// The database fails.
pub fn next_due(connection: &Connection) -> Result<Option<i64>, StoreError> {
    Ok(connection
        .prepare_cached("SELECT min(next_run_at) FROM schedules")?
        .query_row([], |row| row.get(0))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;

    #[tokio::test]
    async fn schedules_are_found_by_instance_and_by_time() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("metadata.db")).unwrap();
        assert_eq!(store.read(next_due).unwrap(), None);
        store
            .write(|connection| {
                put(connection, "late", 300, &"late")?;
                put(connection, "early", 100, &"early")?;
                put(connection, "middle", 400, &"middle")?;
                put(connection, "middle", 200, &"middle again")
            })
            .await
            .unwrap();
        assert_eq!(store.read(next_due).unwrap(), Some(100));
        let due_at = |now| store.read(|connection| due::<String>(connection, now)).unwrap();
        assert!(due_at(99).is_empty());
        assert_eq!(due_at(200), ["early", "middle again"]);
        assert_eq!(due_at(i64::MAX).len(), 3);

        assert!(
            store
                .write(|connection| delete(connection, "early"))
                .await
                .unwrap()
        );
        assert!(
            !store
                .write(|connection| delete(connection, "early"))
                .await
                .unwrap()
        );
        let gone: Option<String> = store.read(|connection| get(connection, "early")).unwrap();
        assert_eq!(gone, None);
        let left: Option<String> = store.read(|connection| get(connection, "late")).unwrap();
        assert_eq!(left.as_deref(), Some("late"));
    }
}
