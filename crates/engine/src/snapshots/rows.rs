//! Snapshots in the metadata: what is committed here exists, nothing else does.

use std::collections::HashSet;
use std::sync::Arc;

use hypeman_store::{StoreError, snapshots};

use super::model::{Snapshot, SnapshotFilter, SnapshotRecord};
use crate::shared::Shared;
use crate::{EngineError, durable};

/// Commits a snapshot.
pub(super) async fn insert(shared: &Arc<Shared>, record: SnapshotRecord) -> Result<(), StoreError> {
    shared
        .store
        .write(move |connection| {
            let key = snapshots::Key {
                id: &record.id,
                source_instance_id: &record.source.id,
                name: record.name.as_deref(),
                kind: record.kind.as_str(),
                tags: &record.tags,
            };
            snapshots::insert(connection, &key, &record)
        })
        .await
}

/// Removes the row; `false` when somebody else did.
pub(super) async fn delete(shared: &Arc<Shared>, id: &str) -> Result<bool, EngineError> {
    let id = id.to_owned();
    let removed = shared
        .store
        .write(move |connection| snapshots::delete(connection, &id));
    Ok(removed.await?)
}

/// One snapshot, with the present state of its memory.
pub(super) fn get(shared: &Shared, id: &str) -> Result<Snapshot, EngineError> {
    let found: Option<SnapshotRecord> = shared.store.read(|connection| snapshots::get(connection, id))?;
    match found {
        Some(record) => Ok(shown(shared, record)),
        None => Err(EngineError::NotFound {
            kind: "snapshot",
            name: id.to_owned(),
        }),
    }
}

/// Snapshots that pass the filter, newest first.
pub(super) fn list(shared: &Shared, filter: &SnapshotFilter) -> Result<Vec<Snapshot>, EngineError> {
    let rows = shared.store.read(|connection| {
        let after = match &filter.cursor {
            Some(id) => match snapshots::position(connection, id)? {
                Some(position) => Some(position),
                None => return Ok(None),
            },
            None => None,
        };
        let wanted = snapshots::Filter {
            source_instance_id: filter.source_instance_id.clone(),
            name: filter.name.clone(),
            kind: filter.kind.map(|kind| kind.as_str().to_owned()),
            tags: filter.tags.clone(),
        };
        snapshots::list::<SnapshotRecord>(connection, &wanted, after, filter.limit).map(Some)
    })?;
    let rows = rows.ok_or_else(|| {
        EngineError::invalid(
            "invalid_cursor",
            "cursor is not the id of a snapshot of this list; start again without one",
        )
    })?;
    Ok(rows
        .into_iter()
        .map(|listed| shown(shared, listed.document))
        .collect())
}

fn shown(shared: &Shared, mut record: SnapshotRecord) -> Snapshot {
    if let Some(memory) = record.memory.as_mut() {
        memory.state = shared.vault.state(&memory.image);
    }
    Arc::new(record)
}

/// Part of the start: what rows hold is held again, what no row names is removed, compression goes on.
pub(crate) fn recover(shared: &Arc<Shared>) -> Result<(), EngineError> {
    let mut after = None;
    let mut known = HashSet::new();
    loop {
        let page = shared.store.read(|connection| {
            snapshots::list::<SnapshotRecord>(connection, &snapshots::Filter::default(), after, Some(1000))
        })?;
        let Some(last) = page.last() else { break };
        after = Some(last.position);
        for listed in page {
            let record = listed.document;
            shared.images.retain(&record.source.image_digest);
            if let Some(memory) = &record.memory {
                shared.vault.hold(&memory.image).keep();
                shared.vault.learn(&memory.image);
                shared.vault.want(memory, None, Some(&record.id));
            }
            known.insert(record.id);
        }
    }
    let sweep = || -> std::io::Result<()> {
        for entry in std::fs::read_dir(shared.layout.snapshots())? {
            let entry = entry?;
            if !entry
                .file_name()
                .to_str()
                .is_some_and(|name| known.contains(name))
            {
                durable::remove_tree(&entry.path())?;
            }
        }
        Ok(())
    };
    if let Err(error) = sweep() {
        tracing::warn!(%error, "captures that never became snapshots were not removed");
    }
    Ok(())
}
