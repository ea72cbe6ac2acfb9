//! Compressing memory against the command-line compressors on the same bytes, and what a series of snapshots takes.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use hypeman_snapshots::{Codec, Elsewhere, MemoryId, MemorySource, MemoryStore, Options};
use serde_json::json;

use super::kept::wait_until_compressed;
use crate::bare_restore::record;
use crate::calm::Calm;
use crate::context::{Context, need_program};
use crate::error::{BenchError, Result};
use crate::guests::{self, Content, MEBIBYTE, Shape};
use crate::http::Connection;
use crate::registry::push_busybox;
use crate::report::{Goal, Section};
use crate::server::{Server, delete};
use crate::statistics::Sample;

/// Snapshots in a series.
const SERIES: u64 = 10;
/// Of what fills a guest, the share in percent that changes between two of them.
const CHANGED: u64 = 5;
/// Changes come in runs of this many bytes.
const RUN: u64 = 64 << 10;

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let server = Server::start(context)?;
    let image = push_busybox(&server)?;
    let mut api = server.connect()?;
    let shapes = guests::chosen(context)?;
    let most = guests::most_filled(&shapes);
    let content = Content::read(most + most / 2)?;
    for shape in shapes {
        let measured = memory_of(&server, &mut api, &image, shape, &content)
            .and_then(|memory| tools(context, section, shape, &memory));
        // Nothing fills an idle guest that could change.
        let outcome = match shape.filled {
            0 => measured,
            _ => measured.and_then(|()| series(section, &server, &mut api, &image, shape, &content)),
        };
        if let Err(error) = outcome {
            section.note(format!("{}: {error}", shape.name));
            api = server.connect()?;
            guests::remove_all(&server)?;
        }
    }
    section.note(
        "bytes of the guest's memory, zeros included, in a second, durable; stored: bytes on disk; ten snapshots: each \
         compressed with zstd 1, of a guest that goes on, 5 % of its content replaced by other programs between two; \
         reference: the compressed first one",
    );
    if !lz4_uses_all_cores() {
        section.note("lz4 of this host is older than 1.10 and uses one core, where ours uses all");
    }
    match section.rows.is_empty() {
        false => Ok(()),
        true => Err(BenchError::Answer(section.notes.join("\n"))),
    }
}

/// Whether the command-line compressor knows `-T0`: since 1.10; older ones refuse it.
fn lz4_uses_all_cores() -> bool {
    let asked = Command::new("lz4").args(["-T0", "--version"]).output();
    asked.is_ok_and(|answer| answer.status.success())
}

/// The memory of a captured guest.
fn memory_of(
    server: &Server,
    api: &mut Connection,
    image: &str,
    shape: Shape,
    content: &Content,
) -> Result<Memory> {
    let id = guests::boot(server, api, image, "bench-compression", shape, content)?;
    guests::standby(api, &id)?;
    let snapshot = guests::snapshot(api, &id, None)?;
    let record = record(server, &snapshot)?;
    let image = record["memory"]["image"].as_str().unwrap_or_default();
    let path = server
        .data_directory()
        .join("memory")
        .join(image)
        .join("memory.raw");
    let bytes = fs::read(path).map_err(|error| BenchError::io("read guest memory", error))?;
    delete(api, &id)?;
    Ok(Memory(bytes))
}

struct Memory(Vec<u8>);

impl MemorySource for Memory {
    fn extents(&self) -> Vec<std::ops::Range<u64>> {
        std::iter::once(0..self.0.len() as u64).collect()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
        Ok(())
    }
}

fn tools(context: &Context, section: &mut Section, shape: Shape, memory: &Memory) -> Result<()> {
    let rounds = context.repetitions(10, 3);
    let folder = tempfile::tempdir().map_err(|error| BenchError::io("make a directory", error))?;
    let file = folder.path().join("memory");
    fs::write(&file, &memory.0).map_err(|error| BenchError::io("write guest memory", error))?;
    let lz4: &[&str] = match lz4_uses_all_cores() {
        true => &["lz4", "-q", "-f", "-T0", "-1"],
        false => &["lz4", "-q", "-f", "-1"],
    };
    for (codec, program) in [
        (Codec::Zstd(1), &["zstd", "-q", "-f", "-T0", "-1"][..]),
        (Codec::Lz4(1), lz4),
    ] {
        need_program(program[0])?;
        let (mut ours, mut peer, mut calm) = (Vec::new(), Vec::new(), Calm::default());
        let (mut stored, mut peer_stored) = (0, 0);
        for _ in 0..rounds {
            let output = folder.path().join("peer");
            peer.push(compressed_by(program, &file, &output)?);
            peer_stored = output.metadata().map_or(0, |about| about.len());
            let (took, bytes) = compressed_by_us(&folder.path().join("store"), memory, codec)?;
            ours.push(took);
            stored = bytes;
            calm.look();
        }
        let [ours, peer] = [ours, peer].map(|runs| runs.into_iter().collect::<Sample>());
        let rate = |took: Duration| memory.0.len() as f64 / 1e6 / took.as_secs_f64();
        let disturbance = calm.disturbance(&ours, &peer);
        let name = format!("{}, {}", program.join(" "), shape.name);
        section.row(
            &name,
            "MB/s",
            rate(ours.median()),
            Some(rate(peer.median())),
            match disturbance {
                Some(_) => Goal::None,
                None => Goal::RatioAtLeast(0.9),
            },
        );
        if let Some(reason) = disturbance {
            section.note(format!("{name}: not judged: {reason}"));
        }
        section.row(
            &format!("{name}, stored"),
            "MB",
            stored as f64 / 1e6,
            Some(peer_stored as f64 / 1e6),
            Goal::RatioAtMost(1.0),
        );
    }
    Ok(())
}

fn compressed_by(program: &[&str], input: &Path, output: &Path) -> Result<Duration> {
    let fail = |error| BenchError::io("run a compressor", error);
    let began = Instant::now();
    let mut command = Command::new(program[0]);
    command.args(&program[1..]).arg(input);
    if program[0] == "zstd" {
        command.arg("-o");
    }
    let status = command.arg(output).stdin(Stdio::null()).status().map_err(fail)?;
    // Durable, as ours is.
    File::open(output)
        .and_then(|file| file.sync_all())
        .map_err(fail)?;
    let took = began.elapsed();
    if status.success() {
        return Ok(took);
    }
    Err(BenchError::Answer(format!("{program:?} ended with {status}")))
}

fn compressed_by_us(directory: &Path, memory: &Memory, codec: Codec) -> Result<(Duration, u64)> {
    let failed = |error: hypeman_snapshots::Error| BenchError::Answer(format!("the store: {error}"));
    let _ = fs::remove_dir_all(directory);
    let store = MemoryStore::open(directory, Options::default()).map_err(failed)?;
    let id = MemoryId::random().map_err(failed)?;
    store
        .capture(&id, memory.0.len() as u64, None, memory, Elsewhere::Zero)
        .map_err(failed)?;
    let began = Instant::now();
    let compressed = store
        .compress(&id, codec, &AtomicBool::new(false), &|_, _| {})
        .map_err(failed)?;
    Ok((began.elapsed(), compressed.stored_bytes))
}

/// Ten snapshots of one guest that goes on, against the first one.
fn series(
    section: &mut Section,
    server: &Server,
    api: &mut Connection,
    image: &str,
    shape: Shape,
    content: &Content,
) -> Result<()> {
    let memory = server.data_directory().join("memory");
    let before = guests::disk_usage(&memory);
    let id = guests::boot(server, api, image, "bench-series", shape, content)?;
    let zstd = json!({ "enabled": true, "algorithm": "zstd", "level": 1 });
    let filled = shape.filled * MEBIBYTE;
    let runs = filled * CHANGED / 100 / RUN;
    let mut first = 0;
    for number in 0..SERIES {
        if number > 0 {
            // At different places each time, with content that was not there before.
            let at = (number * 7 * runs * RUN) % (filled - runs * RUN);
            let other = content.part(filled + (number - 1) * runs * RUN, runs * RUN);
            guests::change(server, &id, at / RUN * RUN, other)?;
        }
        let snapshot = guests::snapshot(api, &id, Some(zstd.clone()))?;
        wait_until_compressed(api, &snapshot)?;
        if number == 0 {
            first = guests::disk_usage(&memory) - before;
        }
    }
    let all = guests::disk_usage(&memory) - before;
    delete(api, &id)?;
    section.row(
        &format!("ten snapshots, {}", shape.name),
        "MB",
        all as f64 / 1e6,
        Some(first as f64 / 1e6),
        Goal::RatioAtMost(1.6),
    );
    Ok(())
}
