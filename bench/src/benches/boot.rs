//! How long a new instance takes to answer, and how much of that is ours.

use std::time::Instant;

use crate::bare_qemu::BareMachine;
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::http::Connection;
use crate::process;
use crate::registry::push_busybox;
use crate::report::{Goal, Section};
use crate::server::{Server, create_running, delete, small_instance};
use crate::statistics::{Sample, milliseconds};

const BOARDS: [&str; 2] = ["qemu", "qemu-microvm"];

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let repetitions = context.repetitions(11, 3);
    let server = Server::start(context)?;
    let image = push_busybox(&server)?;
    let mut api = server.connect()?;
    for board in BOARDS {
        match measure(&server, &mut api, &image, board, repetitions) {
            Ok((ours, bare)) => {
                let (ours, bare) = (milliseconds(ours.median()), milliseconds(bare.median()));
                // Nothing boots faster than the bare machine: then something else decided, and there is no verdict.
                let disturbed = ours < bare;
                let goal = if disturbed {
                    Goal::None
                } else {
                    Goal::RatioAtMost(1.35)
                };
                section.row(board, "ms", ours, Some(bare), goal);
                section.row(
                    &format!("{board}, our share"),
                    "ms",
                    ours - bare,
                    None,
                    Goal::None,
                );
                if disturbed {
                    section.note(format!(
                        "{board}: disturbed by other work on this machine, so not judged"
                    ));
                }
            }
            Err(error) => section.note(format!("{board}: {error}")),
        }
    }
    if section.rows.is_empty() {
        return Err(BenchError::Answer(format!(
            "no board booted:\n{}",
            section.notes.join("\n")
        )));
    }
    section.note(format!(
        "medians of {repetitions}, taken in turns; 256 MiB, one vCPU, no network"
    ));
    Ok(())
}

fn measure(
    server: &Server,
    api: &mut Connection,
    image: &str,
    board: &str,
    repetitions: usize,
) -> Result<(Sample, Sample)> {
    let folder = tempfile::tempdir().map_err(|error| BenchError::io("make a directory", error))?;
    // The first boot fills caches of both, and tells how the bare machine is to be started.
    let warm = create_running(api, &small_instance("bench-warm", image, board))?;
    let words = process::started_for(&warm)
        .into_iter()
        .find(|(id, _)| *id != server.process())
        .map(|(_, words)| words)
        .ok_or_else(|| BenchError::Missing("the VMM's process was not found".into()))?;
    delete(api, &warm)?;
    let bare = BareMachine::like(&words, folder.path())?;
    bare.boot()?;

    let (mut ours, mut reference) = (Vec::new(), Vec::new());
    for round in 0..repetitions {
        let body = small_instance(&format!("bench-{board}-{round}"), image, board);
        let started = Instant::now();
        let id = create_running(api, &body)?;
        ours.push(started.elapsed());
        delete(api, &id)?;
        reference.push(bare.boot()?);
    }
    Ok((ours.into_iter().collect(), reference.into_iter().collect()))
}
