//! Forks of a snapshot: one, many at once, one of compressed memory, and what an idle one costs.
//!
//! All of them are forks of one guest, which is booted once.

use std::time::{Duration, Instant};

use serde_json::json;

use super::in_each_place;
use super::kept::{Bench, TRUE};
use crate::calm::Calm;
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::guests::{self, MEBIBYTE, Shape};
use crate::load::pause;
use crate::remote;
use crate::report::{Goal, Section};
use crate::server::{call, delete};
use crate::statistics::Sample;

/// Forks at once.
const MANY: usize = 20;
/// What a fork does when it wakes up is over by then.
const IDLE: Duration = Duration::from_secs(1);

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let shapes = guests::chosen(context)?;
    in_each_place(context, section, |section, place| {
        let mut bench = Bench::new(context, place, &shapes)?;
        for shape in shapes.iter().copied() {
            if let Err(error) = rows(&mut bench, section, shape) {
                bench.stumbled(section, shape, &error)?;
            }
        }
        Ok(())
    })?;
    section.note(
        "from the call until /bin/true has run in each; reference: bare VMMs resumed from the same state, their disks \
         copied beforehand; a fork also gets another identity; memory of an idle fork: what no file backs, its VMM's own \
         included, a second after it has answered, reference: the guest's size",
    );
    match section.rows.is_empty() {
        false => Ok(()),
        true => Err(BenchError::Answer(section.notes.join("\n"))),
    }
}

fn rows(bench: &mut Bench<'_>, section: &mut Section, shape: Shape) -> Result<()> {
    let snapshot = bench.kept(shape)?;
    let raw = match one(bench, section, shape, &snapshot) {
        Ok(raw) => raw,
        Err(error) => {
            bench.stumbled(section, shape, &error)?;
            Sample::default()
        }
    };
    // A host on which so many do not come up still has something to say of one.
    if let Err(error) = many(bench, section, shape, &snapshot) {
        bench.stumbled(section, shape, &error)?;
    }
    framed(bench, section, shape, &snapshot, &raw)
}

/// One fork after the other; how long they took.
fn one(bench: &mut Bench<'_>, section: &mut Section, shape: Shape, snapshot: &str) -> Result<Sample> {
    let (mut ours, mut bare, mut calm) = (Vec::new(), Vec::new(), Calm::default());
    let mut memory = 0;
    let repetitions = bench.context.repetitions(11, 3);
    for round in 0..=repetitions {
        let took = fork_alone(
            bench,
            snapshot,
            shape,
            (round == repetitions).then_some(&mut memory),
        )?;
        let reference = bench.bare.of(&bench.server, snapshot)?.restore(1)?;
        if round > 0 {
            ours.push(took);
            bare.push(reference);
        }
        calm.look();
    }
    let [ours, bare] = [ours, bare].map(|runs| runs.into_iter().collect::<Sample>());
    let name = format!("one, {}{}", shape.name, bench.suffix);
    section.judged(&name, &ours, &bare, Goal::MoreByAtMost(25.0), &calm);
    memory_row(bench, section, "memory of an idle fork", shape, memory);
    Ok(ours)
}

/// Many at once, and what each of them costs while all are there.
fn many(bench: &mut Bench<'_>, section: &mut Section, shape: Shape, snapshot: &str) -> Result<()> {
    let (mut ours, mut bare, mut calm) = (Vec::new(), Vec::new(), Calm::default());
    let mut costs = (0, 0);
    for _ in 0..bench.context.few_repetitions() {
        let (took, ids) = fork(bench, snapshot, MANY)?;
        ours.push(took);
        pause(IDLE);
        costs = (0, 0);
        for id in &ids {
            let costs_of = guests::footprint(guests::vmm(&bench.server, id)?, shape.memory)?;
            costs.0 += costs_of.private / MANY as u64;
            costs.1 += costs_of.anonymous_guest / MANY as u64;
        }
        for id in ids {
            delete(&mut bench.api, &id)?;
        }
        bare.push(bench.bare.of(&bench.server, snapshot)?.restore(MANY)?);
        calm.look();
    }
    let [ours, bare] = [ours, bare].map(|runs| runs.into_iter().collect::<Sample>());
    let name = format!("{MANY} at once, {}{}", shape.name, bench.suffix);
    section.judged(&name, &ours, &bare, Goal::RatioAtMost(1.2), &calm);
    memory_row(bench, section, "private memory of each", shape, costs.0);
    section.note(format!(
        "{}{}: {:.1} MiB of each fork's private memory are the guest's",
        shape.name,
        bench.suffix,
        costs.1 as f64 / MEBIBYTE as f64
    ));
    Ok(())
}

/// The same memory, compressed: pages are served, or all of it is expanded into memory that forks share. `raw`: forks of
/// what was not compressed yet.
fn framed(
    bench: &mut Bench<'_>,
    section: &mut Section,
    shape: Shape,
    snapshot: &str,
    raw: &Sample,
) -> Result<()> {
    let file = bench.bare.of(&bench.server, snapshot)?.memory;
    let copy = made(bench, snapshot, 1, "Standby")?;
    let id = copy.first().map_or("", String::as_str);
    let compressed = bench.framed(id, &file)?;
    delete(&mut bench.api, id)?;
    bench.forget(snapshot)?;

    let (mut ours, mut calm, mut memory) = (Vec::new(), Calm::default(), 0);
    let repetitions = bench.context.repetitions(11, 3);
    for round in 0..=repetitions {
        let took = fork_alone(
            bench,
            &compressed,
            shape,
            (round == repetitions).then_some(&mut memory),
        )?;
        if round > 0 {
            ours.push(took);
        }
        calm.look();
    }
    let form = match bench.context.serves_pages() {
        true => "framed, served",
        false => "framed, expanded",
    };
    let ours: Sample = ours.into_iter().collect();
    let name = format!("one, {form}, {}{}", shape.name, bench.suffix);
    section.judged(&name, &ours, raw, Goal::None, &calm);
    section.note(format!("{name}: reference is raw, before"));
    memory_row(
        bench,
        section,
        &format!("memory of an idle fork, {form}"),
        shape,
        memory,
    );
    bench.forget(&compressed)
}

fn memory_row(bench: &Bench<'_>, section: &mut Section, what: &str, shape: Shape, bytes: u64) {
    section.row(
        &format!("{what}, {}{}", shape.name, bench.suffix),
        "MiB",
        bytes as f64 / MEBIBYTE as f64,
        Some(shape.memory as f64),
        Goal::RatioAtMost(0.1),
    );
}

/// Forks a snapshot once, looks at its `memory` in bytes where that is wanted, and removes the fork.
fn fork_alone(
    bench: &mut Bench<'_>,
    snapshot: &str,
    shape: Shape,
    mut memory: Option<&mut u64>,
) -> Result<Duration> {
    let (took, ids) = fork(bench, snapshot, 1)?;
    for id in ids {
        if let Some(bytes) = memory.as_deref_mut() {
            pause(IDLE);
            *bytes = guests::footprint(guests::vmm(&bench.server, &id)?, shape.memory)?.anonymous;
        }
        delete(&mut bench.api, &id)?;
    }
    Ok(took)
}

/// Forks a snapshot and runs a command in each: time until the last one has run it, and their ids.
fn fork(bench: &mut Bench<'_>, snapshot: &str, count: usize) -> Result<(Duration, Vec<String>)> {
    let began = Instant::now();
    let ids = made(bench, snapshot, count, "Running")?;
    let server = &bench.server;
    let failures: Vec<BenchError> = std::thread::scope(|scope| {
        let runs: Vec<_> = ids
            .iter()
            .map(|id| scope.spawn(move || remote::run(server, id, &TRUE, &[])))
            .collect();
        runs.into_iter()
            .filter_map(|run| match run.join() {
                Ok(ended) => ended.err(),
                Err(_) => Some(BenchError::Answer("a thread panicked".into())),
            })
            .collect()
    });
    let took = began.elapsed();
    match failures.into_iter().next() {
        Some(error) => Err(error),
        None => Ok((took, ids)),
    }
}

/// Forks a snapshot; returns their ids.
fn made(bench: &mut Bench<'_>, snapshot: &str, count: usize, state: &str) -> Result<Vec<String>> {
    let body = json!({ "name": "bench-fork", "target_state": state, "count": count });
    let path = format!("/snapshots/{snapshot}/fork");
    let answer = call(&mut bench.api, "POST", &path, Some(&body), 201)?;
    let mut ids = Vec::new();
    for fork in answer["forks"].as_array().into_iter().flatten() {
        match fork["instance"]["id"].as_str() {
            Some(id) => ids.push(id.to_owned()),
            None => return Err(BenchError::Answer(format!("a fork failed: {fork}"))),
        }
    }
    match ids.len() == count {
        true => Ok(ids),
        false => Err(BenchError::Answer(format!("{} forks of {count}", ids.len()))),
    }
}
