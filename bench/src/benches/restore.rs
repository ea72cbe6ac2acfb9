//! How long a guest in standby takes until it answers again, raw and framed.
//!
//! ```text
//!  boot ─► standby ─┬─► bare VMM                                                        reference of raw
//!                   ├─► restore                                                         raw
//!                   ├─► standby ─► restore                                              raw and a layer
//!                   ├─► the snapshot back, raw ─► restore                               reference of framed
//!                   └─► the snapshot back, compressed ─► restore                        framed
//! ```
//!
//! A boot takes longer than all of these together, so each round has one. A snapshot that is given back gives its guest
//! a new key as well; raw and framed are compared with that in both.

use std::time::{Duration, Instant};

use super::in_each_place;
use super::kept::Bench;
use crate::calm::Calm;
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::guests::{self, Shape};
use crate::paged::{self, Served};
use crate::report::{Goal, Section};
use crate::server::delete;
use crate::statistics::{Sample, milliseconds};

/// Bytes that are expanded at once.
const FRAME: usize = 256 << 10;

/// What one guest has shown.
struct Round {
    bare: Duration,
    raw: Duration,
    layered: Duration,
    /// Raw, given back from a snapshot.
    again: Duration,
    framed: Duration,
    /// All cores, expanding the same memory.
    expansion: Duration,
    /// Bytes that were read for the framed one, and how it fared, where pages are served.
    served: Option<(u64, Served)>,
}

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let shapes = guests::chosen(context)?;
    let repetitions = context.repetitions(11, 3);
    in_each_place(context, section, |section, place| {
        let mut bench = Bench::new(context, place, &shapes)?;
        for shape in shapes.iter().copied() {
            if let Err(error) = rows(&mut bench, section, shape, repetitions) {
                bench.stumbled(section, shape, &error)?;
            }
        }
        Ok(())
    })?;
    section.note(format!(
        "medians of {repetitions}, taken in turns, one vCPU, no network; from the call until /bin/true has run; \
         reference of raw: a bare VMM that resumes the same state, from its start until its agent has run /bin/true"
    ));
    if context.hypervisor == "firecracker" {
        section.note(format!("hypervisor.firecracker.pager: {}", context.pager));
    }
    match section.rows.is_empty() {
        false => Ok(()),
        true => Err(BenchError::Answer(section.notes.join("\n"))),
    }
}

fn rows(bench: &mut Bench<'_>, section: &mut Section, shape: Shape, repetitions: usize) -> Result<()> {
    let (mut rounds, mut calm) = (Vec::new(), Calm::default());
    for number in 0..=repetitions {
        let round = round(bench, shape)?;
        // The first round warms the caches of all.
        if number > 0 {
            rounds.push(round);
        }
        calm.look();
    }
    let took = |of: fn(&Round) -> Duration| rounds.iter().map(of).collect::<Sample>();
    let name = |what: &str| format!("{what}, {}{}", shape.name, bench.suffix);
    let (raw, bare) = (took(|round| round.raw), took(|round| round.bare));
    let goal = Goal::MoreByAtMost(25.0);
    section.judged(&name("raw"), &raw, &bare, goal, &calm);
    section.note(format!(
        "{}: the middle half of the runs took {}, the bare ones {}",
        name("raw"),
        middle_half(&raw),
        middle_half(&bare)
    ));
    let layered = took(|round| round.layered);
    section.judged(&name("raw and a layer"), &layered, &bare, Goal::None, &calm);

    let (again, framed) = (took(|round| round.again), took(|round| round.framed));
    if bench.context.serves_pages() {
        let goal = Goal::RatioAtMost(1.5);
        section.judged(&name("framed, served"), &framed, &again, goal, &calm);
        section.note(format!("{}: reference is raw", name("framed, served")));
        served_rows(section, &rounds, name);
        return Ok(());
    }
    let expanding = took(|round| round.expansion).median();
    let limit: Sample = again.iter().map(|run| run.mul_f64(1.5) + expanding).collect();
    let goal = Goal::RatioAtMost(1.0);
    section.judged(&name("framed, expanded"), &framed, &limit, goal, &calm);
    section.note(format!(
        "{}: reference is 1.5 times raw, which took {:.1} ms, and {:.1} ms of expanding what is not zero on all cores",
        name("framed, expanded"),
        milliseconds(again.median()),
        milliseconds(expanding),
    ));
    Ok(())
}

fn middle_half(runs: &Sample) -> String {
    let [from, to] = [25.0, 75.0].map(|percent| milliseconds(runs.percentile(percent)));
    format!("{from:.1} to {to:.1} ms")
}

/// What pagers did for the framed restores: the first of each image, of which nothing was known.
fn served_rows(section: &mut Section, rounds: &[Round], name: impl Fn(&str) -> String) {
    let served: Vec<(u64, Served)> = rounds.iter().filter_map(|round| round.served).collect();
    let megabytes = |bytes: u64| bytes as f64 / 1e6 / served.len().max(1) as f64;
    let read = megabytes(served.iter().map(|(read, _)| read).sum());
    let populated = megabytes(served.iter().map(|(_, served)| served.populated).sum());
    section.row(
        &name("framed, read from the store"),
        "MB",
        read,
        Some(populated),
        Goal::RatioAtMost(2.0),
    );
    section.note(format!(
        "{}: compressed, reference: what the guest had of its memory when it answered, neighbours and zeros that came \
         along included; the bench pager compares with exactly what is touched",
        name("framed, read from the store")
    ));
    let p50: Sample = served.iter().map(|(_, served)| served.p50).collect();
    let p99: Sample = served.iter().map(|(_, served)| served.p99).collect();
    for (percent, waited) in [("p50", p50), ("p99", p99)] {
        let median = waited.median().as_secs_f64() * 1e6;
        section.row(
            &name(&format!("framed, fault {percent}")),
            "µs",
            median,
            None,
            Goal::None,
        );
    }
}

/// One guest, from its boot to its end.
fn round(bench: &mut Bench<'_>, shape: Shape) -> Result<Round> {
    let id = bench.boot("bench-restore", shape)?;
    guests::standby(&mut bench.api, &id)?;
    let plain = guests::snapshot(&mut bench.api, &id, None)?;
    // Nothing else runs meanwhile.
    let (memory, bare) = {
        let captured = bench.bare.of(&bench.server, &plain)?;
        (captured.memory.clone(), captured.restore(1)?)
    };
    let raw = bench.restore(&id)?;
    guests::standby(&mut bench.api, &id)?;
    let layered = bench.restore(&id)?;
    guests::standby(&mut bench.api, &id)?;

    bench.rewind(&id, &plain)?;
    let again = bench.restore(&id)?;
    guests::standby(&mut bench.api, &id)?;
    bench.rewind(&id, &plain)?;
    let bytes = std::fs::read(&memory).map_err(|error| BenchError::io("read guest memory", error))?;
    let compressed = bench.framed(&id, &memory)?;
    let expansion = expanded(&bytes)?;
    let serves = bench.context.serves_pages();
    let before = if serves {
        paged::read_bytes(&mut bench.api)?
    } else {
        0
    };
    let framed = bench.restore(&id)?;
    let served = match serves {
        true => {
            let served = paged::of(&mut bench.api, &id)?;
            let read = paged::read_bytes(&mut bench.api)?.saturating_sub(before);
            Some((read, served))
        }
        false => None,
    };
    delete(&mut bench.api, &id)?;
    bench.forget(&compressed)?;
    bench.forget(&plain)?;
    Ok(Round {
        bare,
        raw,
        layered,
        again,
        framed,
        expansion,
        served,
    })
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
