//! An image's layers to a root disk: time and peak memory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hypeman_images::layers::{self, Compression, ConvertObserver, ConvertOptions, LayerSource};

use crate::context::{Context, need_program};
use crate::error::{BenchError, Result};
use crate::load::pause;
use crate::process::peak_kib;
use crate::report::{Goal, Section};
use crate::statistics::{Sample, milliseconds};
use crate::tree::{self, Layout};

const MEBIBYTE: f64 = 1024.0;

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let repetitions = context.repetitions(10, 2);
    let megabytes = if context.quick { 100 } else { 500 };
    let folder = tempfile::Builder::new()
        .prefix("hypeman-bench-image-")
        .tempdir()
        .map_err(|error| BenchError::io("make a directory", error))?;
    let layout = tree::write(&folder.path().join("layout"), megabytes << 20)?;
    for lz4 in [false, true] {
        let (name, what) = if lz4 { ("lz4", ", lz4") } else { ("plain", "") };
        let (mut ours, mut memory) = (Vec::new(), 0);
        let (mut theirs, mut their_memory) = (Vec::new(), 0);
        let peer = need_program("umoci").and_then(|umoci| Ok((umoci, need_program("mkfs.erofs")?)));
        for _ in 0..repetitions {
            let (took, peak) = convert_in_child(&layout, folder.path(), lz4)?;
            ours.push(took);
            memory = memory.max(peak);
            if let Ok((umoci, mkfs)) = &peer {
                let (took, peak) = convert_by_peer(umoci, mkfs, &layout, folder.path(), lz4)?;
                theirs.push(took);
                their_memory = their_memory.max(peak);
            }
        }
        let (ours, theirs): (Sample, Sample) = (ours.into_iter().collect(), theirs.into_iter().collect());
        let reference = (theirs.len() > 0).then(|| milliseconds(theirs.median()));
        // "At least twice as fast" as a ratio of times.
        section.row(
            &format!("time{what}"),
            "ms",
            milliseconds(ours.median()),
            reference,
            Goal::RatioAtMost(0.5),
        );
        let reference = (their_memory > 0).then_some(their_memory as f64 / MEBIBYTE);
        section.row(
            &format!("peak memory{what}"),
            "MiB",
            memory as f64 / MEBIBYTE,
            reference,
            Goal::AtMost(64.0),
        );
        if let Err(reason) = peer {
            section.note(format!("{name}: no reference: {reason}"));
        }
    }
    section.note(format!(
        "medians of {repetitions}, taken in turns; {megabytes} MB in {} gzip layers, {} entries",
        layout.layers.len(),
        layout.entries
    ));
    Ok(())
}

/// Runs our conversion in a process of its own, so that its peak memory is its own.
fn convert_in_child(layout: &Layout, folder: &Path, lz4: bool) -> Result<(Duration, u64)> {
    let program = std::env::current_exe().map_err(|error| BenchError::io("find this program", error))?;
    let disk = folder.join("ours.erofs");
    let mut command = Command::new(program);
    command
        .arg("convert-once")
        .arg(&disk)
        .args(if lz4 { &["--lz4"][..] } else { &[] });
    command.args(&layout.layers);
    let measured = timed(&mut command)?;
    fs::remove_file(&disk).map_err(|error| BenchError::io("remove a root disk", error))?;
    Ok(measured)
}

fn convert_by_peer(
    umoci: &Path,
    mkfs: &Path,
    layout: &Layout,
    folder: &Path,
    lz4: bool,
) -> Result<(Duration, u64)> {
    let (bundle, disk) = (folder.join("bundle"), folder.join("theirs.erofs"));
    let mut unpack = Command::new(umoci);
    unpack
        .args(["unpack", "--image"])
        .arg(format!("{}:bench", layout.folder.display()))
        .arg(&bundle);
    if !rustix::process::geteuid().is_root() {
        unpack.arg("--rootless");
    }
    let (unpacking, unpack_peak) = timed(&mut unpack)?;
    let mut make = Command::new(mkfs);
    make.args(if lz4 { &["-zlz4"][..] } else { &[] })
        .arg(&disk)
        .arg(bundle.join("rootfs"));
    let (making, make_peak) = timed(&mut make)?;
    for outcome in [fs::remove_dir_all(&bundle), fs::remove_file(&disk)] {
        outcome.map_err(|error| BenchError::io("remove what the peer made", error))?;
    }
    Ok((unpacking + making, unpack_peak.max(make_peak)))
}

/// Runs a program to its end; returns how long it took and the most memory it had, in KiB.
fn timed(command: &mut Command) -> Result<(Duration, u64)> {
    let name = command.get_program().to_string_lossy().into_owned();
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| BenchError::io(format!("start {name}"), error))?;
    let mut peak = 0;
    loop {
        peak = peak.max(peak_kib(child.id()).unwrap_or(0));
        if let Some(status) = child
            .try_wait()
            .map_err(|error| BenchError::io(format!("watch {name}"), error))?
        {
            let took = started.elapsed();
            if status.success() {
                return Ok((took, peak));
            }
            let mut complaint = String::new();
            if let Some(mut errors) = child.stderr.take() {
                let _ = std::io::Read::read_to_string(&mut errors, &mut complaint);
            }
            return Err(BenchError::Answer(format!(
                "{name} ended with {status}: {}",
                complaint.trim()
            )));
        }
        pause(Duration::from_millis(2));
    }
}

struct Silent;

impl ConvertObserver for Silent {
    fn progress(&self, _: u64, _: u64) {}

    fn cancelled(&self) -> bool {
        false
    }
}

/// Converts gzip layers, lowest first, to a root disk.
///
/// # Errors
/// The conversion's own.
pub fn convert_once(disk: &Path, layers: &[PathBuf], lz4: bool) -> Result<()> {
    let fail = |error| BenchError::io("read a layer", error);
    let mut sources = Vec::new();
    for path in layers {
        let opened = path.clone();
        sources.push(LayerSource {
            media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
            digest: None,
            size: fs::metadata(path).map_err(fail)?.len(),
            diff_id: None,
            open: Box::new(move || Ok(Box::new(File::open(&opened)?))),
        });
    }
    let output = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(disk)
        .map_err(fail)?;
    let compression = if lz4 { Compression::Lz4 } else { Compression::None };
    let options = ConvertOptions {
        compression,
        ..ConvertOptions::default()
    };
    layers::convert(&sources, &output, &options, &Silent)
        .map_err(|error| BenchError::Answer(format!("conversion: {error}")))?;
    Ok(())
}
