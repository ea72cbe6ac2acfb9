//! What the server itself holds in memory.

use std::time::Duration;

use super::seed::{STORED, server_with_instances};
use crate::context::Context;
use crate::error::Result;
use crate::load::pause;
use crate::process::resident_kib;
use crate::registry::push_busybox;
use crate::report::{Goal, Section};
use crate::server::{Server, call, create_running, delete, small_instance};

/// Instances that run before counting starts: what they need once is not theirs.
const WARM: u32 = 2;

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let count: u32 = if context.quick { 4 } else { 16 };
    let server = Server::start(context)?;
    let mut api = server.connect()?;
    for _ in 0..100 {
        call(&mut api, "GET", "/instances", None, 200)?;
    }
    let idle = settled(&server)?;
    section.row("idle", "MiB", idle.0 as f64 / 1024.0, None, Goal::AtMost(40.0));
    section.row(
        "idle, not backed by files",
        "MiB",
        idle.1 as f64 / 1024.0,
        None,
        Goal::None,
    );

    let image = push_busybox(&server)?;
    let mut create = |from: u32, to: u32| -> Result<Vec<String>> {
        (from..to)
            .map(|number| {
                let mut body = small_instance(&format!("bench-{number}"), &image, "qemu");
                body["size"] = "128MB".into();
                create_running(&mut api, &body)
            })
            .collect()
    };
    let mut ids = create(0, WARM)?;
    let few = settled(&server)?;
    ids.extend(create(WARM, WARM + count)?);
    let many = settled(&server)?;
    let each = (many.0 as f64 - few.0 as f64) / f64::from(count);
    section.row("each running instance", "KiB", each, None, Goal::AtMost(200.0));
    for id in ids {
        delete(&mut api, &id)?;
    }
    drop((api, server));

    let (server, _) = server_with_instances(Server::start(context)?)?;
    let stored = settled(&server)?;
    let each = (stored.0 as f64 - idle.0 as f64) / STORED as f64;
    section.row("each stored instance", "KiB", each, None, Goal::AtMost(200.0));
    section.note(format!(
        "resident set of the server's process; running: {count} more after the first {WARM}; stored: {STORED} stopped \
         ones, listed once"
    ));
    Ok(())
}

/// Memory after the last request's buffers had time to go, in KiB: all of it, and what no file backs.
pub(super) fn settled(server: &Server) -> Result<(u64, u64)> {
    pause(Duration::from_secs(2));
    resident_kib(server.process())
}
