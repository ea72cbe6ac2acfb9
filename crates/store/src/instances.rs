//! Instances: id, unique name, document.

use rusqlite::{Connection, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::StoreError;

/// Adds an instance.
///
/// # Errors
/// [`StoreError::Conflict`] when id or name exist.
pub fn insert(
    connection: &Connection,
    id: &str,
    name: &str,
    document: &impl Serialize,
) -> Result<(), StoreError> {
    connection
        .prepare_cached("INSERT INTO instances (id, name, document) VALUES (?1, ?2, ?3)")?
        .execute(params![id, name, encode(id, document)?])?;
    Ok(())
}

/// Replaces the document of an instance; one that is gone stays gone.
///
/// # Errors
/// The database fails.
pub fn update(connection: &Connection, id: &str, document: &impl Serialize) -> Result<(), StoreError> {
    connection
        .prepare_cached("UPDATE instances SET document = ?2 WHERE id = ?1")?
        .execute(params![id, encode(id, document)?])?;
    Ok(())
}

/// Removes an instance.
///
/// # Errors
/// The database fails.
pub fn delete(connection: &Connection, id: &str) -> Result<(), StoreError> {
    connection
        .prepare_cached("DELETE FROM instances WHERE id = ?1")?
        .execute([id])?;
    Ok(())
}

/// All instances.
///
/// # Errors
/// The database fails or a document does not parse.
pub fn all<T: DeserializeOwned>(connection: &Connection) -> Result<Vec<T>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT id, document FROM instances")?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(decode(&row.get::<_, String>(0)?, &row.get::<_, String>(1)?)?);
    }
    Ok(found)
}

pub(crate) fn encode(object: &str, document: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(document).map_err(|source| StoreError::Corrupt {
        object: object.into(),
        source,
    })
}

pub(crate) fn decode<T: DeserializeOwned>(object: &str, document: &str) -> Result<T, StoreError> {
    serde_json::from_str(document).map_err(|source| StoreError::Corrupt {
        object: object.into(),
        source,
    })
}
