//! A clock that a story turns: what a server does by the hour happens when the story says so.

use std::path::Path;

use tempfile::NamedTempFile;

use crate::{Server, ServerOptions};

/// The clock, as many seconds ahead of the host's as the story says. Servers that are to go by it get its
/// [`variable`](Self::variable).
#[derive(Debug)]
pub struct Clock(NamedTempFile);

impl Clock {
    /// A clock that shows the time of the host.
    #[must_use]
    pub fn new() -> Self {
        Self(NamedTempFile::new().expect("a file for the clock"))
    }

    /// The variable by which a server finds it.
    #[must_use]
    pub fn variable(&self) -> (String, String) {
        ("HYPEMAN_CLOCK".to_owned(), self.path().display().to_string())
    }

    /// Sets it ahead by so many seconds in all. A server never reads half a number.
    pub fn turn(&self, seconds: u64) {
        let next = self.path().with_extension("next");
        std::fs::write(&next, seconds.to_string()).expect("the clock's next time");
        std::fs::rename(&next, self.path()).expect("the clock is turned");
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Server {
    /// Starts one that goes by a clock of the story.
    pub async fn start_by(clock: &Clock) -> Self {
        Self::start_with(ServerOptions {
            environment: vec![clock.variable()],
            ..ServerOptions::default()
        })
        .await
    }
}
