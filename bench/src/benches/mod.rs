//! The benches, by name.

mod boot;
mod convert;
mod exec;
mod list;
mod memory;
mod seed;

pub use convert::convert_once;

use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::report::Section;

/// Runs one bench.
type Run = fn(&Context, &mut Section) -> Result<()>;

/// All benches: name, what is measured against what, and the code.
pub const ALL: [(&str, &str, Run); 5] = [
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
    ("memory", "resident memory of the server", memory::run),
];

/// Runs a bench and says why when there are no numbers.
pub fn run(name: &'static str, title: &str, bench: Run, context: &Context) -> Section {
    let mut section = Section::new(name, title);
    match bench(context, &mut section) {
        Ok(()) => {}
        Err(BenchError::Missing(reason)) => section.skipped = Some(reason),
        Err(error) => section.skipped = Some(format!("failed: {error}")),
    }
    section
}
