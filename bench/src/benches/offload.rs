//! Cloud Hypervisor's offload protocol, against our own way to capture and restore the same guest.
//!
//! ```text
//!  snapshot of a server ─┬─► our driver, its machine mapping the image privately       ours
//!                        └─► bare process + daemon in this program (bare_offload.rs)   reference
//! ```
//!
//! Both get the same device state and the same memory. Only the part of VMM and memory is measured: no record, no disk.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use hypeman_snapshots::{Base, Codec, Elsewhere, MemoryId, MemoryReader, MemorySource, MemoryStore, Options};
use hypeman_vmm::{Machine, MemoryBacking};

use crate::bare_cloud_hypervisor::need_version;
use crate::bare_offload::{BareOffload, Restored};
use crate::bare_restore::{BareRestore, BareVmms};
use crate::calm::Calm;
use crate::context::{Context, kernel_for_kvm};
use crate::error::{BenchError, Result};
use crate::guests::{self, Content, MEBIBYTE, Shape};
use crate::load::pause;
use crate::offload::{Taken, Way};
use crate::place::Place;
use crate::process::resident_kib;
use crate::registry::push_busybox;
use crate::report::{Goal, Section};
use crate::server::{Server, delete};
use crate::source::Source;
use crate::statistics::{Sample, milliseconds};

/// The version that brought the protocol.
const SINCE: u32 = 53;
/// The ways of the protocol, as tables name them.
const WAYS: [(Way, &str); 3] = [
    (Way::Filled, "filled before"),
    (Way::Shared, "on demand, shared"),
    (Way::Inline, "on demand, inline"),
];
/// So many guests are compared: of all, one with little in its memory and one with much.
const COMPARED: usize = 2;
/// Longer than a machine takes to pull in all of its memory.
const PULL_PATIENCE: Duration = Duration::from_secs(300);

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let program = need_version(SINCE)?;
    let context = fitting(context)?;
    let mut shapes = guests::chosen(&context)?;
    shapes.truncate(COMPARED);
    let content = Content::read(guests::most_filled(&shapes))?;
    let repetitions = context.repetitions(10, 3);
    let server = Server::start(&context)?;
    let image = push_busybox(&server)?;
    let host = BareVmms::new(&context, &Place::usual())?;
    for shape in shapes {
        let measured = keep(&server, &image, shape, &content)
            .and_then(|snapshot| Bench::new(&host, &server, &snapshot, &program, shape, repetitions))
            .map(|bench| {
                // What cannot be measured of the one is no reason against the other.
                for outcome in [bench.restores(section), bench.captures(section)] {
                    if let Err(error) = outcome {
                        section.note(format!("{}: {error}", shape.name));
                    }
                }
            });
        if let Err(error) = measured {
            section.note(format!("{}: {error}", shape.name));
            guests::remove_all(&server)?;
        }
    }
    section.note(format!(
        "medians of {repetitions}, taken in turns, one vCPU, no network, both VMMs outside of a server; restore: from the \
         start of the process until /bin/true has run, expanding included; ours maps raw memory or sealed memory of all \
         frames privately; capture: from the pause until device state and memory are in other hands, the room for memory \
         made before; reference: the same by send-migration and receive-migration with a daemon in this program"
    ));
    match section.rows.is_empty() {
        false => Ok(()),
        true => Err(BenchError::Answer(section.notes.join("\n"))),
    }
}

/// The context with Cloud Hypervisor and a kernel that somebody says runs with this host's KVM.
fn fitting(context: &Context) -> Result<Context> {
    let chosen = context.hypervisor == "cloud-hypervisor";
    let kernel = match kernel_for_kvm() {
        Some(kernel) => kernel,
        None => context.kernel.clone().filter(|_| chosen).ok_or_else(|| {
            BenchError::Missing(
                "no guest kernel is named that runs with this host's KVM: set HYPEMAN_TEST_KVM_KERNEL, or use \
                 --hypervisor cloud-hypervisor with --kernel"
                    .to_owned(),
            )
        })?,
    };
    Ok(Context {
        kernel: Some(kernel),
        hypervisor: "cloud-hypervisor".to_owned(),
        ..context.clone()
    })
}

/// A snapshot of a guest that is gone.
fn keep(server: &Server, image: &str, shape: Shape, content: &Content) -> Result<String> {
    let mut api = server.connect()?;
    let id = guests::boot(server, &mut api, image, "bench-offload", shape, content)?;
    guests::standby(&mut api, &id)?;
    let snapshot = guests::snapshot(&mut api, &id, None)?;
    delete(&mut api, &id)?;
    Ok(snapshot)
}

struct Bench<'a> {
    host: &'a BareVmms,
    captured: BareRestore<'a>,
    peer: BareOffload,
    shape: Shape,
    repetitions: usize,
    store: MemoryStore,
    root: tempfile::TempDir,
    framed: MemoryId,
}

struct RawImage(File, u64);

impl MemorySource for RawImage {
    fn extents(&self) -> Vec<std::ops::Range<u64>> {
        std::iter::once(0..self.1).collect()
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        self.0.read_exact_at(into, offset)
    }
}

fn failed(error: impl std::fmt::Display) -> BenchError {
    BenchError::Answer(error.to_string())
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| BenchError::io(format!("open {}", path.display()), error))
}

impl<'a> Bench<'a> {
    fn new(
        host: &'a BareVmms,
        server: &Server,
        snapshot: &str,
        program: &Path,
        shape: Shape,
        repetitions: usize,
    ) -> Result<Self> {
        let captured = host.of(server, snapshot)?;
        let peer = BareOffload::of(host, &captured, program)?;
        let root = tempfile::tempdir().map_err(|error| BenchError::io("make a directory", error))?;
        let store = MemoryStore::open(root.path(), Options::default()).map_err(failed)?;
        let framed = MemoryId::random().map_err(failed)?;
        let bytes = shape.memory * MEBIBYTE;
        let raw = RawImage(open(&captured.memory)?, bytes);
        store
            .capture(&framed, bytes, None, &raw, Elsewhere::Zero)
            .map_err(failed)?;
        store
            .compress(&framed, Codec::Zstd(1), &AtomicBool::new(false), &|_, _| {})
            .and_then(|_| store.drop_raw(framed))
            .map_err(failed)?;
        Ok(Self {
            host,
            captured,
            peer,
            shape,
            repetitions,
            store,
            root,
            framed,
        })
    }

    fn restores(&self, section: &mut Section) -> Result<()> {
        for framed in [false, true] {
            let form = if framed { "framed" } else { "raw" };
            let (mut ours, mut calm) = (Vec::new(), Calm::default());
            // Once without measuring: it warms the caches of all, and shows what is possible here.
            self.ours(framed)?;
            let ways = self.possible(section, framed);
            let mut theirs = vec![Vec::new(); ways.len()];
            let (mut own, mut pulled, mut pulling) = (0, 0, Vec::new());
            for _ in 0..self.repetitions {
                let (took, changed) = self.ours(framed)?;
                own = changed;
                ours.push(took);
                for ((way, _), runs) in ways.iter().zip(&mut theirs) {
                    let (restored, took) = self.restored(*way, framed)?;
                    let answered = Instant::now();
                    runs.push(took);
                    if *way == Way::Inline {
                        while !restored.has_all() {
                            if answered.elapsed() > PULL_PATIENCE {
                                return Err(failed("a machine did not pull in all of its memory"));
                            }
                            pause(Duration::from_millis(1));
                        }
                        pulling.push(took + answered.elapsed());
                        pulled = resident_kib(restored.process())?.1;
                    }
                    restored.end();
                    self.captured.forget(1);
                }
                calm.look();
            }
            let ours: Sample = ours.into_iter().collect();
            for ((_, way), runs) in ways.iter().zip(theirs) {
                let name = format!("restore, {form}, {way}, {}", self.shape.name);
                section.judged(&name, &ours, &runs.into_iter().collect(), Goal::None, &calm);
            }
            if pulling.is_empty() {
                continue;
            }
            section.row(
                &format!("memory that no file backs, {form}, inline, {}", self.shape.name),
                "MiB",
                own as f64 / 1024.0,
                Some(pulled as f64 / 1024.0),
                Goal::None,
            );
            section.note(format!(
                "{form}, {}: on demand, all pages had been pulled in after {:.0} ms; until then such a machine refuses to \
                 be captured",
                self.shape.name,
                milliseconds(pulling.into_iter().collect::<Sample>().median())
            ));
        }
        Ok(())
    }

    /// The ways by which a machine comes back here at all; the others are noted.
    fn possible(&self, section: &mut Section, framed: bool) -> Vec<(Way, &'static str)> {
        let mut ways = WAYS.to_vec();
        ways.retain(|(way, name)| match self.restored(*way, framed) {
            Ok((restored, _)) => {
                restored.end();
                self.captured.forget(1);
                true
            }
            Err(error) => {
                section.note(format!("restore, {name}, {}: {error}", self.shape.name));
                false
            }
        });
        ways
    }

    /// Our way: the time until the guest has run a command, and the KiB of its VMM then that no file backs.
    fn ours(&self, framed: bool) -> Result<(Duration, u64)> {
        let mut spec = self.captured.spec(0)?;
        let began = Instant::now();
        let laid_out = match framed {
            true => Some(self.store.materialize(&self.framed).map_err(failed)?),
            false => None,
        };
        if let Some(Base::Memfd(memory)) = laid_out.as_ref().map(|laid_out| &laid_out.base) {
            let path = format!("/proc/{}/fd/{}", std::process::id(), memory.as_raw_fd());
            spec.memory = MemoryBacking::Private(path.into());
        }
        let machine = self.captured.start(spec, None)?;
        let took = began.elapsed();
        let resident = resident_kib(machine.process().pid);
        end(self.host, machine.as_ref());
        self.captured.forget(0);
        Ok((took, resident?.1))
    }

    /// The protocol's way: the machine, and the time until its guest has run a command.
    fn restored(&self, way: Way, framed: bool) -> Result<(Restored, Duration)> {
        self.captured.forget(1);
        let spec = self.captured.spec(1)?;
        let began = Instant::now();
        let source = match framed {
            true => {
                let reader = MemoryReader::open(self.root.path(), self.framed).map_err(failed)?;
                Source::Framed(Box::new(reader))
            }
            false => Source::Raw(open(&self.captured.memory)?),
        };
        let key = &self.captured.key;
        let restored = self.peer.restore(self.host, key, &spec, way, source)?;
        Ok((restored, began.elapsed()))
    }

    fn captures(&self, section: &mut Section) -> Result<()> {
        let mut calm = Calm::default();
        let [mut booted, mut later, mut theirs] = [const { Vec::new() }; 3];
        for round in 0..=self.repetitions {
            let all = self.captured_by_us(true)?;
            let changed = self.captured_by_us(false)?;
            let taken = self.captured_by_offload()?;
            if round > 0 {
                booted.push(all);
                later.push(changed);
                theirs.push(taken);
            }
            calm.look();
        }
        let in_hand = |taken: &Taken| taken.in_hand;
        let copied = |taken: &Taken| taken.copied;
        self.capture_row(
            section,
            &calm,
            "capture, memory left in place",
            &booted,
            &theirs,
            in_hand,
        );
        self.capture_row(
            section,
            &calm,
            "capture, all of memory copied",
            &booted,
            &theirs,
            copied,
        );
        self.capture_row(
            section,
            &calm,
            "capture of a restored guest, copied",
            &later,
            &theirs,
            copied,
        );
        Ok(())
    }

    fn capture_row(
        &self,
        section: &mut Section,
        calm: &Calm,
        what: &str,
        ours: &[Taken],
        theirs: &[Taken],
        of: impl Fn(&Taken) -> Duration,
    ) {
        let [ours, theirs] = [ours, theirs].map(|runs| runs.iter().map(&of).collect::<Sample>());
        let name = format!("{what}, {}", self.shape.name);
        section.judged(&name, &ours, &theirs, Goal::None, calm);
    }

    /// Our way. `all`: the memory is the process's own, as after a boot; else what did not change is the file's.
    fn captured_by_us(&self, all: bool) -> Result<Taken> {
        let spec = self.captured.spec(0)?;
        let machine = match all {
            true => self.captured.start_filled(spec)?,
            false => self.captured.start(spec, None)?,
        };
        let taken = self.host.runtime.block_on(take(machine.as_ref()));
        end(self.host, machine.as_ref());
        self.captured.forget(0);
        taken
    }

    fn captured_by_offload(&self) -> Result<Taken> {
        let (restored, _) = self.restored(Way::Filled, false)?;
        let taken = restored.capture();
        restored.end();
        self.captured.forget(1);
        taken
    }
}

/// Captures a machine twice: its devices alone, and then its memory with them.
async fn take(machine: &dyn Machine) -> Result<Taken> {
    let memory = machine.guest_memory().await.map_err(failed)?;
    let began = Instant::now();
    machine.pause().await.map_err(failed)?;
    machine.save_devices().await.map_err(failed)?;
    let in_hand = began.elapsed();
    machine.resume().await.map_err(failed)?;
    let room = memory.room_for_copy().map_err(failed)?;
    let began = Instant::now();
    machine.pause().await.map_err(failed)?;
    let copying = tokio::task::spawn_blocking(move || {
        let ranges = memory.populated()?;
        memory.copy_into(room, &ranges)
    });
    let (devices, copy) = tokio::join!(machine.save_devices(), copying);
    let copied = began.elapsed();
    devices.map_err(failed)?;
    copy.map_err(failed)?.map_err(failed)?;
    Ok(Taken { in_hand, copied })
}

fn end(host: &BareVmms, machine: &dyn Machine) {
    let _ = host.runtime.block_on(machine.kill());
}
