//! Snapshots in the metadata: what is committed here exists, nothing else does. The table in memory follows.

use std::collections::HashSet;
use std::sync::Arc;

use hypeman_store::{StoreError, snapshots};

use super::model::{CompressionState, Snapshot, SnapshotFilter, SnapshotRecord};
use super::summary::{ListedSnapshot, SnapshotSummary};
use crate::shared::Shared;
use crate::{EngineError, durable};

/// Commits a snapshot.
pub(super) async fn insert(shared: &Arc<Shared>, record: SnapshotRecord) -> Result<(), StoreError> {
    let writing = shared.store.write(move |connection| {
        let position = snapshots::insert(connection, &key(&record), &record)?;
        Ok::<_, StoreError>(SnapshotSummary::new(position, &record))
    });
    shared.snapshots.insert(writing.await?);
    Ok(())
}

/// What a record is found by.
pub(super) fn key(record: &SnapshotRecord) -> snapshots::Key<'_> {
    snapshots::Key {
        id: &record.id,
        source_instance_id: &record.source.id,
        name: record.name.as_deref(),
        kind: record.kind.as_str(),
        tags: &record.tags,
    }
}

/// Removes the row; `false` when somebody else did.
pub(super) async fn delete(shared: &Arc<Shared>, id: &str) -> Result<bool, EngineError> {
    let row = id.to_owned();
    let removed = shared
        .store
        .write(move |connection| snapshots::delete(connection, &row))
        .await?;
    shared.snapshots.remove(id);
    Ok(removed)
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
pub(super) fn list(shared: &Shared, filter: &SnapshotFilter) -> Result<Vec<ListedSnapshot>, EngineError> {
    let after = match &filter.cursor {
        None => None,
        Some(id) => Some(position(shared, id)?),
    };
    let listed = shared.snapshots.list(filter, after).into_iter();
    Ok(listed
        .map(|summary| ListedSnapshot {
            compression: match &summary.memory {
                Some(memory) => shared.vault.state(&memory.image),
                None => CompressionState::None,
            },
            summary,
        })
        .collect())
}

/// Where a list goes on. One that was deleted not too long ago still leads there.
fn position(shared: &Shared, id: &str) -> Result<i64, EngineError> {
    if let Some(position) = shared.snapshots.position(id) {
        return Ok(position);
    }
    let trace = shared
        .store
        .read(|connection| snapshots::position(connection, id))?;
    trace.ok_or_else(|| {
        EngineError::invalid(
            "invalid_cursor",
            "cursor is not the id of a snapshot of this list; start again without one",
        )
    })
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
    let mut summaries = Vec::new();
    loop {
        let page = shared.store.read(|connection| {
            snapshots::list::<SnapshotRecord>(connection, &snapshots::Filter::default(), after, Some(1000))
        })?;
        let Some(last) = page.last() else { break };
        after = Some(last.position);
        for listed in page {
            let record = listed.document;
            summaries.push(SnapshotSummary::new(listed.position, &record));
            shared.images.retain(&record.source.image_digest);
            if let Some(memory) = &record.memory {
                shared.vault.hold(&memory.image).keep();
                shared.vault.learn(&memory.image);
                shared.vault.want(memory, None, Some(&record.id));
            }
            known.insert(record.id);
        }
    }
    // Oldest first, as they came: each goes to the end of its shelves.
    for summary in summaries.into_iter().rev() {
        shared.snapshots.insert(summary);
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
