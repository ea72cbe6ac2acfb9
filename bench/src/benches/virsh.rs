//! The same lifecycle by libvirt, side by side: save, restore, snapshot of a running guest.

use std::time::{Duration, Instant};

use crate::calm::Calm;
use crate::context::{Context, need_program};
use crate::error::{BenchError, Result};
use crate::guests::{self, Content, MEBIBYTE, Shape};
use crate::http::Connection;
use crate::process;
use crate::registry::{busybox, push_busybox};
use crate::report::{Goal, Section};
use crate::server::{Server, call, delete};
use crate::statistics::Sample;
use crate::virsh::Virsh;

/// Ours, then libvirt's.
type Pairs = (Vec<Duration>, Vec<Duration>);

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    need_program("virsh")?;
    if context.modules.is_some() {
        return Err(BenchError::Missing(
            "libvirt's guest needs a kernel with its drivers built in: kernel/build".into(),
        ));
    }
    let server = Server::start(context)?;
    let image = push_busybox(&server)?;
    let mut api = server.connect()?;
    let shapes = guests::chosen(context)?;
    let content = Content::read(guests::most_filled(&shapes))?;
    for shape in shapes {
        rows(context, section, &server, &mut api, &image, shape, &content)?;
    }
    section.note(
        "from the call until it has returned; both guests have the same board, processor, memory, kernel and content; \
         ours also has an agent and its state is durable and verified, libvirt's is as `virsh` leaves it; snapshot: \
         memory and disk of a running guest, `--live` there",
    );
    Ok(())
}

fn rows(
    context: &Context,
    section: &mut Section,
    server: &Server,
    api: &mut Connection,
    image: &str,
    shape: Shape,
    content: &Content,
) -> Result<()> {
    let (mut saves, mut restores, mut snapshots) = (Pairs::default(), Pairs::default(), Pairs::default());
    let mut calm = Calm::default();
    for round in 0..=context.repetitions(10, 3) {
        let id = guests::boot(server, api, image, "bench-virsh", shape, content)?;
        let process = guests::vmm(server, &id)?;
        let words = process::started_for(&id)
            .into_iter()
            .find(|(other, _)| *other == process)
            .map(|(_, words)| words)
            .unwrap_or_default();
        let virsh = Virsh::like(&words, &busybox()?)?;
        virsh.boot(shape.memory, content.part(0, shape.filled * MEBIBYTE))?;

        let began = Instant::now();
        let snapshot = guests::snapshot(api, &id, None)?;
        let ours = began.elapsed();
        let peer = virsh.snapshot()?;
        push(&mut snapshots, round, ours, peer);
        call(api, "DELETE", &format!("/snapshots/{snapshot}"), None, 204)?;

        // The first capture made the next one smaller: each starts from a fresh guest.
        delete(api, &id)?;
        virsh.end();
        let id = guests::boot(server, api, image, "bench-virsh", shape, content)?;
        virsh.boot(shape.memory, content.part(0, shape.filled * MEBIBYTE))?;
        let began = Instant::now();
        guests::standby(api, &id)?;
        let ours = began.elapsed();
        let peer = virsh.save()?;
        push(&mut saves, round, ours, peer);

        let began = Instant::now();
        call(api, "POST", &format!("/instances/{id}/restore"), None, 200)?;
        let ours = began.elapsed();
        let peer = virsh.restore()?;
        push(&mut restores, round, ours, peer);
        delete(api, &id)?;
        virsh.end();
        calm.look();
    }
    for (what, (ours, peer)) in [("save", saves), ("restore", restores), ("snapshot", snapshots)] {
        let [ours, peer] = [ours, peer].map(|runs| runs.into_iter().collect::<Sample>());
        let name = format!("{what}, {}", shape.name);
        section.judged(&name, &ours, &peer, Goal::RatioAtMost(1.0), &calm);
    }
    Ok(())
}

/// The first round warms the caches of both.
fn push(pairs: &mut Pairs, round: usize, ours: Duration, peer: Duration) {
    if round > 0 {
        pairs.0.push(ours);
        pairs.1.push(peer);
    }
}
