//! All snapshots of the server: listed without waiting for a disk.
//!
//! ```text
//!   filter ──► the shortest of its shelves (source, name, kind, each tag) ──► newest first, from the cursor down
//!               every shelf is sorted by position                        └── the other filters, one by one
//! ```
//!
//! Invariants:
//! - It holds what is committed: filled from the rows at the start, changed right after a commit and never before.
//!   What a client was told of is in it, what a client was told is gone is not.
//! - It answers as the rows would: the same snapshots in the same order.
//! - A list is of one instant. Locks are held for look-ups only, never over I/O.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, PoisonError, RwLock};

use super::model::{SnapshotFilter, SnapshotKind};
use super::summary::SnapshotSummary;

/// Snapshots with something in common, oldest first.
type Shelf = Vec<Arc<SnapshotSummary>>;

/// Found by its id.
#[derive(Debug)]
struct ById(Arc<SnapshotSummary>);

impl Borrow<str> for ById {
    fn borrow(&self) -> &str {
        &self.0.id
    }
}

impl Hash for ById {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (*self.0.id).hash(state);
    }
}

impl PartialEq for ById {
    fn eq(&self, other: &Self) -> bool {
        self.0.id == other.0.id
    }
}

impl Eq for ById {}

#[derive(Debug, Default)]
struct Index {
    all: Shelf,
    by_id: HashSet<ById>,
    by_source: HashMap<Box<str>, Shelf>,
    by_name: HashMap<Box<str>, Shelf>,
    by_kind: HashMap<SnapshotKind, Shelf>,
    /// Key, then value.
    by_tag: HashMap<Box<str>, HashMap<Box<str>, Shelf>>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct SnapshotTable {
    index: RwLock<Index>,
}

impl SnapshotTable {
    /// Adds a snapshot whose row is committed. One that is known already stays as it is.
    pub(crate) fn insert(&self, summary: SnapshotSummary) {
        let summary = Arc::new(summary);
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        if !index.by_id.insert(ById(Arc::clone(&summary))) {
            return;
        }
        put(&mut index.all, &summary);
        put(
            index.by_source.entry(summary.source_id.clone()).or_default(),
            &summary,
        );
        put(index.by_kind.entry(summary.kind).or_default(), &summary);
        if let Some(name) = &summary.name {
            put(index.by_name.entry(name.clone()).or_default(), &summary);
        }
        for (key, value) in &summary.tags {
            let values = index.by_tag.entry(key.clone()).or_default();
            put(values.entry(value.clone()).or_default(), &summary);
        }
    }

    /// Forgets a snapshot whose row is gone.
    pub(crate) fn remove(&self, id: &str) {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let Some(ById(summary)) = index.by_id.take(id) else {
            return;
        };
        take(&mut index.all, &summary);
        take_from(&mut index.by_source, &*summary.source_id, &summary);
        take_from(&mut index.by_kind, &summary.kind, &summary);
        if let Some(name) = &summary.name {
            take_from(&mut index.by_name, &**name, &summary);
        }
        for (key, value) in &summary.tags {
            if let Some(values) = index.by_tag.get_mut(key) {
                take_from(values, &**value, &summary);
                if values.is_empty() {
                    index.by_tag.remove(key);
                }
            }
        }
    }

    /// Where a snapshot is in the list.
    pub(crate) fn position(&self, id: &str) -> Option<i64> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        index.by_id.get(id).map(|known| known.0.position)
    }

    /// Snapshots that pass the filter, newest first: those `after` a position. The filter's cursor is not looked at.
    pub(crate) fn list(&self, filter: &SnapshotFilter, after: Option<i64>) -> Vec<Arc<SnapshotSummary>> {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        let Some(shelf) = index.shortest(filter) else {
            return Vec::new();
        };
        let end = match after {
            Some(after) => shelf.partition_point(|summary| summary.position < after),
            None => shelf.len(),
        };
        let limit = filter
            .limit
            .and_then(|limit| usize::try_from(limit).ok())
            .unwrap_or(usize::MAX);
        let passing = shelf
            .iter()
            .take(end)
            .rev()
            .filter(|summary| passes(summary, filter));
        passing.take(limit).cloned().collect()
    }
}

impl Index {
    /// The shortest shelf that has all that passes; `None` when nothing does.
    fn shortest(&self, filter: &SnapshotFilter) -> Option<&Shelf> {
        let mut shortest = &self.all;
        let columns = [
            filter.name.as_ref().map(|name| self.by_name.get(&**name)),
            filter
                .source_instance_id
                .as_ref()
                .map(|source| self.by_source.get(&**source)),
            filter.kind.as_ref().map(|kind| self.by_kind.get(kind)),
        ];
        let tags = filter
            .tags
            .iter()
            .map(|(key, value)| self.by_tag.get(&**key).and_then(|values| values.get(&**value)));
        for shelf in columns.into_iter().flatten().chain(tags) {
            let shelf = shelf?;
            if shelf.len() < shortest.len() {
                shortest = shelf;
            }
        }
        Some(shortest)
    }
}

fn passes(summary: &SnapshotSummary, filter: &SnapshotFilter) -> bool {
    let is = |wanted: &Option<String>, found: Option<&str>| {
        wanted.as_deref().is_none_or(|wanted| found == Some(wanted))
    };
    is(&filter.source_instance_id, Some(&summary.source_id))
        && is(&filter.name, summary.name.as_deref())
        && filter.kind.is_none_or(|kind| kind == summary.kind)
        && filter
            .tags
            .iter()
            .all(|(key, value)| summary.tag(key) == Some(value))
}

/// Nearly always at the end: two commits may arrive here the other way round.
fn put(shelf: &mut Shelf, summary: &Arc<SnapshotSummary>) {
    let place = match shelf.last() {
        Some(last) if last.position > summary.position => {
            shelf.partition_point(|other| other.position < summary.position)
        }
        _ => shelf.len(),
    };
    shelf.insert(place, Arc::clone(summary));
}

fn take(shelf: &mut Shelf, summary: &SnapshotSummary) {
    if let Ok(place) = shelf.binary_search_by_key(&summary.position, |other| other.position) {
        shelf.remove(place);
    }
}

/// The same for a shelf among others, which goes when it is empty.
fn take_from<K, Q>(shelves: &mut HashMap<K, Shelf>, key: &Q, summary: &SnapshotSummary)
where
    K: Borrow<Q> + Eq + Hash,
    Q: Eq + Hash + ?Sized,
{
    if let Some(shelf) = shelves.get_mut(key) {
        take(shelf, summary);
        if shelf.is_empty() {
            shelves.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
