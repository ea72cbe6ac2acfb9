//! Serving page faults, against copying the same pages within a process.
//!
//! The machines are threads of this process with memory under a userfaultfd; the pager is the real process.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use hypeman_pager::memory::{WatchedMemory, probe};
use hypeman_pager::{MachineState, Pager, PagerError, PagerOptions, Registration};
use hypeman_snapshots::{
    CHUNK_BYTES, Codec, Elsewhere, MemoryId, MemorySource, MemoryStore, Options, PAGE_BYTES,
};

use crate::calm::Calm;
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::guests::{Content, MEBIBYTE};
use crate::report::{Goal, Section};
use crate::statistics::Sample;

/// Machines that ask at once.
const CROWD: usize = 8;
/// Pages that one answer may bring to a machine that reads here and there.
const WINDOW: usize = 8;
/// A guest that wakes up reads so much in one place.
const RUN: usize = 16;

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    probe().map_err(|error| BenchError::Missing(format!("this host serves no page faults: {error}")))?;
    let mebibytes = if context.quick { 32 } else { 128 };
    let content = Content::read(mebibytes)?;
    let bench = Bench::new(context, content.part(0, mebibytes * MEBIBYTE).to_vec())?;
    let rounds = context.repetitions(10, 3);
    for (name, framed) in [("raw", false), ("framed", true)] {
        let image = bench.image(framed)?;
        bench.latency(section, name, image)?;
        bench.crowd(section, name, image, rounds)?;
        bench.second_restore(section, name, framed, image)?;
    }
    section.note(format!(
        "{mebibytes} MiB of programs as guest memory; fault: a byte read in a page that is missing, one in each {WINDOW}, \
         in no order; from RAM: its piece was verified before; first in its piece: read, expanded and verified for it; \
         reference: copying one page; {CROWD} machines: each reads all of its memory, pieces in RAM, against as many \
         threads that copy the same pages into fresh memory; second restore: bytes read from the store by a pager that \
         starts, against the pages that the guest touches, {RUN} in one place, a tenth of its memory"
    ));
    Ok(())
}

struct Memory(Arc<Vec<u8>>);

impl MemorySource for Memory {
    fn extents(&self) -> Vec<std::ops::Range<u64>> {
        std::iter::once(0..self.0.len() as u64).collect()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
        Ok(())
    }
}

struct Bench {
    directory: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
    options: PagerOptions,
    store: MemoryStore,
    memory: Arc<Vec<u8>>,
}

/// A machine, and its memory in this process.
struct Machine {
    memory: WatchedMemory,
    _stream: std::os::unix::net::UnixStream,
}

fn failed(error: impl std::fmt::Display) -> BenchError {
    BenchError::Answer(error.to_string())
}

impl Bench {
    fn new(context: &Context, memory: Vec<u8>) -> Result<Self> {
        context.need_hypeman()?;
        let directory = tempfile::tempdir().map_err(|error| BenchError::io("make a directory", error))?;
        let store =
            MemoryStore::open(&directory.path().join("memory"), Options::default()).map_err(failed)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(|error| BenchError::io("start a runtime", error))?;
        let program = context.hypeman.canonicalize();
        let options = PagerOptions {
            program: program.map_err(|error| BenchError::io("find hypeman", error))?,
            directory: directory.path().join("run"),
            log: directory.path().join("pager.log"),
            release: "bench".into(),
            cache_bytes: 1 << 30,
            graduate_after: None,
        };
        Ok(Self {
            directory,
            runtime,
            options,
            store,
            memory: Arc::new(memory),
        })
    }

    fn image(&self, framed: bool) -> Result<MemoryId> {
        let id = MemoryId::random().map_err(failed)?;
        let source = Memory(Arc::clone(&self.memory));
        let bytes = self.memory.len() as u64;
        self.store
            .capture(&id, bytes, None, &source, Elsewhere::Zero)
            .map_err(failed)?;
        if framed {
            let cancel = AtomicBool::new(false);
            self.store
                .compress(&id, Codec::Zstd(1), &cancel, &|_, _| {})
                .and_then(|_| self.store.drop_raw(id))
                .map_err(failed)?;
        }
        Ok(id)
    }

    /// Starts a pager, calls `work` with it, and waits until it has ended.
    fn with_pager<T>(&self, work: impl FnOnce(&Pager) -> Result<T>) -> Result<T> {
        let pager = self.runtime.block_on(async { Pager::new(self.options.clone()) });
        let outcome = work(&pager);
        self.runtime.block_on(async {
            let client = pager.ensure().await.map_err(failed)?;
            for machine in client.machines() {
                match client.forget(&machine).await {
                    // Its end was noticed before.
                    Ok(()) | Err(PagerError::Refused(_)) => {}
                    Err(error) => return Err(failed(error)),
                }
            }
            client.drain().await.map_err(failed)?;
            client.gone().await;
            Ok::<_, BenchError>(())
        })?;
        outcome
    }

    fn machine(&self, pager: &Pager, name: &str, image: MemoryId, working_set: bool) -> Result<Machine> {
        let registration = Registration {
            machine: name.into(),
            store: self.directory.path().join("memory"),
            image,
            memory_bytes: self.memory.len() as u64,
            socket: self.directory.path().join(format!("{name}.sock")),
            overlay: Vec::new(),
            working_set,
        };
        let served = self
            .runtime
            .block_on(pager.register(registration))
            .map_err(failed)?;
        let memory =
            WatchedMemory::new(self.memory.len()).map_err(|error| BenchError::io("watch memory", error))?;
        let mut events = served.pager().events();
        let stream = memory
            .send(&served.socket, memory.firecracker_message().as_bytes())
            .map_err(|error| BenchError::io("reach the pager", error))?;
        self.runtime.block_on(async {
            loop {
                match served.pager().machine(name) {
                    Some(MachineState::Serving) => return Ok(()),
                    Some(MachineState::Failed { reason, .. }) => return Err(failed(reason)),
                    _ => events.recv().await.map_err(failed)?,
                };
            }
        })?;
        Ok(Machine {
            memory,
            _stream: stream,
        })
    }

    /// Pages of which each is a fault of its own, in no order.
    fn scattered(&self) -> Vec<usize> {
        let mut pages: Vec<usize> = (0..self.memory.len() / PAGE_BYTES).step_by(WINDOW).collect();
        shuffle(&mut pages);
        pages
    }

    fn latency(&self, section: &mut Section, name: &str, image: MemoryId) -> Result<()> {
        let pages = self.scattered();
        let (cold, warm) = self.with_pager(|pager| {
            // One fault in each piece first, then the rest: those of the first kind wait for the store.
            let mut seen = std::collections::HashSet::new();
            let (first, rest): (Vec<usize>, Vec<usize>) = pages
                .iter()
                .partition(|page| seen.insert(*page * PAGE_BYTES / CHUNK_BYTES));
            let machine = self.machine(pager, "latency", image, false)?;
            Ok((touch(&machine.memory, &first), touch(&machine.memory, &rest)))
        })?;
        let copies = self.copies(&pages);
        for (what, sample) in [("from RAM", &warm), ("first in its piece", &cold)] {
            for percent in [50.0, 99.0] {
                section.row(
                    &format!("fault, {name}, {what}, p{percent}"),
                    "µs",
                    microseconds(sample.percentile(percent)),
                    Some(microseconds(copies.percentile(percent))),
                    Goal::None,
                );
            }
        }
        Ok(())
    }

    /// How long it takes to copy each of the pages into memory that nobody has touched.
    fn copies(&self, pages: &[usize]) -> Sample {
        let mut target = vec![0_u8; self.memory.len()];
        let copy = |page: &usize| {
            let began = Instant::now();
            let range = page * PAGE_BYTES..(page + 1) * PAGE_BYTES;
            target[range.clone()].copy_from_slice(&self.memory[range]);
            std::hint::black_box(&target);
            began.elapsed()
        };
        pages.iter().map(copy).collect()
    }

    fn crowd(&self, section: &mut Section, name: &str, image: MemoryId, rounds: usize) -> Result<()> {
        let (mut ours, mut peer, mut calm) = (Vec::new(), Vec::new(), Calm::default());
        self.with_pager(|pager| {
            for round in 0..=rounds {
                peer.push(all_copy(&self.memory));
                let machines = (0..CROWD)
                    .map(|number| self.machine(pager, &format!("crowd-{round}-{number}"), image, false))
                    .collect::<Result<Vec<_>>>()?;
                let began = Instant::now();
                std::thread::scope(|scope| {
                    for machine in &machines {
                        scope.spawn(|| touch_all(&machine.memory));
                    }
                });
                ours.push(began.elapsed());
                calm.look();
            }
            Ok(())
        })?;
        // The first round brings the pieces into RAM.
        let [ours, peer] = [ours, peer].map(|runs| runs.into_iter().skip(1).collect::<Sample>());
        let rate = |took: Duration| (CROWD * self.memory.len()) as f64 / 1e6 / took.as_secs_f64();
        let what = format!("{CROWD} machines at once, {name}");
        section.row(
            &what,
            "MB/s",
            rate(ours.median()),
            Some(rate(peer.median())),
            Goal::None,
        );
        if let Some(reason) = calm.disturbance(&ours, &peer) {
            section.note(format!("{what}: trust it less: {reason}"));
        }
        Ok(())
    }

    fn second_restore(&self, section: &mut Section, name: &str, framed: bool, image: MemoryId) -> Result<()> {
        let mut runs: Vec<usize> = (0..self.memory.len() / PAGE_BYTES).step_by(RUN).collect();
        shuffle(&mut runs);
        runs.truncate(runs.len() / 10);
        let pages: Vec<usize> = runs.into_iter().flat_map(|first| first..first + RUN).collect();
        self.with_pager(|pager| {
            let machine = self.machine(pager, "first", image, true)?;
            touch(&machine.memory, &pages);
            // Ends the recording, too.
            self.runtime.block_on(async {
                let client = pager.ensure().await.map_err(failed)?;
                let mut events = client.events();
                client.graduate("first").await.map_err(failed)?;
                while client.machine("first") != Some(MachineState::Graduated) {
                    events.recv().await.map_err(failed)?;
                }
                while client
                    .stats()
                    .await
                    .map_err(failed)?
                    .machines
                    .iter()
                    .any(|it| it.recording)
                {
                    tokio::task::yield_now().await;
                }
                Ok::<_, BenchError>(())
            })
        })?;
        let read = self.with_pager(|pager| {
            let machine = self.machine(pager, "second", image, true)?;
            touch(&machine.memory, &pages);
            let client = self.runtime.block_on(pager.ensure()).map_err(failed)?;
            let stats = self.runtime.block_on(client.stats()).map_err(failed)?;
            Ok(stats.cache.read_bytes)
        })?;
        section.row(
            &format!("second restore, {name}, read from the store"),
            "MB",
            read as f64 / 1e6,
            Some((pages.len() * PAGE_BYTES) as f64 / 1e6),
            match framed {
                true => Goal::RatioAtMost(2.0),
                // A machine of a raw image maps it, as a rule.
                false => Goal::None,
            },
        );
        Ok(())
    }
}

fn microseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

fn touch(memory: &WatchedMemory, pages: &[usize]) -> Sample {
    let touch = |page: &usize| {
        let began = Instant::now();
        std::hint::black_box(memory.byte(page * PAGE_BYTES));
        began.elapsed()
    };
    pages.iter().map(touch).collect()
}

fn touch_all(memory: &WatchedMemory) {
    for offset in (0..memory.length()).step_by(PAGE_BYTES) {
        std::hint::black_box(memory.byte(offset));
    }
}

fn all_copy(memory: &[u8]) -> Duration {
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..CROWD {
            scope.spawn(|| {
                let mut target = vec![0_u8; memory.len()];
                for (to, from) in target.chunks_mut(PAGE_BYTES).zip(memory.chunks(PAGE_BYTES)) {
                    to.copy_from_slice(from);
                }
                std::hint::black_box(&target);
            });
        }
    });
    began.elapsed()
}

/// The same order in each run.
fn shuffle(pages: &mut [usize]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for index in (1..pages.len()).rev() {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        pages.swap(index, (state >> 33) as usize % (index + 1));
    }
}
