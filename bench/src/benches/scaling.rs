//! What must not grow: a restore with the size of the guest, and the pause of a capture with what was just written to
//! the guest's disk.

use std::time::{Duration, Instant};

use super::capture::last_pause;
use super::in_each_place;
use crate::calm::Calm;
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::guests::{self, Content, SHAPES, Shape};
use crate::http::Connection;
use crate::registry::push_busybox;
use crate::remote;
use crate::report::{Goal, Section};
use crate::server::{Server, call, delete, restore};
use crate::statistics::Sample;

/// Past the guest's page cache, so that its memory is the same with and without.
const WRITE: &str =
    "/bin/busybox dd if=/dev/urandom of=/written bs=1M count=200 oflag=direct conv=notrunc 2>/dev/null";

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let repetitions = context.repetitions(11, 3);
    let content = Content::read(1)?;
    in_each_place(context, section, |section, place| {
        let server = Server::start_in(context, place)?;
        let image = push_busybox(&server)?;
        let mut bench = Bench {
            api: server.connect()?,
            server: &server,
            image: &image,
            content: &content,
            repetitions,
        };
        let suffix = place.suffix;
        let restored = bench.restores(section, suffix);
        if let Err(error) = restored.and_then(|()| bench.pauses(section, suffix)) {
            section.note(format!("scaling{suffix}: {error}"));
        }
        Ok(())
    })?;
    section.note(format!(
        "medians of {repetitions}, taken in turns; restore: an idle guest from the call until /bin/true has run, \
         reference: the same with 256 MiB; pause: as the instance's own log has it, 200 MB having been written to \
         the disk just before, reference: captured again with nothing written since"
    ));
    match section.rows.is_empty() {
        false => Ok(()),
        true => Err(BenchError::Answer(section.notes.join("\n"))),
    }
}

struct Bench<'a> {
    api: Connection,
    server: &'a Server,
    image: &'a str,
    content: &'a Content,
    repetitions: usize,
}

impl Bench<'_> {
    fn boot(&mut self, shape: Shape) -> Result<String> {
        let name = "bench-scaling";
        guests::boot(self.server, &mut self.api, self.image, name, shape, self.content)
    }

    fn restore(&mut self, shape: Shape) -> Result<Duration> {
        let id = self.boot(shape)?;
        guests::standby(&mut self.api, &id)?;
        let began = Instant::now();
        restore(&mut self.api, &id)?;
        remote::run(self.server, &id, &["/bin/true"], &[])?;
        let took = began.elapsed();
        delete(&mut self.api, &id)?;
        Ok(took)
    }

    fn restores(&mut self, section: &mut Section, suffix: &str) -> Result<()> {
        let idle = |memory: u64| {
            let mut shapes = SHAPES.into_iter();
            shapes
                .find(|shape| shape.memory == memory && shape.filled == 0)
                .ok_or_else(|| BenchError::Answer(format!("no idle guest of {memory} MiB")))
        };
        let (small, large) = (idle(256)?, idle(1024)?);
        let (mut ours, mut reference, mut calm) = (Vec::new(), Vec::new(), Calm::default());
        for round in 0..=self.repetitions {
            let (before, after) = (self.restore(small)?, self.restore(large)?);
            // The first round warms caches.
            if round > 0 {
                reference.push(before);
                ours.push(after);
            }
            calm.look();
        }
        let [ours, reference] = [ours, reference].map(|runs| runs.into_iter().collect::<Sample>());
        let name = format!("restore of 1 GiB{suffix}");
        section.judged(&name, &ours, &reference, Goal::RatioAtMost(1.2), &calm);
        Ok(())
    }

    fn pause(&mut self, id: &str) -> Result<Duration> {
        let snapshot = guests::snapshot(&mut self.api, id, None)?;
        let path = format!("/snapshots/{snapshot}");
        call(&mut self.api, "DELETE", &path, None, 204)?;
        last_pause(self.server, id)
    }

    fn pauses(&mut self, section: &mut Section, suffix: &str) -> Result<()> {
        let id = self.boot(SHAPES[0])?;
        let (mut ours, mut reference, mut calm) = (Vec::new(), Vec::new(), Calm::default());
        for round in 0..=self.repetitions {
            remote::run(self.server, &id, &["/bin/sh", "-c", WRITE], &[])?;
            let (written, still) = (self.pause(&id)?, self.pause(&id)?);
            if round > 0 {
                ours.push(written);
                reference.push(still);
            }
            calm.look();
        }
        delete(&mut self.api, &id)?;
        let [ours, reference] = [ours, reference].map(|runs| runs.into_iter().collect::<Sample>());
        let name = format!("pause after 200 MB{suffix}");
        section.judged(&name, &ours, &reference, Goal::MoreByAtMost(15.0), &calm);
        Ok(())
    }
}
