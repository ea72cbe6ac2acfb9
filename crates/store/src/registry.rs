//! The registry's repositories: manifests and tags. The bytes of a manifest are a blob elsewhere.

use rusqlite::{Connection, OptionalExtension, params};

use crate::StoreError;

/// A manifest of a repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// `sha256:…`
    pub digest: String,
    /// Media type under which it was pushed.
    pub media_type: String,
    /// Bytes.
    pub size: u64,
}

/// Adds a manifest and, if given, makes `tag` point to it.
///
/// # Errors
/// The database fails.
pub fn put(
    connection: &Connection,
    repository: &str,
    manifest: &Manifest,
    tag: Option<&str>,
) -> Result<(), StoreError> {
    connection
        .prepare_cached(
            "INSERT INTO registry_manifests (repository, digest, media_type, size) VALUES (?1, ?2, ?3, ?4)
             ON CONFLICT (repository, digest) DO UPDATE SET media_type = excluded.media_type",
        )?
        .execute(params![
            repository,
            manifest.digest,
            manifest.media_type,
            i64::try_from(manifest.size).unwrap_or(i64::MAX)
        ])?;
    if let Some(tag) = tag {
        connection
            .prepare_cached(
                "INSERT INTO registry_tags (repository, tag, digest) VALUES (?1, ?2, ?3)
                 ON CONFLICT (repository, tag) DO UPDATE SET digest = excluded.digest",
            )?
            .execute(params![repository, tag, manifest.digest])?;
    }
    Ok(())
}

/// Finds a manifest by digest.
///
/// # Errors
/// The database fails.
pub fn by_digest(
    connection: &Connection,
    repository: &str,
    digest: &str,
) -> Result<Option<Manifest>, StoreError> {
    Ok(connection
        .prepare_cached(
            "SELECT digest, media_type, size FROM registry_manifests WHERE repository = ?1 AND digest = ?2",
        )?
        .query_row(params![repository, digest], row_to_manifest)
        .optional()?)
}

/// Finds a manifest by tag.
///
/// # Errors
/// The database fails.
pub fn by_tag(connection: &Connection, repository: &str, tag: &str) -> Result<Option<Manifest>, StoreError> {
    Ok(connection
        .prepare_cached(
            "SELECT m.digest, m.media_type, m.size FROM registry_tags t
             JOIN registry_manifests m ON m.repository = t.repository AND m.digest = t.digest
             WHERE t.repository = ?1 AND t.tag = ?2",
        )?
        .query_row(params![repository, tag], row_to_manifest)
        .optional()?)
}

/// Removes a tag. `false` when there was none.
///
/// # Errors
/// The database fails.
pub fn delete_tag(connection: &Connection, repository: &str, tag: &str) -> Result<bool, StoreError> {
    let removed = connection
        .prepare_cached("DELETE FROM registry_tags WHERE repository = ?1 AND tag = ?2")?
        .execute(params![repository, tag])?;
    Ok(removed > 0)
}

/// Removes a manifest with all tags that point to it. `false` when there was none.
///
/// # Errors
/// The database fails.
pub fn delete_manifest(connection: &Connection, repository: &str, digest: &str) -> Result<bool, StoreError> {
    connection
        .prepare_cached("DELETE FROM registry_tags WHERE repository = ?1 AND digest = ?2")?
        .execute(params![repository, digest])?;
    let removed = connection
        .prepare_cached("DELETE FROM registry_manifests WHERE repository = ?1 AND digest = ?2")?
        .execute(params![repository, digest])?;
    Ok(removed > 0)
}

/// Whether any tag points to a manifest.
///
/// # Errors
/// The database fails.
pub fn has_tags(connection: &Connection, repository: &str, digest: &str) -> Result<bool, StoreError> {
    Ok(connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM registry_tags WHERE repository = ?1 AND digest = ?2)")?
        .query_row(params![repository, digest], |row| row.get(0))?)
}

/// The tags of a repository, sorted. `None` for a repository that holds nothing.
///
/// # Errors
/// The database fails.
pub fn tags(connection: &Connection, repository: &str) -> Result<Option<Vec<String>>, StoreError> {
    let mut statement =
        connection.prepare_cached("SELECT tag FROM registry_tags WHERE repository = ?1 ORDER BY tag")?;
    let tags: Vec<String> = statement
        .query_map([repository], |row| row.get(0))?
        .collect::<Result<_, _>>()?;
    if !tags.is_empty() {
        return Ok(Some(tags));
    }
    let known: bool = connection
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM registry_manifests WHERE repository = ?1)")?
        .query_row([repository], |row| row.get(0))?;
    Ok(known.then_some(tags))
}

/// Digests of all manifests in all repositories: roots for garbage collection.
///
/// # Errors
/// The database fails.
pub fn all_digests(connection: &Connection) -> Result<Vec<String>, StoreError> {
    let mut statement = connection.prepare_cached("SELECT DISTINCT digest FROM registry_manifests")?;
    let rows = statement.query_map([], |row| row.get(0))?;
    Ok(rows.collect::<Result<_, _>>()?)
}

fn row_to_manifest(row: &rusqlite::Row<'_>) -> rusqlite::Result<Manifest> {
    let size: i64 = row.get(2)?;
    Ok(Manifest {
        digest: row.get(0)?,
        media_type: row.get(1)?,
        size: u64::try_from(size).unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Store;

    #[tokio::test]
    async fn deleting_a_manifest_takes_its_tags_along() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("metadata.db")).unwrap();
        let manifest = Manifest {
            digest: "sha256:aa".into(),
            media_type: "m".into(),
            size: 7,
        };
        let stored = manifest.clone();
        store
            .write(move |c| put(c, "a/b/c", &stored, Some("latest")))
            .await
            .unwrap();
        assert_eq!(
            store.read(|c| by_tag(c, "a/b/c", "latest")).unwrap(),
            Some(manifest)
        );
        assert_eq!(
            store.read(|c| tags(c, "a/b/c")).unwrap(),
            Some(vec!["latest".to_owned()])
        );
        assert!(
            store
                .write(|c| delete_manifest(c, "a/b/c", "sha256:aa"))
                .await
                .unwrap()
        );
        assert_eq!(store.read(|c| by_tag(c, "a/b/c", "latest")).unwrap(), None);
        assert_eq!(store.read(|c| tags(c, "a/b/c")).unwrap(), None);
    }
}
