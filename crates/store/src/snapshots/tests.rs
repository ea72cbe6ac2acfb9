//! Lists agree with a plain filter over all rows, for random rows and filters, and never scan.

use proptest::prelude::*;

use super::*;
use crate::Store;

#[derive(Debug, Clone)]
struct Row {
    id: String,
    source: String,
    name: Option<String>,
    kind: &'static str,
    tags: BTreeMap<String, String>,
}

impl Row {
    fn key(&self) -> Key<'_> {
        Key {
            id: &self.id,
            source_instance_id: &self.source,
            name: self.name.as_deref(),
            kind: self.kind,
            tags: &self.tags,
        }
    }

    fn matches(&self, filter: &Filter) -> bool {
        filter
            .source_instance_id
            .as_ref()
            .is_none_or(|source| *source == self.source)
            && filter
                .name
                .as_ref()
                .is_none_or(|name| Some(name) == self.name.as_ref())
            && filter.kind.as_ref().is_none_or(|kind| kind == self.kind)
            && filter
                .tags
                .iter()
                .all(|(key, value)| self.tags.get(key) == Some(value))
    }
}

fn row(id: &str, source: &str, name: Option<&str>) -> Row {
    Row {
        id: id.into(),
        source: source.into(),
        name: name.map(str::to_owned),
        kind: "Standby",
        tags: BTreeMap::new(),
    }
}

fn store() -> (tempfile::TempDir, Store) {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("metadata.db")).unwrap();
    (directory, store)
}

async fn add(store: &Store, row: Row) -> Result<i64, StoreError> {
    store
        .write(move |connection| insert(connection, &row.key(), &row.id))
        .await
}

fn listed(store: &Store, filter: &Filter) -> Vec<String> {
    let rows = store
        .read(|connection| list::<String>(connection, filter, None, None))
        .unwrap();
    rows.into_iter().map(|row| row.document).collect()
}

#[tokio::test]
async fn a_name_is_taken_once_for_each_source() {
    let (_directory, store) = store();
    add(&store, row("a", "web", Some("nightly"))).await.unwrap();
    add(&store, row("b", "db", Some("nightly"))).await.unwrap();
    add(&store, row("c", "web", None)).await.unwrap();
    add(&store, row("d", "web", None)).await.unwrap();
    let twice = add(&store, row("e", "web", Some("nightly"))).await;
    assert!(matches!(twice, Err(StoreError::Conflict(_))), "{twice:?}");
    let same_id = add(&store, row("a", "db", None)).await;
    assert!(matches!(same_id, Err(StoreError::Conflict(_))), "{same_id:?}");
    assert_eq!(listed(&store, &Filter::default()), ["d", "c", "b", "a"]);
}

#[tokio::test]
async fn a_deleted_name_is_free_and_the_tags_are_gone() {
    let (_directory, store) = store();
    let mut tagged = row("a", "web", Some("nightly"));
    tagged.tags.insert("team".into(), "backend".into());
    let filter = Filter {
        tags: tagged.tags.clone(),
        ..Filter::default()
    };
    add(&store, tagged).await.unwrap();
    assert_eq!(listed(&store, &filter), ["a"]);
    assert!(store.read(|connection| any_of(connection, "web")).unwrap());
    assert!(store.write(|connection| delete(connection, "a")).await.unwrap());
    assert!(!store.write(|connection| delete(connection, "a")).await.unwrap());
    assert!(!store.read(|connection| any_of(connection, "web")).unwrap());
    assert!(listed(&store, &filter).is_empty());
    let tags: u32 = store
        .read(|connection| {
            Ok::<_, StoreError>(
                connection.query_row("SELECT count(*) FROM snapshot_tags", [], |row| row.get(0))?,
            )
        })
        .unwrap();
    assert_eq!(tags, 0);
    add(&store, row("b", "web", Some("nightly"))).await.unwrap();
}

#[tokio::test]
async fn a_document_changes_in_place_and_what_is_gone_stays_gone() {
    let (_directory, store) = store();
    add(&store, row("a", "web", None)).await.unwrap();
    add(&store, row("b", "web", None)).await.unwrap();
    let change = |id: &'static str| store.write(move |connection| update(connection, id, &"changed"));
    assert!(change("a").await.unwrap());
    assert!(!change("c").await.unwrap());
    assert_eq!(listed(&store, &Filter::default()), ["b", "changed"]);
    let read = |id| store.read(|connection| get::<String>(connection, id)).unwrap();
    assert_eq!(read("a").as_deref(), Some("changed"));
    assert_eq!(read("c"), None);
}

#[tokio::test]
async fn a_page_that_was_deleted_still_leads_to_the_next() {
    let (_directory, store) = store();
    for id in ["a", "b", "c", "d"] {
        add(&store, row(id, "web", None)).await.unwrap();
    }
    for id in ["d", "c"] {
        store
            .write(move |connection| delete(connection, id))
            .await
            .unwrap();
    }
    add(&store, row("e", "web", None)).await.unwrap();
    let next: Vec<String> = store
        .read(|connection| {
            let after = position(connection, "c")?;
            assert!(after.is_some());
            list(connection, &Filter::default(), after, Some(10))
        })
        .unwrap()
        .into_iter()
        .map(|row| row.document)
        .collect();
    assert_eq!(next, ["b", "a"]);
    assert_eq!(
        store.read(|connection| position(connection, "never")).unwrap(),
        None
    );
}

#[tokio::test]
async fn traces_of_deleted_snapshots_are_bounded() {
    let (_directory, store) = store();
    store
        .write(|connection| {
            for number in 0..TRACES + 5 {
                let row = row(&number.to_string(), "web", None);
                insert(connection, &row.key(), &())?;
                delete(connection, &row.id)?;
            }
            Ok::<_, StoreError>(())
        })
        .await
        .unwrap();
    let known = |id: &str| {
        store
            .read(|connection| position(connection, id))
            .unwrap()
            .is_some()
    };
    assert!(!known("4") && known("5"));
}

fn filters() -> impl Strategy<Value = Filter> {
    let text = |pattern: &'static str| prop::option::of(pattern);
    let tags = prop::collection::btree_map("[ab]", "[xy]", 0..3);
    (text("[pqr]"), text("[mn]"), text("Standby|Stopped"), tags).prop_map(
        |(source_instance_id, name, kind, tags)| Filter {
            source_instance_id,
            name,
            kind,
            tags,
        },
    )
}

fn rows() -> impl Strategy<Value = Vec<Row>> {
    let kind = prop_oneof![Just("Standby"), Just("Stopped")];
    let tags = prop::collection::btree_map("[ab]", "[xy]", 0..3);
    prop::collection::vec(("[pqr]", prop::option::of("[mn]"), kind, tags), 0..30).prop_map(|rows| {
        let mut taken = std::collections::BTreeSet::new();
        rows.into_iter()
            .enumerate()
            .map(|(number, (source, name, kind, tags))| Row {
                id: number.to_string(),
                name: name.filter(|name| taken.insert((source.clone(), name.clone()))),
                source,
                kind,
                tags,
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn lists_are_what_a_plain_filter_shows_page_by_page(
        rows in rows(),
        filter in filters(),
        limit in 1u32..5,
        deleted in prop::collection::vec(0usize..30, 0..5),
    ) {
        let (_directory, store) = store();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            for row in rows.clone() {
                add(&store, row).await.unwrap();
            }
            for number in &deleted {
                let id = number.to_string();
                store.write(move |connection| delete(connection, &id)).await.unwrap();
            }
        });
        let expected: Vec<String> = rows
            .iter()
            .enumerate()
            .rev()
            .filter(|(number, row)| !deleted.contains(number) && row.matches(&filter))
            .map(|(_, row)| row.id.clone())
            .collect();
        prop_assert_eq!(&listed(&store, &filter), &expected);

        let mut paged = Vec::new();
        let mut after = None;
        loop {
            let page: Vec<Listed<String>> =
                store.read(|connection| list(connection, &filter, after, Some(limit))).unwrap();
            let Some(last) = page.last() else { break };
            after = Some(last.position);
            paged.extend(page.into_iter().map(|row| row.document));
        }
        prop_assert_eq!(&paged, &expected);
    }

    #[test]
    fn no_list_reads_the_table_or_sorts(filter in filters()) {
        let (_directory, store) = store();
        let conditions = query::conditions(&filter);
        // Whichever condition leads, and none.
        let leaders = if conditions.is_empty() { vec![None] } else { (0..conditions.len()).map(Some).collect() };
        for leader in leaders {
            let (text, values) = query::select(&conditions, leader, Some(7), Some(100));
            let plan: Vec<String> = store
                .read(|connection| {
                    let mut statement = connection.prepare(&format!("EXPLAIN QUERY PLAN {text}"))?;
                    let rows = statement.query_map(params_from_iter(values), |row| row.get::<_, String>(3))?;
                    Ok::<_, StoreError>(rows.collect::<Result<_, _>>()?)
                })
                .unwrap();
            for step in &plan {
                prop_assert!(!step.starts_with("SCAN") && !step.contains("TEMP B-TREE"), "{}\n{:#?}", text, plan);
            }
            prop_assert!(plan.iter().any(|step| step.starts_with("SEARCH")), "{:#?}", plan);
        }
    }
}

#[tokio::test]
async fn the_rarest_condition_leads() {
    let (_directory, store) = store();
    store
        .write(|connection| {
            for number in 0..600 {
                let mut row = row(&number.to_string(), "web", None);
                row.tags.insert("env".into(), "prod".into());
                if number % 100 == 0 {
                    row.tags.insert("team".into(), "rare".into());
                }
                insert(connection, &row.key(), &row.id)?;
            }
            Ok::<_, StoreError>(())
        })
        .await
        .unwrap();
    let filter = Filter {
        source_instance_id: Some("web".into()),
        kind: Some("Standby".into()),
        tags: [("env", "prod"), ("team", "rare")]
            .map(|(key, value)| (key.into(), value.into()))
            .into(),
        ..Filter::default()
    };
    let conditions = query::conditions(&filter);
    let leader = store
        .read(|connection| query::shortest(connection, &conditions))
        .unwrap()
        .map(|number| conditions[number]);
    assert_eq!(leader, Some(query::Condition::Tag("team", "rare")));
    assert_eq!(listed(&store, &filter), ["500", "400", "300", "200", "100", "0"]);
}
