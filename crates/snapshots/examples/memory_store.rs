//! Measures the store beside the command-line compressors, on a file that holds a guest's memory.
//!
//! `memory_store FILE [DIRECTORY]`: captures the file, compresses it at several levels, expands it again; then takes
//! ten images with 5 % of the pages changed between them, and prints ratios and throughput. Without FILE a memory is made
//! up of the programs and texts of this host, with zero pages between them.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a measurement that cannot go on should panic"
)]

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use hypeman_snapshots::{Codec, Elsewhere, MemoryId, MemorySource, MemoryStore, Options, PAGE_BYTES};

struct Memory(Vec<u8>);

impl MemorySource for Memory {
    fn extents(&self) -> Vec<Range<u64>> {
        std::iter::once(0..self.0.len() as u64).collect()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
        Ok(())
    }
}

const QUIET: &(dyn Fn(u64, u64) + Sync) = &|_, _| ();

/// What something took at least.
#[derive(Clone, Copy)]
struct Cost {
    seconds: f64,
    cpu: f64,
}

impl Cost {
    const MOST: Self = Self {
        seconds: f64::MAX,
        cpu: f64::MAX,
    };

    fn least<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let (begin, before) = (Instant::now(), cpu_seconds());
        let result = work();
        self.seconds = self.seconds.min(begin.elapsed().as_secs_f64());
        self.cpu = self.cpu.min(cpu_seconds() - before);
        result
    }
}

/// Processor time of this process and the programs that it ran, in seconds.
fn cpu_seconds() -> f64 {
    let facts = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields = facts.rsplit(')').next().unwrap().split_whitespace();
    // User and system time, own and of children, in hundredths.
    fields
        .skip(11)
        .take(4)
        .map(|ticks| ticks.parse::<f64>().unwrap())
        .sum::<f64>()
        / 100.0
}

fn main() {
    let mut arguments = std::env::args_os().skip(1);
    let given = arguments.next().map(PathBuf::from);
    let directory = arguments.next().map_or_else(std::env::temp_dir, PathBuf::from);
    let work = tempfile::tempdir_in(directory).unwrap();
    let file = given.unwrap_or_else(|| made_up(work.path()));
    let mut memory = Memory(std::fs::read(&file).unwrap());
    memory.0.truncate(memory.0.len() / PAGE_BYTES * PAGE_BYTES);
    let dense = memory.0.len() as f64 / 1e6;
    let pages = memory.0.chunks(PAGE_BYTES);
    let used = pages.filter(|page| page.iter().any(|byte| *byte != 0)).count() * PAGE_BYTES;
    println!(
        "{}: {dense:.0} MB, {:.0} MB not zero",
        file.display(),
        used as f64 / 1e6
    );
    println!(
        "{:<28} {:>12} {:>8} {:>9} {:>9} {:>9}",
        "", "bytes", "ratio", "seconds", "MB/s", "CPU s"
    );
    let row = |name: &str, bytes: u64, cost: Cost| {
        let ratio = memory.0.len() as f64 / bytes as f64;
        let Cost { seconds, cpu } = cost;
        println!(
            "{name:<28} {bytes:>12} {ratio:>8.2} {seconds:>9.3} {:>9.0} {cpu:>9.2}",
            dense / seconds
        );
    };

    // Interleaved, and the best of five: other work on the host must not decide. Writes go to the same disk.
    let stores = work.path().join("stores");
    let rounds = 5;
    for (codec, program) in [
        (Codec::Zstd(1), &["zstd", "-q", "-f", "-T0", "-1"][..]),
        (Codec::Zstd(3), &["zstd", "-q", "-f", "-T0", "-3"]),
        (Codec::Lz4(1), &["lz4", "-q", "-f", "-1"]),
        (Codec::Lz4(9), &["lz4", "-q", "-f", "-9"]),
    ] {
        let (mut peer, mut ours, mut expansion) = (Cost::MOST, Cost::MOST, Cost::MOST);
        let (mut peer_bytes, mut bytes) = (0, 0);
        for _ in 0..rounds {
            let output = work.path().join("peer");
            peer.least(|| tool(program, &file, &output));
            peer_bytes = output.metadata().unwrap().len();
            let _ = std::fs::remove_dir_all(&stores);
            let store = MemoryStore::open(&stores, Options::default()).unwrap();
            let id = capture(&store, &memory, None);
            let compress = || {
                store
                    .compress(&id, codec, &AtomicBool::new(false), QUIET)
                    .unwrap()
            };
            bytes = ours.least(compress).stored_bytes;
            store.drop_raw(id).unwrap();
            expansion.least(|| drop(store.materialize(&id).unwrap()));
        }
        row(&program.join(" "), peer_bytes, peer);
        row(&format!("{codec:?}"), bytes, ours);
        row("  expanded", bytes, expansion);
        println!(
            "  throughput {:.2} of the tool, per CPU second {:.2}, size {:.3}",
            peer.seconds / ours.seconds,
            peer.cpu / ours.cpu,
            bytes as f64 / peer_bytes as f64
        );
    }
    let _ = std::fs::remove_dir_all(&stores);
    let store = MemoryStore::open(&stores, Options::default()).unwrap();
    let plain: Vec<u8> = memory
        .0
        .chunks(PAGE_BYTES)
        .filter(|page| page.iter().any(|byte| *byte != 0))
        .flatten()
        .copied()
        .collect();
    let (mut whole, mut ours, mut first) = (Cost::MOST, Cost::MOST, None);
    for _ in 0..rounds {
        let file = File::create(work.path().join("dense")).unwrap();
        whole.least(|| {
            let pieces = plain.chunks(1 << 20).enumerate();
            pieces.for_each(|(at, part)| file.write_all_at(part, (at << 20) as u64).unwrap());
            file.sync_all().unwrap();
        });
        store.begin_sweep().unwrap().finish(&HashSet::new()).unwrap();
        first = Some(ours.least(|| capture(&store, &memory, None)));
    }
    println!(
        "capture: {:.3} s, {:.2} times a synced write of what is not zero",
        ours.seconds,
        ours.seconds / whole.seconds
    );
    let first = first.unwrap();
    let begin = Instant::now();
    drop(store.materialize(&first).unwrap());
    println!("materialize raw: {:.4} s", begin.elapsed().as_secs_f64());
    series(&store, memory);
}

/// Ten images, each with 5 % of the pages changed: as layers, and each on its own.
fn series(store: &MemoryStore, mut memory: Memory) {
    let total = memory.0.len() / PAGE_BYTES;
    let used: Vec<usize> = (0..total)
        .filter(|page| {
            memory.0[page * PAGE_BYTES..][..PAGE_BYTES]
                .iter()
                .any(|byte| *byte != 0)
        })
        .collect();
    let mut random = 1_u64;
    let mut parent = None;
    let (mut one, mut all) = (0, 0);
    for number in 0..10 {
        let id = capture(store, &memory, parent.as_ref());
        let bytes = store
            .compress(&id, Codec::Zstd(1), &AtomicBool::new(false), QUIET)
            .unwrap()
            .stored_bytes;
        store.drop_raw(id).unwrap();
        if number == 0 {
            one = bytes;
        }
        all += bytes;
        parent = Some(id);
        // Runs of sixteen pages get the content of pages elsewhere, with something of their own.
        for run in 0..used.len() / 20 / 16 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let to = (random >> 20) as usize % used.len();
            for page in used.iter().skip(to).take(16) {
                let from = used[(page * 31 + run * 7 + number) % used.len()];
                memory
                    .0
                    .copy_within(from * PAGE_BYTES..(from + 1) * PAGE_BYTES, page * PAGE_BYTES);
                memory.0[page * PAGE_BYTES..][..8].copy_from_slice(&random.to_le_bytes());
            }
        }
    }
    println!(
        "ten images, 5 % changed between them: {:.2} times one",
        all as f64 / one as f64
    );
}

fn capture(store: &MemoryStore, memory: &Memory, parent: Option<&MemoryId>) -> MemoryId {
    let id = MemoryId::random().unwrap();
    // Nothing sweeps here: the image needs no hold.
    store
        .capture(&id, memory.0.len() as u64, parent, memory, Elsewhere::Zero)
        .unwrap();
    id
}

/// Runs a compressor and waits until its output is durable, as ours is.
fn tool(program: &[&str], input: &Path, output: &Path) {
    let mut command = Command::new(program[0]);
    command.args(&program[1..]).arg(input);
    if program[0] == "zstd" {
        command.arg("-o");
    }
    let status = command.arg(output).stdin(Stdio::null()).status();
    assert!(status.unwrap().success(), "{program:?}");
    File::open(output).unwrap().sync_all().unwrap();
}

/// A file of programs, texts and zero pages.
fn made_up(directory: &Path) -> PathBuf {
    let path = directory.join("memory");
    let file = File::create_new(&path).unwrap();
    let mut end = 0;
    for source in [
        "/usr/bin",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/share/perl5",
        "/usr/include",
        "/etc",
    ] {
        for entry in std::fs::read_dir(source).into_iter().flatten().flatten() {
            let Ok(content) = std::fs::read(entry.path()) else {
                continue;
            };
            let content = &content[..content.len().min(1 << 20)];
            if end + content.len() as u64 > 256 << 20 {
                break;
            }
            file.write_all_at(content, end).unwrap();
            end = (end + content.len() as u64).next_multiple_of(PAGE_BYTES as u64);
            end += (content.len() as u64 % 64) * PAGE_BYTES as u64;
        }
    }
    file.set_len(256 << 20).unwrap();
    path
}
