//! The table answers what the database answers, after random commits and for random filters.

use hypeman_store::{Store, StoreError, snapshots};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::snapshots::SnapshotRecord;
use crate::snapshots::rows::key;

/// The rows and the table, changed together as the engine does.
struct Both {
    _directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    store: Store,
    table: SnapshotTable,
}

impl Both {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self {
            store: Store::open(&directory.path().join("metadata.db")).unwrap(),
            _directory: directory,
            runtime: tokio::runtime::Builder::new_current_thread().build().unwrap(),
            table: SnapshotTable::default(),
        }
    }

    /// Commits several at once; the table hears of them the other way round. Names that are taken are refused.
    fn insert(&self, records: Vec<SnapshotRecord>) {
        let committed = self.runtime.block_on(self.store.write(move |connection| {
            let mut committed = Vec::new();
            for record in records {
                match snapshots::insert(connection, &key(&record), &record) {
                    Ok(position) => committed.push(SnapshotSummary::new(position, &record)),
                    Err(StoreError::Conflict(_)) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(committed)
        }));
        for summary in committed.unwrap().into_iter().rev() {
            self.table.insert(summary);
        }
    }

    fn delete(&self, id: &str) {
        let row = id.to_owned();
        let deleted = self
            .store
            .write(move |connection| snapshots::delete(connection, &row));
        self.runtime.block_on(deleted).unwrap();
        self.table.remove(id);
    }

    /// What the database lists, as summaries.
    fn stored(&self, filter: &SnapshotFilter, after: Option<i64>) -> Vec<SnapshotSummary> {
        let wanted = snapshots::Filter {
            source_instance_id: filter.source_instance_id.clone(),
            name: filter.name.clone(),
            kind: filter.kind.map(|kind| kind.as_str().to_owned()),
            tags: filter.tags.clone(),
        };
        let rows = self
            .store
            .read(|connection| snapshots::list::<SnapshotRecord>(connection, &wanted, after, filter.limit))
            .unwrap();
        rows.iter()
            .map(|row| SnapshotSummary::new(row.position, &row.document))
            .collect()
    }

    fn listed(&self, filter: &SnapshotFilter, after: Option<i64>) -> Vec<SnapshotSummary> {
        let listed = self.table.list(filter, after);
        listed.iter().map(|summary| (**summary).clone()).collect()
    }
}

fn record(number: usize, traits: &Traits) -> SnapshotRecord {
    let memory = json!({"image": "m", "bytes": 4096, "compression": "Off", "agent_key": ""});
    let created_at = "2026-03-06T13:00:00Z";
    let state = hypeman_core::instance::InstanceState::Running;
    serde_json::from_value(json!({
        "id": number.to_string(), "name": traits.name, "kind": traits.kind, "tags": traits.tags,
        "created_at": created_at, "parent": null, "scheduled_for": null, "size_bytes": number,
        "memory": (traits.kind == SnapshotKind::Standby).then_some(memory),
        "disk_bytes": 0, "disk_digest": "", "manifest": "",
        "source": {
            "id": traits.source, "name": "web", "image": "nginx", "image_digest": "sha256:aa",
            "platform": "linux/amd64", "memory_bytes": 1 << 28, "hotplug_bytes": 0, "overlay_bytes": 0, "vcpus": 1,
            "disk_io_bytes_per_second": null, "environment": {}, "network": null, "hypervisor": "qemu",
            "entrypoint": null, "command": null, "tags": {}, "skip_kernel_headers": false,
            "skip_guest_agent": false, "created_at": created_at, "expires_at": null, "started_at": null,
            "stopped_at": null, "exit": null, "boot_artifacts": "x", "run": null,
            "phases": hypeman_core::instance::PhaseClock::start(state, created_at.parse().unwrap()),
        },
    }))
    .unwrap()
}

#[derive(Debug, Clone)]
struct Traits {
    source: String,
    name: Option<String>,
    kind: SnapshotKind,
    tags: std::collections::BTreeMap<String, String>,
}

#[derive(Debug, Clone)]
enum Step {
    Insert(Vec<Traits>),
    Delete(usize),
}

fn kinds() -> impl Strategy<Value = SnapshotKind> {
    prop_oneof![Just(SnapshotKind::Standby), Just(SnapshotKind::Stopped)]
}

fn tags() -> impl Strategy<Value = std::collections::BTreeMap<String, String>> {
    prop::collection::btree_map("[ab]", "[xy]", 0..3)
}

fn traits() -> impl Strategy<Value = Traits> {
    ("[pqr]", prop::option::of("[mn]"), kinds(), tags()).prop_map(|(source, name, kind, tags)| Traits {
        source,
        name,
        kind,
        tags,
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        2 => prop::collection::vec(traits(), 1..4).prop_map(Step::Insert),
        1 => (0usize..20).prop_map(Step::Delete),
    ];
    prop::collection::vec(step, 0..20)
}

fn filters() -> impl Strategy<Value = SnapshotFilter> {
    let limit = prop::option::of(1u32..5);
    (
        prop::option::of("[pqrs]"),
        prop::option::of("[mno]"),
        prop::option::of(kinds()),
        tags(),
        limit,
    )
        .prop_map(|(source_instance_id, name, kind, tags, limit)| SnapshotFilter {
            kind,
            name,
            source_instance_id,
            tags,
            limit,
            cursor: None,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_table_lists_what_the_database_lists(
        steps in steps(),
        filters in prop::collection::vec(filters(), 1..6),
    ) {
        let both = Both::new();
        let mut numbers = 0..;
        for step in steps {
            match step {
                Step::Insert(several) => {
                    let records = several.iter().zip(&mut numbers);
                    both.insert(records.map(|(traits, number)| record(number, traits)).collect());
                }
                Step::Delete(number) => both.delete(&number.to_string()),
            }
        }
        for filter in &filters {
            // From the top, then page by page to the end.
            let mut after = None;
            loop {
                let page = both.listed(filter, after);
                prop_assert_eq!(&page, &both.stored(filter, after), "{:?} after {:?}", filter, after);
                let Some(last) = page.last() else { break };
                prop_assert_eq!(both.table.position(&last.id), Some(last.position));
                after = Some(last.position);
            }
        }
    }

    #[test]
    fn what_comes_and_goes_leaves_nothing(several in prop::collection::vec(traits(), 1..10)) {
        let both = Both::new();
        let records = several.iter().enumerate();
        both.insert(records.map(|(number, traits)| record(number, traits)).collect());
        for number in 0..several.len() {
            both.delete(&number.to_string());
        }
        let index = both.table.index.read().unwrap();
        prop_assert!(index.all.is_empty() && index.by_id.is_empty() && index.by_kind.is_empty());
        prop_assert!(index.by_source.is_empty() && index.by_name.is_empty() && index.by_tag.is_empty());
    }
}
