//! Snapshots: id, source, name, kind, tags, document; listed newest first.
//!
//! ```text
//!   filter ──► the shortest of its lists (source, name, kind, each tag) ──► rows by position ──► documents
//!               every list is an index sorted by position               └── the other filters, row by row
//! ```
//!
//! Invariants:
//! - A position is given once and grows with each insert; a list goes downwards from a position, so that what
//!   comes or goes meanwhile neither repeats nor hides anything else.
//! - No list reads the whole table, unless it shows the whole table.
//! - Source, name, kind and tags never change; only the document does.

mod query;

use std::collections::BTreeMap;

use rusqlite::{Connection, OptionalExtension, params, params_from_iter};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::StoreError;
use crate::instances::{decode, encode};

/// So many deleted snapshots still serve as cursors.
const TRACES: i64 = 10_000;

/// What a snapshot is found by.
#[derive(Debug, Clone, Copy)]
pub struct Key<'a> {
    /// Id.
    pub id: &'a str,
    /// Instance that it is of.
    pub source_instance_id: &'a str,
    /// Name, unique among the snapshots of the instance.
    pub name: Option<&'a str>,
    /// Kind.
    pub kind: &'a str,
    /// Tags.
    pub tags: &'a BTreeMap<String, String>,
}

/// Which snapshots a list shows. Everything is ANDed.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Only of this instance.
    pub source_instance_id: Option<String>,
    /// Only with this name.
    pub name: Option<String>,
    /// Only of this kind.
    pub kind: Option<String>,
    /// Only with these tags.
    pub tags: BTreeMap<String, String>,
}

/// A row of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed<T> {
    /// Where it is: pass the last one's to go on after it.
    pub position: i64,
    /// The document.
    pub document: T,
}

/// Adds a snapshot as the newest. Returns its position.
///
/// # Errors
/// [`StoreError::Conflict`] when the id exists, or the source has a snapshot of this name.
pub fn insert(connection: &Connection, key: &Key<'_>, document: &impl Serialize) -> Result<i64, StoreError> {
    connection
        .prepare_cached(
            "INSERT INTO snapshots (id, source_instance_id, name, kind, document) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute(params![
            key.id,
            key.source_instance_id,
            key.name,
            key.kind,
            encode(key.id, document)?
        ])?;
    let position = connection.last_insert_rowid();
    let mut tag =
        connection.prepare_cached("INSERT INTO snapshot_tags (key, value, position) VALUES (?1, ?2, ?3)")?;
    for (name, value) in key.tags {
        tag.execute(params![name, value, position])?;
    }
    Ok(position)
}

/// Replaces the document of a snapshot. `false` for one that is gone, which stays gone.
///
/// # Errors
/// The database fails.
pub fn update(connection: &Connection, id: &str, document: &impl Serialize) -> Result<bool, StoreError> {
    let changed = connection
        .prepare_cached("UPDATE snapshots SET document = ?2 WHERE id = ?1")?
        .execute(params![id, encode(id, document)?])?;
    Ok(changed > 0)
}

/// The document of a snapshot.
///
/// # Errors
/// The database fails or the document does not parse.
pub fn get<T: DeserializeOwned>(connection: &Connection, id: &str) -> Result<Option<T>, StoreError> {
    let found: Option<String> = connection
        .prepare_cached("SELECT document FROM snapshots WHERE id = ?1")?
        .query_row([id], |row| row.get(0))
        .optional()?;
    found.map(|document| decode(id, &document)).transpose()
}

/// Removes a snapshot. `false` when there was none.
///
/// # Errors
/// The database fails.
pub fn delete(connection: &Connection, id: &str) -> Result<bool, StoreError> {
    let position: Option<i64> = connection
        .prepare_cached("DELETE FROM snapshots WHERE id = ?1 RETURNING position")?
        .query_row([id], |row| row.get(0))
        .optional()?;
    let Some(position) = position else {
        return Ok(false);
    };
    connection
        .prepare_cached("INSERT INTO snapshot_traces (id, position) VALUES (?1, ?2)")?
        .execute(params![id, position])?;
    connection
        .prepare_cached("DELETE FROM snapshot_traces WHERE number <= ?1")?
        .execute([connection.last_insert_rowid() - TRACES])?;
    Ok(true)
}

/// Whether an instance has snapshots.
///
/// # Errors
/// The database fails.
pub fn any_of(connection: &Connection, source_instance_id: &str) -> Result<bool, StoreError> {
    Ok(connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM snapshots WHERE source_instance_id = ?1)")?
        .query_row([source_instance_id], |row| row.get(0))?)
}

/// Where a snapshot is in the list, or was before it was deleted not too long ago.
///
/// # Errors
/// The database fails.
pub fn position(connection: &Connection, id: &str) -> Result<Option<i64>, StoreError> {
    Ok(connection
        .prepare_cached(
            "SELECT position FROM snapshots WHERE id = ?1
             UNION ALL SELECT position FROM snapshot_traces WHERE id = ?1 LIMIT 1",
        )?
        .query_row([id], |row| row.get(0))
        .optional()?)
}

/// Snapshots, newest first: those `after` a position, at most `limit`.
///
/// A long list is better read in pieces, for other readers wait meanwhile.
///
/// # Errors
/// The database fails or a document does not parse.
pub fn list<T: DeserializeOwned>(
    connection: &Connection,
    filter: &Filter,
    after: Option<i64>,
    limit: Option<u32>,
) -> Result<Vec<Listed<T>>, StoreError> {
    let conditions = query::conditions(filter);
    let first = query::shortest(connection, &conditions)?;
    let (text, values) = query::select(&conditions, first, after, limit);
    let mut statement = connection.prepare_cached(&text)?;
    let mut rows = statement.query(params_from_iter(values))?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let position: i64 = row.get(0)?;
        // The document is large: it is read where it lies.
        let text = row.get_ref(1)?.as_str().map_err(rusqlite::Error::from)?;
        let document = match serde_json::from_str(text) {
            Ok(document) => document,
            Err(source) => {
                return Err(StoreError::Corrupt {
                    object: format!("snapshot at position {position}"),
                    source,
                });
            }
        };
        found.push(Listed { position, document });
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
