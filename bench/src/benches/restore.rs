//! How long a kept guest takes until it answers again: from standby, raw and framed, and as forks.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::in_each_place;
use crate::bare_restore::BareVmms;
use crate::calm::Calm;
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::guests::{self, Content, MEBIBYTE, SHAPES, Shape};
use crate::http::Connection;
use crate::load::pause;
use crate::place::Place;
use crate::registry::push_busybox;
use crate::remote;
use crate::report::{Goal, Section};
use crate::server::{Server, call, delete};
use crate::statistics::{Sample, milliseconds};

/// Longest wait for the compressor.
const COMPRESSION_PATIENCE: Duration = Duration::from_secs(300);
/// Bytes that are expanded at once.
const FRAME: usize = 256 << 10;
const TRUE: [&str; 1] = ["/bin/true"];

struct Bench<'a> {
    context: &'a Context,
    server: Server,
    api: Connection,
    image: String,
    content: Content,
    bare: BareVmms,
    suffix: &'static str,
}

impl<'a> Bench<'a> {
    fn new(context: &'a Context, place: &Place) -> Result<Self> {
        let server = Server::start_in(context, place)?;
        let image = push_busybox(&server)?;
        Ok(Self {
            context,
            api: server.connect()?,
            server,
            image,
            content: Content::read(SHAPES.iter().map(|shape| shape.filled).max().unwrap_or(0))?,
            bare: BareVmms::new(context, place)?,
            suffix: place.suffix,
        })
    }

    fn boot(&mut self, name: &str, shape: Shape) -> Result<String> {
        guests::boot(
            &self.server,
            &mut self.api,
            &self.image,
            name,
            shape,
            &self.content,
        )
    }

    /// From the call until a command has run in the guest.
    fn restore(&mut self, id: &str) -> Result<Duration> {
        let began = Instant::now();
        call(
            &mut self.api,
            "POST",
            &format!("/instances/{id}/restore"),
            None,
            200,
        )?;
        remote::run(&self.server, id, &TRUE, &[])?;
        Ok(began.elapsed())
    }

    /// A snapshot of a guest in standby, which is gone.
    fn kept(&mut self, shape: Shape) -> Result<String> {
        let id = self.boot("bench-kept", shape)?;
        guests::standby(&mut self.api, &id)?;
        let snapshot = guests::snapshot(&mut self.api, &id, None)?;
        delete(&mut self.api, &id)?;
        Ok(snapshot)
    }

    fn forget(&mut self, snapshot: &str) -> Result<()> {
        call(
            &mut self.api,
            "DELETE",
            &format!("/snapshots/{snapshot}"),
            None,
            204,
        )
        .map(drop)
    }
}

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let repetitions = context.repetitions(11, 3);
    in_each_place(section, |section, place| {
        let mut bench = Bench::new(context, place)?;
        for shape in SHAPES {
            if let Err(error) = standby_rows(&mut bench, section, shape, repetitions) {
                section.note(format!("{}{}: {error}", shape.name, place.suffix));
            }
        }
        Ok(())
    })?;
    section.note(format!(
        "medians of {repetitions}, taken in turns, one vCPU, no network; from the call until /bin/true has run; \
         reference: a bare VMM that resumes the same state, from its start until its agent has run /bin/true"
    ));
    match section.rows.is_empty() {
        false => Ok(()),
        true => Err(BenchError::Answer(section.notes.join("\n"))),
    }
}

fn standby_rows(bench: &mut Bench, section: &mut Section, shape: Shape, repetitions: usize) -> Result<()> {
    let (mut raw, mut bare, mut layered) = (Vec::new(), Vec::new(), Vec::new());
    let mut calm = Calm::default();
    for round in 0..=repetitions {
        let id = bench.boot("bench-restore", shape)?;
        guests::standby(&mut bench.api, &id)?;
        let snapshot = guests::snapshot(&mut bench.api, &id, None)?;
        let first = bench.restore(&id)?;
        let reference = bench.bare.of(&bench.server, &snapshot)?.restore(1)?;
        guests::standby(&mut bench.api, &id)?;
        let second = bench.restore(&id)?;
        delete(&mut bench.api, &id)?;
        bench.forget(&snapshot)?;
        // The first round warms the caches of both.
        if round > 0 {
            raw.push(first);
            bare.push(reference);
            layered.push(second);
        }
        calm.look();
    }
    let [raw, bare, layered] = [raw, bare, layered].map(|runs| runs.into_iter().collect::<Sample>());
    let name = |what: &str| format!("{what}, {}{}", shape.name, bench.suffix);
    section.judged(&name("raw"), &raw, &bare, Goal::MoreByAtMost(25.0), &calm);
    section.judged(&name("raw and a layer"), &layered, &bare, Goal::None, &calm);
    framed_row(bench, section, shape, &raw, repetitions)
}

/// Framed memory, against one and a half times the raw restore, and the time of expanding where all of it is expanded.
fn framed_row(
    bench: &mut Bench,
    section: &mut Section,
    shape: Shape,
    raw: &Sample,
    repetitions: usize,
) -> Result<()> {
    let (mut ours, mut expansion) = (Vec::new(), Vec::new());
    let mut calm = Calm::default();
    for round in 0..=repetitions {
        let id = bench.boot("bench-framed", shape)?;
        guests::standby(&mut bench.api, &id)?;
        let plain = guests::snapshot(&mut bench.api, &id, None)?;
        let memory = bench.bare.of(&bench.server, &plain)?.memory;
        let bytes = std::fs::read(&memory).map_err(|error| BenchError::io("read guest memory", error))?;
        let zstd = json!({ "enabled": true, "algorithm": "zstd", "level": 1 });
        let framed = guests::snapshot(&mut bench.api, &id, Some(zstd))?;
        wait_until_compressed(&mut bench.api, &framed)?;
        let alone = expanded(&bytes)?;
        if memory.exists() {
            return Err(BenchError::Answer("the raw form is still there".into()));
        }
        let took = bench.restore(&id)?;
        if round > 0 {
            ours.push(took);
            expansion.push(alone);
        }
        delete(&mut bench.api, &id)?;
        bench.forget(&framed)?;
        bench.forget(&plain)?;
        calm.look();
    }
    let [ours, expansion] = [ours, expansion].map(|runs| runs.into_iter().collect::<Sample>());
    let expanding = match bench.context.serves_pages() {
        true => Duration::ZERO,
        false => expansion.median(),
    };
    let limit = raw
        .iter()
        .map(|run| run.mul_f64(1.5) + expanding)
        .collect::<Sample>();
    let name = format!("framed, {}{}", shape.name, bench.suffix);
    section.judged(&name, &ours, &limit, Goal::RatioAtMost(1.0), &calm);
    section.note(format!(
        "{name}: reference is 1.5 times raw and {:.1} ms of expanding what is not zero on all cores",
        milliseconds(expanding),
    ));
    Ok(())
}

/// Waits for the compressor.
///
/// # Errors
/// It fails or does not end.
pub(super) fn wait_until_compressed(api: &mut Connection, snapshot: &str) -> Result<Value> {
    let began = Instant::now();
    loop {
        let now = call(api, "GET", &format!("/snapshots/{snapshot}"), None, 200)?;
        match now["compression_state"].as_str() {
            Some("compressed") => return Ok(now),
            Some("error") => return Err(BenchError::Answer(format!("not compressed: {now}"))),
            _ if began.elapsed() > COMPRESSION_PATIENCE => {
                return Err(BenchError::Answer(format!("not compressed in time: {now}")));
            }
            _ => pause(Duration::from_millis(10)),
        }
    }
}

/// How long all cores take to expand what of `memory` is not zero, from memory to memory.
fn expanded(memory: &[u8]) -> Result<Duration> {
    let plain: Vec<u8> = memory
        .chunks(4096)
        .filter(|page| page.iter().any(|byte| *byte != 0))
        .flatten()
        .copied()
        .collect();
    let failed = |error| BenchError::io("compress guest memory", error);
    let frames = plain
        .chunks(FRAME)
        .map(|part| zstd::bulk::compress(part, 1).map_err(failed))
        .collect::<Result<Vec<_>>>()?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let share = frames.len().div_ceil(cores).max(1);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for frames in frames.chunks(share) {
            scope.spawn(move || {
                // The least there is: each frame goes where the former one went.
                let mut room = vec![0; FRAME];
                for frame in frames {
                    let _ = zstd::bulk::decompress_to_buffer(frame, &mut room);
                }
            });
        }
    });
    Ok(began.elapsed())
}

/// Forks: one, many at once, and what an idle one costs.
pub(super) fn forks(context: &Context, section: &mut Section) -> Result<()> {
    in_each_place(section, |section, place| {
        let mut bench = Bench::new(context, place)?;
        for shape in SHAPES {
            if let Err(error) = fork_rows(&mut bench, section, shape) {
                section.note(format!("{}{}: {error}", shape.name, place.suffix));
            }
        }
        Ok(())
    })?;
    section.note(
        "from the call until /bin/true has run in each; reference: bare VMMs resumed from the same state, their disks \
         copied beforehand; a fork also gets another identity",
    );
    match section.rows.is_empty() {
        false => Ok(()),
        true => Err(BenchError::Answer(section.notes.join("\n"))),
    }
}

fn fork_rows(bench: &mut Bench, section: &mut Section, shape: Shape) -> Result<()> {
    const MANY: usize = 20;
    let snapshot = bench.kept(shape)?;
    let repetitions = bench.context.repetitions(11, 3);
    let (mut ours, mut bare, mut calm) = (Vec::new(), Vec::new(), Calm::default());
    for round in 0..=repetitions {
        let (took, ids) = fork(bench, &snapshot, 1)?;
        for id in ids {
            delete(&mut bench.api, &id)?;
        }
        let reference = bench.bare.of(&bench.server, &snapshot)?.restore(1)?;
        if round > 0 {
            ours.push(took);
            bare.push(reference);
        }
        calm.look();
    }
    let [ours, bare] = [ours, bare].map(|runs| runs.into_iter().collect::<Sample>());
    let name = format!("one, {}{}", shape.name, bench.suffix);
    section.judged(&name, &ours, &bare, Goal::MoreByAtMost(25.0), &calm);

    let (mut ours, mut bare, mut calm) = (Vec::new(), Vec::new(), Calm::default());
    let mut costs = (0, 0);
    for _ in 0..if bench.context.quick { 1 } else { 5 } {
        let (took, ids) = fork(bench, &snapshot, MANY)?;
        ours.push(took);
        pause(Duration::from_secs(1));
        costs = (0, 0);
        for id in &ids {
            let costs_of = guests::footprint(guests::vmm(&bench.server, id)?, shape.memory)?;
            costs.0 += costs_of.private / MANY as u64;
            costs.1 += costs_of.anonymous_guest / MANY as u64;
        }
        for id in ids {
            delete(&mut bench.api, &id)?;
        }
        bare.push(bench.bare.of(&bench.server, &snapshot)?.restore(MANY)?);
        calm.look();
    }
    let [ours, bare] = [ours, bare].map(|runs| runs.into_iter().collect::<Sample>());
    let name = format!("{MANY} at once, {}{}", shape.name, bench.suffix);
    section.judged(&name, &ours, &bare, Goal::RatioAtMost(1.2), &calm);
    let mebibytes = |bytes: u64| bytes as f64 / MEBIBYTE as f64;
    section.row(
        &format!("private memory of each, {}{}", shape.name, bench.suffix),
        "MiB",
        mebibytes(costs.0),
        Some(shape.memory as f64),
        Goal::RatioAtMost(0.1),
    );
    section.note(format!(
        "{}{}: {:.1} MiB of each fork's private memory are the guest's; reference: the guest's size",
        shape.name,
        bench.suffix,
        mebibytes(costs.1)
    ));
    bench.forget(&snapshot)
}

/// Forks a snapshot and runs a command in each: time until the last one has run it, and their ids.
fn fork(bench: &mut Bench, snapshot: &str, count: usize) -> Result<(Duration, Vec<String>)> {
    let body = json!({ "name": "bench-fork", "target_state": "Running", "count": count });
    let began = Instant::now();
    let answer = call(
        &mut bench.api,
        "POST",
        &format!("/snapshots/{snapshot}/fork"),
        Some(&body),
        201,
    )?;
    let mut ids = Vec::new();
    for fork in answer["forks"].as_array().into_iter().flatten() {
        match fork["instance"]["id"].as_str() {
            Some(id) => ids.push(id.to_owned()),
            None => return Err(BenchError::Answer(format!("a fork failed: {fork}"))),
        }
    }
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
        None if ids.len() == count => Ok((took, ids)),
        None => Err(BenchError::Answer(format!("{} forks of {count}", ids.len()))),
    }
}
