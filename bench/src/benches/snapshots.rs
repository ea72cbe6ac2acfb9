//! How long lists of a hundred thousand snapshots take: by source, by tag, a page, and whole; what they cost in memory.
//!
//! Two real snapshots, a Stopped one and a compressed Standby one, are taken by the API and their rows multiplied in the
//! store while the server is away. The multiplied ones share one memory image.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use hypeman_api::snapshot::Snapshot;
use hypeman_store::snapshots::{Filter, Key, Listed, insert, list};
use hypeman_store::{Store, StoreError};
use serde_json::{Value, json};

use super::memory::settled;
use super::seed::captured_instance;
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::load;
use crate::report::{Goal, Section};
use crate::server::{Server, call};
use crate::statistics::{Sample, milliseconds};

const STORED: usize = 100_000;
/// What they are copies of, in turns: one with memory, one without.
const MODELS: usize = 2;
/// Instances that they are of, and values of the tag that is filtered by: a hundred snapshots each.
const GROUPS: usize = STORED / 100;
/// Pace of the requests whose latency is judged.
const PACE: Duration = Duration::from_millis(20);

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let server = seeded(Server::start(context)?, section)?;
    let duration = Duration::from_secs(if context.quick { 3 } else { 20 });
    let source = format!("/snapshots?source_instance_id={}", group_id(7));
    for (name, path) in [
        ("by source, p99", source.as_str()),
        ("by tag, p99", "/snapshots?tags[group]=7"),
        (
            "by tag of all and kind, limit 100, p99",
            "/snapshots?tags[all]=yes&kind=Stopped&limit=100",
        ),
        ("unfiltered, limit 100, p99", "/snapshots?limit=100"),
    ] {
        let measured = load::run(server.address, &server.token, path, 1, duration, Some(PACE))?;
        let slowest = milliseconds(measured.latency.percentile(99.0));
        section.row(name, "ms", slowest, None, Goal::AtMost(5.0));
        section.note(format!(
            "{path}: {} requests, median {:.2} ms, {} bytes an answer",
            measured.latency.len(),
            milliseconds(measured.latency.median()),
            measured.bytes
        ));
    }
    whole(context, &server, section)
}

/// The whole list, against serialising the same objects.
fn whole(context: &Context, server: &Server, section: &mut Section) -> Result<()> {
    let rounds = context.repetitions(7, 3);
    let mut api = server.connect()?;
    let body = api.call("GET", "/snapshots", "", &[])?.body;
    let objects: Vec<Snapshot> = serde_json::from_slice(&body)?;
    let (mut ours, mut reference) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let began = Instant::now();
        let answer = api.count("/snapshots")?;
        ours.push(began.elapsed());
        if answer.length != body.len() {
            return Err(BenchError::Answer("the list changed meanwhile".into()));
        }
        let began = Instant::now();
        let written = serde_json::to_vec(&objects)?;
        reference.push(began.elapsed());
        if written.len() != body.len() {
            return Err(BenchError::Answer("the list is not what its objects are".into()));
        }
    }
    let [ours, reference] = [ours, reference].map(|runs| runs.into_iter().collect::<Sample>().median());
    section.row(
        "whole",
        "ms",
        milliseconds(ours),
        Some(milliseconds(reference)),
        Goal::RatioAtMost(2.0),
    );
    section.note(format!(
        "whole: medians of {rounds}, {} snapshots, {} bytes; reference: serialising the same objects in memory",
        objects.len(),
        body.len()
    ));
    Ok(())
}

/// A server with [`STORED`] snapshots, and what they cost in its memory.
fn seeded(server: Server, section: &mut Section) -> Result<Server> {
    captured_instance(&server)?;
    // A server that has just started, with two and with many.
    let server = server.restart(|_| Ok(()))?;
    let (_, few) = settled(&server)?;
    let server = server.restart(multiply)?;
    let (_, many) = settled(&server)?;
    let each = (many as f64 - few as f64) / (STORED - MODELS) as f64;
    section.row("memory of each", "KiB", each, None, Goal::AtMost(1.5));
    let list = call(&mut server.connect()?, "GET", "/snapshots", None, 200)?;
    match list.as_array().map(Vec::len) {
        Some(STORED) => Ok(server),
        other => Err(BenchError::Answer(format!(
            "{other:?} snapshots instead of {STORED} after seeding"
        ))),
    }
}

fn group_id(group: usize) -> String {
    format!("c{group:023}")
}

fn multiply(database: &Path) -> Result<()> {
    let fail = |error: StoreError| BenchError::Answer(format!("the store refused the seeds: {error}"));
    let store = Store::open(database).map_err(fail)?;
    let rows: Vec<Listed<Value>> = store
        .read(|connection| list(connection, &Filter::default(), None, None))
        .map_err(fail)?;
    let models: Vec<Value> = rows.into_iter().map(|row| row.document).collect();
    if models.len() != MODELS {
        return Err(BenchError::Answer(format!(
            "{} snapshots to multiply instead of {MODELS}",
            models.len()
        )));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(|error| BenchError::io("start a runtime", error))?;
    let inserted = runtime.block_on(store.write(move |connection| {
        for number in MODELS..STORED {
            let mut record = models[number % MODELS].clone();
            let kind = record["kind"].as_str().unwrap_or_default().to_owned();
            let (id, source) = (format!("s{number:023}"), group_id(number % GROUPS));
            let name = format!("seed-{number}");
            let tags: BTreeMap<String, String> =
                [("group", (number % GROUPS).to_string()), ("all", "yes".into())]
                    .map(|(key, value)| (key.to_owned(), value))
                    .into();
            record["id"] = json!(id);
            record["name"] = json!(name);
            record["tags"] = json!(tags);
            record["source"]["id"] = json!(source);
            let key = Key {
                id: &id,
                source_instance_id: &source,
                name: Some(&name),
                kind: &kind,
                tags: &tags,
            };
            insert(connection, &key, &record)?;
        }
        Ok::<(), StoreError>(())
    }));
    inserted.map_err(fail)
}
