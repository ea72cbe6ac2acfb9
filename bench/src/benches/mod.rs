//! The benches, by name.

mod boot;
mod capture;
mod compression;
mod convert;
mod exec;
mod fork;
mod kept;
mod list;
mod memory;
mod offload;
mod pager;
mod restore;
mod scaling;
mod seed;
mod snapshots;
mod virsh;

pub use convert::convert_once;

use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::place::Place;
use crate::report::Section;

/// Runs one bench.
type Run = fn(&Context, &mut Section) -> Result<()>;

/// All benches: name, what is measured against what, and the code.
pub const ALL: [(&str, &str, Run); 14] = [
    (
        "boot",
        "create to Running, against bare QEMU booting the same kernel to an init that exits",
        boot::run,
    ),
    (
        "exec",
        "`hypeman exec … /bin/true`, against the guest's own cost of it",
        exec::run,
    ),
    (
        "convert",
        "500 MB image in 5 layers to a root disk, against umoci unpack + mkfs.erofs",
        convert::run,
    ),
    (
        "list",
        "GET /instances with 1,000 stored, against a bare HTTP server with the same bytes",
        list::run,
    ),
    (
        "snapshots",
        "GET /snapshots with 100,000 stored, against serialising the same objects",
        snapshots::run,
    ),
    (
        "restore",
        "standby to an answering guest, against a bare VMM that resumes the same state",
        restore::run,
    ),
    (
        "fork",
        "forks of a snapshot, one and 20 at once, against as many bare VMMs from the same state",
        fork::run,
    ),
    (
        "capture",
        "pause of a running source, and standby, against copying in RAM, the VMM's own snapshot, and dd with sync",
        capture::run,
    ),
    (
        "scaling",
        "restore of a larger guest, pause after much was written, each against the same without",
        scaling::run,
    ),
    (
        "compression",
        "compressing memory, against zstd and lz4 on the same bytes; ten snapshots of one guest",
        compression::run,
    ),
    (
        "virsh",
        "save, restore and snapshot of a running guest, against libvirt with the same QEMU and guest",
        virsh::run,
    ),
    (
        "pager",
        "page faults served from stored memory, against copying the same pages",
        pager::run,
    ),
    (
        "offload",
        "capture and restore on Cloud Hypervisor, against its own offload protocol with the same guest",
        offload::run,
    ),
    ("memory", "resident memory of the server", memory::run),
];

/// Runs a bench and says why when there are no numbers.
pub fn run(name: &'static str, title: &str, bench: Run, context: &Context) -> Section {
    let mut section = Section::new(name, title);
    let (load, cores) = (
        load_average(),
        std::thread::available_parallelism().map_or(1, usize::from),
    );
    if load > 0.5 {
        section.note(format!(
            "the machine was not idle: load {load} on {cores} cores before this bench, so trust no absolute number"
        ));
    }
    match bench(context, &mut section) {
        Ok(()) => {}
        Err(BenchError::Missing(reason)) => section.skipped = Some(reason),
        Err(error) => section.skipped = Some(format!("failed: {error}")),
    }
    section
}

/// Measures where temporary files usually are, and on a file system whose files share blocks, where that can be had.
fn in_each_place(
    context: &Context,
    section: &mut Section,
    mut measure: impl FnMut(&mut Section, &Place) -> Result<()>,
) -> Result<()> {
    measure(section, &Place::usual())?;
    if context.usual_place {
        return Ok(());
    }
    match Place::sharing() {
        Ok(place) => measure(section, &place),
        Err(reason) => {
            section.note(format!("XFS with shared blocks was skipped: {reason}"));
            Ok(())
        }
    }
}

/// Processes that wanted to run, on average over the last minute.
fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ')
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or(0.0)
}
