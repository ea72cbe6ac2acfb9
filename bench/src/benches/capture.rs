//! What keeping a guest costs: how long it stands still, how long standby takes, what a second standby writes.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::in_each_place;
use crate::bare_pause::{BarePause, Written};
use crate::bare_restore::BareVmms;
use crate::calm::Calm;
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::guests::{self, Content, MEBIBYTE, Shape};
use crate::http::Connection;
use crate::registry::push_busybox;
use crate::report::{Goal, Section};
use crate::server::{Server, call, delete, restore};
use crate::statistics::{Sample, milliseconds};

/// Bytes a second that a copy within RAM is allowed to take.
const COPY_RATE: f64 = 2e9;
/// What the server's own log of an instance says of a capture.
const STOOD_STILL: &str = "the guest stood still for ";
/// The file of a memory image in its raw form.
const RAW: &str = "memory.raw";
/// Bytes that a guest changes between two standbys.
const CHANGED: u64 = 16 * MEBIBYTE;

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let shapes = guests::chosen(context)?;
    let content = Content::read(guests::most_filled(&shapes) + 64)?;
    let repetitions = context.repetitions(10, 3);
    in_each_place(context, section, |section, place| {
        let server = Server::start_in(context, place)?;
        let image = push_busybox(&server)?;
        let bare = BareVmms::new(context, place)?;
        let mut api = server.connect()?;
        for shape in shapes.iter().copied() {
            let mut bench = Bench {
                server: &server,
                api: &mut api,
                image: &image,
                content: &content,
                bare: &bare,
                repetitions,
                suffix: place.suffix,
            };
            if let Err(error) = bench
                .pauses(section, shape)
                .and_then(|()| bench.standbys(section, shape))
            {
                section.note(format!("{}{}: {error}", shape.name, place.suffix));
                api = server.connect()?;
                guests::remove_all(&server)?;
            }
        }
        Ok(())
    })?;
    section.note(format!(
        "medians of {repetitions}; pause: as the instance's own log has it, reference: copying the guest's changed \
         memory at 2 GB/s; pause, bare: the same pauses, reference: the same guest on the VMM by itself in the same place, in \
         turns, from the call that stops it until the answer of the one that lets it go on, all memory and devices \
         written to files between; or of memory what changed since the last time, where the VMM can; standby: from the call until its answer, reference: dd with conv=fsync of the pages that \
         are not zero, from RAM to the same file system, in turns; second standby: what memory images take on disk, \
         reference: the pages that the restored guest had changed"
    ));
    match section.rows.is_empty() {
        false => Ok(()),
        true => Err(BenchError::Answer(section.notes.join("\n"))),
    }
}

struct Bench<'a> {
    server: &'a Server,
    api: &'a mut Connection,
    image: &'a str,
    content: &'a Content,
    bare: &'a BareVmms,
    repetitions: usize,
    suffix: &'static str,
}

impl Bench<'_> {
    fn boot(&mut self, shape: Shape) -> Result<String> {
        let name = "bench-capture";
        guests::boot(self.server, self.api, self.image, name, shape, self.content)
    }

    fn changed(&self, id: &str, shape: Shape) -> Result<u64> {
        let process = guests::vmm(self.server, id)?;
        Ok(guests::footprint(process, shape.memory)?.anonymous_guest)
    }

    /// A running guest is captured again and again.
    fn pauses(&mut self, section: &mut Section, shape: Shape) -> Result<()> {
        let id = self.boot(shape)?;
        let (mut pauses, mut copies, mut calm) = (Vec::new(), Vec::new(), Calm::default());
        let mut peer = Err(BenchError::Missing("it was not started".to_owned()));
        for round in 0..=self.repetitions {
            let bytes = self.changed(&id, shape)?;
            let snapshot = guests::snapshot(self.api, &id, None)?;
            if round == 0 {
                peer = Peer::start(self.bare, self.server, &snapshot);
            } else {
                pauses.push(last_pause(self.server, &id)?);
                copies.push(Duration::from_secs_f64(bytes as f64 / COPY_RATE));
            }
            // The first time it finds more changed than later.
            if let Ok(running) = &mut peer
                && let Err(error) = running.pause(round > 0)
            {
                peer = Err(error);
            }
            call(self.api, "DELETE", &format!("/snapshots/{snapshot}"), None, 204)?;
            calm.look();
        }
        delete(self.api, &id)?;
        let [pauses, copies] = [pauses, copies].map(|runs| runs.into_iter().collect::<Sample>());
        let name = format!("pause, {}{}", shape.name, self.suffix);
        section.judged(&name, &pauses, &copies, Goal::MoreByAtMost(15.0), &calm);
        section.note(format!(
            "{name}: {:.0} MiB to copy; longest {:.1} ms",
            copies.median().as_secs_f64() * COPY_RATE / MEBIBYTE as f64,
            milliseconds(pauses.percentile(100.0)),
        ));
        match peer {
            Ok(peer) => peer.rows(section, &format!("{}{}", shape.name, self.suffix), &pauses, &calm),
            Err(error) => section.note(format!("{name}: no bare pause: {error}")),
        }
        Ok(())
    }

    fn standbys(&mut self, section: &mut Section, shape: Shape) -> Result<()> {
        let (mut ours, mut peer, mut calm) = (Vec::new(), Vec::new(), Calm::default());
        let (mut written, mut changed) = (0, 0);
        let memory = self.server.data_directory().join("memory");
        for round in 0..=self.repetitions {
            let id = self.boot(shape)?;
            let began = Instant::now();
            guests::standby(self.api, &id)?;
            let took = began.elapsed();
            let dense = not_zero(&newest(&memory)?.join(RAW))?;
            let reference = written_by_dd(&dense, &self.server.data_directory())?;
            restore(self.api, &id)?;
            if shape.filled > 0 {
                let other = self.content.part(shape.filled * MEBIBYTE, CHANGED);
                guests::change(self.server, &id, 8 * MEBIBYTE, other)?;
            }
            let touched = self.changed(&id, shape)?;
            guests::standby(self.api, &id)?;
            if round > 0 {
                ours.push(took);
                peer.push(reference);
                written += guests::disk_usage(&newest(&memory)?);
                changed += touched;
            }
            delete(self.api, &id)?;
            calm.look();
        }
        let [ours, peer] = [ours, peer].map(|runs| runs.into_iter().collect::<Sample>());
        let name = format!("standby, {}{}", shape.name, self.suffix);
        section.judged(&name, &ours, &peer, Goal::RatioAtMost(1.2), &calm);
        let rounds = self.repetitions as f64 * MEBIBYTE as f64;
        section.row(
            &format!("second standby, {}{}", shape.name, self.suffix),
            "MiB",
            written as f64 / rounds,
            Some(changed as f64 / rounds),
            Goal::RatioAtMost(1.1),
        );
        Ok(())
    }
}

/// The same guest on the VMM by itself.
struct Peer {
    machine: BarePause,
    pauses: Vec<(Written, Vec<Duration>)>,
}

impl Peer {
    fn start(host: &BareVmms, server: &Server, snapshot: &str) -> Result<Self> {
        let machine = BarePause::start(host, &host.of(server, snapshot)?)?;
        let kinds = machine.kinds().iter();
        let pauses = kinds.map(|written| (*written, Vec::new())).collect();
        Ok(Self { machine, pauses })
    }

    fn pause(&mut self, counts: bool) -> Result<()> {
        for (written, pauses) in &mut self.pauses {
            let took = self.machine.pause(*written)?;
            if counts {
                pauses.push(took);
            }
        }
        Ok(())
    }

    fn rows(self, section: &mut Section, guest: &str, ours: &Sample, calm: &Calm) {
        for (written, pauses) in self.pauses {
            let (what, goal) = match written {
                Written::All => ("pause, bare, all written", Goal::RatioAtMost(1.0)),
                Written::Changed => ("pause, bare, changes written", Goal::None),
            };
            let bare: Sample = pauses.into_iter().collect();
            section.judged(&format!("{what}, {guest}"), ours, &bare, goal, calm);
        }
    }
}

/// How long a guest stood still when it was captured last.
pub(super) fn last_pause(server: &Server, id: &str) -> Result<Duration> {
    let path = server
        .data_directory()
        .join("instances")
        .join(id)
        .join("logs/hypeman.log");
    let text = fs::read_to_string(path).map_err(|error| BenchError::io("read an instance's log", error))?;
    pause_in(&text).ok_or_else(|| BenchError::Answer("the log says nothing of a pause".into()))
}

fn pause_in(log: &str) -> Option<Duration> {
    let (_, rest) = log.rsplit_once(STOOD_STILL)?;
    let milliseconds: f64 = rest.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_secs_f64(milliseconds / 1000.0))
}

/// The memory image that was made last.
fn newest(memory: &Path) -> Result<PathBuf> {
    let images = fs::read_dir(memory).map_err(|error| BenchError::io("list memory images", error))?;
    images
        .flatten()
        .map(|image| image.path())
        .filter_map(|path| Some((path.join(RAW).metadata().ok()?.modified().ok()?, path)))
        .max()
        .map(|(_, path)| path)
        .ok_or_else(|| BenchError::Answer("there is no memory image".into()))
}

/// A file in RAM with the pages of `image` that are not zero.
fn not_zero(image: &Path) -> Result<tempfile::NamedTempFile> {
    let fail = |error| BenchError::io("read guest memory", error);
    let ram = Path::new("/dev/shm");
    let mut dense = tempfile::NamedTempFile::new_in(ram).map_err(fail)?;
    let bytes = fs::read(image).map_err(fail)?;
    let plain: Vec<u8> = bytes
        .chunks(4096)
        .filter(|page| page.iter().any(|byte| *byte != 0))
        .flatten()
        .copied()
        .collect();
    dense.write_all(&plain).map_err(fail)?;
    dense.flush().map_err(fail)?;
    Ok(dense)
}

fn written_by_dd(source: &tempfile::NamedTempFile, directory: &Path) -> Result<Duration> {
    let fail = |error| BenchError::io("run dd", error);
    let target = directory.join("dd");
    // What others have left to be written is not dd's.
    File::open(directory)
        .and_then(|directory| rustix::fs::syncfs(directory).map_err(Into::into))
        .map_err(fail)?;
    let began = Instant::now();
    let status = Command::new("dd")
        .arg(format!("if={}", source.path().display()))
        .arg(format!("of={}", target.display()))
        .args(["bs=1M", "conv=fsync", "status=none"])
        .status()
        .map_err(fail)?;
    let took = began.elapsed();
    let _ = fs::remove_file(target);
    if status.success() {
        return Ok(took);
    }
    Err(BenchError::Answer(format!("dd ended with {status}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_pause_of_a_log_counts() {
        let log = "t captured; the guest stood still for 9.5 ms\nt x\nt captured; the guest stood still for 12.3 ms\n";
        assert_eq!(pause_in(log), Some(Duration::from_micros(12_300)));
        assert_eq!(pause_in("t restored\n"), None);
    }
}
