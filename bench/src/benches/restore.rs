//! How long a guest in standby takes until it answers again, raw and framed.
//!
//! ```text
//!  boot ─► standby ─┬─► bare VMM                                                        reference of raw
//!                   ├─► bare Cloud Hypervisor, by its own restore on demand             beside the bare VMM
//!                   ├─► restore                                                         raw
//!                   ├─► standby ─► restore                                              raw and a layer
//!                   ├─► the snapshot back, raw ─► restore                               reference of framed
//!                   └─► the snapshot back, compressed ─► restore                        framed
//! ```
//!
//! A boot takes longer than all of these together, so each round has one. A snapshot that is given back gives its guest
//! a new key as well; raw and framed are compared with that in both.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::in_each_place;
use super::kept::Bench;
use crate::bare_cloud_hypervisor::need_version;
use crate::bare_offload::BareOffload;
use crate::bare_restore::{BareRestore, BareVmms};
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

/// The version of Cloud Hypervisor that brought its restore on demand.
const ON_DEMAND_SINCE: u32 = 52;

/// What one guest has shown.
struct Round {
    bare: Duration,
    /// Restored on demand by Cloud Hypervisor itself, where that is asked for.
    on_demand: Option<Result<Duration>>,
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
    let cloud_hypervisor = on_demand_by(bench.context, section);
    for number in 0..=repetitions {
        let round = round(bench, shape, cloud_hypervisor.as_deref())?;
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
    on_demand_row(section, &rounds, &bare, &calm, &name("bare, mapped privately"));

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

/// Cloud Hypervisor, where it is what runs and restores on demand by itself.
fn on_demand_by(context: &Context, section: &mut Section) -> Option<PathBuf> {
    if context.hypervisor != "cloud-hypervisor" {
        return None;
    }
    need_version(ON_DEMAND_SINCE)
        .map_err(|error| section.note(format!("no restore on demand: {error}")))
        .ok()
}

/// The bare VMM with our private mapping against itself with its own restore on demand.
fn on_demand_row(section: &mut Section, rounds: &[Round], bare: &Sample, calm: &Calm, name: &str) {
    let (mut took, mut failure) = (Vec::new(), None);
    for outcome in rounds.iter().filter_map(|round| round.on_demand.as_ref()) {
        match outcome {
            Ok(duration) => took.push(*duration),
            Err(error) => failure = Some(error),
        }
    }
    if let Some(error) = failure {
        section.note(format!("{name}: on demand: {error}"));
    } else if !took.is_empty() {
        let on_demand: Sample = took.into_iter().collect();
        section.judged(name, bare, &on_demand, Goal::None, calm);
        section.note(format!(
            "{name}: reference is Cloud Hypervisor's own restore on demand (memory_restore_mode) of the same guest"
        ));
    }
}

/// The same guest, by a restore on demand of Cloud Hypervisor's own.
fn on_demand(host: &BareVmms, captured: &BareRestore<'_>, program: &Path) -> Result<Duration> {
    let described = BareOffload::of(host, captured, program)?;
    let spec = captured.spec(0)?;
    let took = described.restore_on_demand(host, &captured.key, &spec, &captured.memory);
    captured.forget(0);
    took
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
fn round(bench: &mut Bench<'_>, shape: Shape, cloud_hypervisor: Option<&Path>) -> Result<Round> {
    let id = bench.boot("bench-restore", shape)?;
    guests::standby(&mut bench.api, &id)?;
    let plain = guests::snapshot(&mut bench.api, &id, None)?;
    // Nothing else runs meanwhile.
    let (memory, bare, on_demand) = {
        let captured = bench.bare.of(&bench.server, &plain)?;
        let bare = captured.restore(1)?;
        let on_demand = cloud_hypervisor.map(|program| on_demand(&bench.bare, &captured, program));
        (captured.memory.clone(), bare, on_demand)
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
        on_demand,
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
