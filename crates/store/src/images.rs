//! Images: contents by digest, references that point to them.

use rusqlite::{Connection, OptionalExtension, params};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::StoreError;
use crate::instances::{decode, encode};

/// Adds or replaces the content of a digest.
///
/// # Errors
/// The database fails.
pub fn put_content(
    connection: &Connection,
    digest: &str,
    document: &impl Serialize,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "INSERT INTO image_contents (digest, document) VALUES (?1, ?2)
             ON CONFLICT (digest) DO UPDATE SET document = excluded.document",
        )?
        .execute(params![digest, encode(digest, document)?])?;
    Ok(())
}

/// Removes the content of a digest.
///
/// # Errors
/// [`StoreError::Conflict`] while a reference points to it.
pub fn delete_content(connection: &Connection, digest: &str) -> Result<(), StoreError> {
    connection
        .prepare_cached("DELETE FROM image_contents WHERE digest = ?1")?
        .execute([digest])?;
    Ok(())
}

/// All contents.
///
/// # Errors
/// The database fails or a document does not parse.
pub fn contents<T: DeserializeOwned>(connection: &Connection) -> Result<Vec<T>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT digest, document FROM image_contents")?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        found.push(decode(&row.get::<_, String>(0)?, &row.get::<_, String>(1)?)?);
    }
    Ok(found)
}

/// Makes `name` point to `digest`, now or again.
///
/// # Errors
/// The database fails, or the content does not exist.
pub fn put_reference(
    connection: &Connection,
    name: &str,
    digest: &str,
    document: &impl Serialize,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "INSERT INTO image_references (name, digest, document) VALUES (?1, ?2, ?3)
             ON CONFLICT (name) DO UPDATE SET digest = excluded.digest, document = excluded.document",
        )?
        .execute(params![name, digest, encode(name, document)?])?;
    Ok(())
}

/// Removes a reference.
///
/// # Errors
/// The database fails.
pub fn delete_reference(connection: &Connection, name: &str) -> Result<(), StoreError> {
    connection
        .prepare_cached("DELETE FROM image_references WHERE name = ?1")?
        .execute([name])?;
    Ok(())
}

/// All references with the digests that they point to.
///
/// # Errors
/// The database fails or a document does not parse.
pub fn references<T: DeserializeOwned>(
    connection: &Connection,
) -> Result<Vec<(String, String, T)>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT name, digest, document FROM image_references")?;
    let mut rows = statement.query([])?;
    let mut found = Vec::new();
    while let Some(row) = rows.next()? {
        let name: String = row.get(0)?;
        let document = decode(&name, &row.get::<_, String>(2)?)?;
        found.push((name, row.get(1)?, document));
    }
    Ok(found)
}

/// The digest that a reference points to in the stored state.
///
/// # Errors
/// The database fails.
pub fn reference_digest(connection: &Connection, name: &str) -> Result<Option<String>, StoreError> {
    Ok(connection
        .prepare_cached("SELECT digest FROM image_references WHERE name = ?1")?
        .query_row([name], |row| row.get(0))
        .optional()?)
}
