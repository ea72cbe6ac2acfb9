//! The operation journal: an entry exists exactly while an operation's intent is recorded and its outcome is not.

use rusqlite::{Connection, params};

use crate::StoreError;

/// An unfinished operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Number, ascending in the order of the intents.
    pub id: i64,
    /// Id of the object that it changes.
    pub subject: String,
    /// What was intended, as the engine wrote it (JSON).
    pub operation: String,
}

/// Records an intent. Goes into the same transaction as the state that it starts from.
///
/// It replaces an earlier intent of the subject, such as a stop by a delete, or a delete by its repetition: only
/// the last one would be carried out, and an operation that fails again and again must not fill the journal.
///
/// # Errors
/// The database fails.
pub fn begin(connection: &Connection, subject: &str, operation: &str) -> Result<i64, StoreError> {
    clear(connection, subject)?;
    connection
        .prepare_cached("INSERT INTO journal (subject, operation) VALUES (?1, ?2)")?
        .execute(params![subject, operation])?;
    Ok(connection.last_insert_rowid())
}

/// Removes all entries of a subject: its present state is what was wanted.
///
/// # Errors
/// The database fails.
pub fn clear(connection: &Connection, subject: &str) -> Result<(), StoreError> {
    connection
        .prepare_cached("DELETE FROM journal WHERE subject = ?1")?
        .execute([subject])?;
    Ok(())
}

/// All unfinished operations, oldest first.
///
/// # Errors
/// The database fails.
pub fn all(connection: &Connection) -> Result<Vec<Entry>, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT id, subject, operation FROM journal ORDER BY id")?;
    let rows = statement.query_map([], |row| {
        Ok(Entry {
            id: row.get(0)?,
            subject: row.get(1)?,
            operation: row.get(2)?,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}
