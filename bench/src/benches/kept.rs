//! A server with guests that are kept and brought back, and bare VMMs beside it: what restores and forks are measured
//! with.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bare_restore::BareVmms;
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::guests::{self, Content, Shape};
use crate::http::Connection;
use crate::load::pause;
use crate::place::Place;
use crate::registry::push_busybox;
use crate::remote;
use crate::report::Section;
use crate::server::{self, Server, call, delete};

/// Longest wait for the compressor.
const COMPRESSION_PATIENCE: Duration = Duration::from_secs(300);
/// What runs in a guest to show that it answers.
pub(super) const TRUE: [&str; 1] = ["/bin/true"];

/// See the module.
pub(super) struct Bench<'a> {
    pub(super) context: &'a Context,
    pub(super) server: Server,
    pub(super) api: Connection,
    image: String,
    content: Content,
    pub(super) bare: BareVmms,
    pub(super) suffix: &'static str,
}

impl<'a> Bench<'a> {
    /// Starts a server for these guests.
    pub(super) fn new(context: &'a Context, place: &Place, shapes: &[Shape]) -> Result<Self> {
        let server = Server::start_in(context, place)?;
        let image = push_busybox(&server)?;
        Ok(Self {
            context,
            api: server.connect()?,
            server,
            image,
            content: Content::read(guests::most_filled(shapes))?,
            bare: BareVmms::new(context, place)?,
            suffix: place.suffix,
        })
    }

    pub(super) fn boot(&mut self, name: &str, shape: Shape) -> Result<String> {
        let (server, api) = (&self.server, &mut self.api);
        guests::boot(server, api, &self.image, name, shape, &self.content)
    }

    /// From the call until a command has run in the guest.
    pub(super) fn restore(&mut self, id: &str) -> Result<Duration> {
        let began = Instant::now();
        server::restore(&mut self.api, id)?;
        remote::run(&self.server, id, &TRUE, &[])?;
        Ok(began.elapsed())
    }

    /// A snapshot of a guest in standby, which is gone.
    pub(super) fn kept(&mut self, shape: Shape) -> Result<String> {
        let id = self.boot("bench-kept", shape)?;
        guests::standby(&mut self.api, &id)?;
        let snapshot = guests::snapshot(&mut self.api, &id, None)?;
        delete(&mut self.api, &id)?;
        Ok(snapshot)
    }

    /// Puts an instance that does not run to standby with the memory of a snapshot of it.
    pub(super) fn rewind(&mut self, id: &str, snapshot: &str) -> Result<()> {
        let path = format!("/instances/{id}/snapshots/{snapshot}/restore");
        let body = json!({ "target_state": "Standby" });
        call(&mut self.api, "POST", &path, Some(&body), 200).map(drop)
    }

    /// A snapshot of an instance in standby that shares its memory; returns once only the compressed form of that is
    /// left, `raw` having been the other.
    pub(super) fn framed(&mut self, id: &str, raw: &Path) -> Result<String> {
        let zstd = json!({ "enabled": true, "algorithm": "zstd", "level": 1 });
        let snapshot = guests::snapshot(&mut self.api, id, Some(zstd))?;
        wait_until_compressed(&mut self.api, &snapshot)?;
        let began = Instant::now();
        while raw.exists() {
            if began.elapsed() > COMPRESSION_PATIENCE {
                return Err(BenchError::Answer("the raw form is still there".into()));
            }
            pause(Duration::from_millis(10));
        }
        Ok(snapshot)
    }

    pub(super) fn forget(&mut self, snapshot: &str) -> Result<()> {
        let path = format!("/snapshots/{snapshot}");
        call(&mut self.api, "DELETE", &path, None, 204).map(drop)
    }

    /// Notes a failure and removes what it left, so that what comes next is measured without it.
    pub(super) fn stumbled(&mut self, section: &mut Section, shape: Shape, error: &BenchError) -> Result<()> {
        section.note(format!("{}{}: {error}", shape.name, self.suffix));
        self.api = self.server.connect()?;
        guests::remove_all(&self.server)
    }
}

/// Waits for the compressor.
///
/// # Errors
/// It fails or does not end.
pub(super) fn wait_until_compressed(api: &mut Connection, snapshot: &str) -> Result<Value> {
    let began = Instant::now();
    loop {
        let now = call(api, "GET", &format!("/snapshots/{snapshot}"), None, 200)?;
        match now["compression_state"].as_str() {
            Some("compressed") => return Ok(now),
            Some("error") => return Err(BenchError::Answer(format!("not compressed: {now}"))),
            _ if began.elapsed() > COMPRESSION_PATIENCE => {
                return Err(BenchError::Answer(format!("not compressed in time: {now}")));
            }
            _ => pause(Duration::from_millis(10)),
        }
    }
}
