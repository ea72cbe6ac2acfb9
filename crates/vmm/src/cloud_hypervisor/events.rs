//! What Cloud Hypervisor says of its machine without being asked.
//!
//! ```text
//! Cloud Hypervisor ──► named pipe in the runtime directory ──► reader task ──► Told
//! ```
//!
//! The process holds both ends of the pipe itself: what it says while no server listens stays there, at most 64 KiB,
//! and nothing ever waits for a reader.
//!
//! Invariant: a machine that resets is ended. Cloud Hypervisor would boot it again.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, Mode, OFlags};
use serde::Deserialize;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::watch;

use crate::files::remove_if_there;
use crate::process::ProcessHandle;

/// Name of the pipe in the runtime directory. Its path on the command line marks the process as ours.
pub(super) const PIPE: &str = "events";
/// Longer than any event.
const EVENT_LIMIT: usize = 64 * 1024;
/// Ends each event.
const GAP: &[u8] = b"\n\n";

/// What events told about the end.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ending {
    /// The guest's kernel said so to its panic device.
    pub(super) panicked: bool,
    /// The machine was about to boot again.
    pub(super) reset: bool,
    /// The machine was taken down.
    pub(super) shut_down: bool,
}

/// The ear of one machine.
#[derive(Debug)]
pub(super) struct Told {
    ending: Arc<Mutex<Ending>>,
    /// Closes when all was heard.
    drained: watch::Receiver<()>,
}

impl Told {
    /// Makes the pipe, and gives the end that the process is to hold.
    pub(super) fn pipe(path: &Path) -> io::Result<OwnedFd> {
        remove_if_there(path)?;
        rustix::fs::mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR)?;
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(rustix::fs::open(path, flags, Mode::empty())?)
    }

    /// Listens until the process ends.
    pub(super) fn listen(path: &Path, process: Arc<ProcessHandle>) -> io::Result<Self> {
        let pipe = pipe::OpenOptions::new().open_receiver(path)?;
        let ending = Arc::<Mutex<Ending>>::default();
        let (hearing, drained) = watch::channel(());
        let heard = Arc::clone(&ending);
        tokio::spawn(async move {
            let _hearing = hearing;
            hear(pipe, &heard, &process).await;
        });
        Ok(Self { ending, drained })
    }

    /// Hears nothing: the pipe is gone.
    pub(super) fn deaf() -> Self {
        let (_, drained) = watch::channel(());
        Self {
            ending: Arc::default(),
            drained,
        }
    }

    pub(super) fn ending(&self) -> Ending {
        *self.ending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Resolves when everything that a process said before its end is known.
    pub(super) async fn drained(&self) {
        let mut drained = self.drained.clone();
        while drained.changed().await.is_ok() {}
    }
}

async fn hear(mut pipe: pipe::Receiver, heard: &Mutex<Ending>, process: &ProcessHandle) {
    let mut bytes = Vec::new();
    loop {
        match pipe.read_buf(&mut bytes).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let now = {
            let mut ending = heard.lock().unwrap_or_else(PoisonError::into_inner);
            for event in take(&mut bytes) {
                ending.note(&event);
            }
            *ending
        };
        if now.reset && process.kill().is_err() {
            tracing::warn!(
                process = process.identity().pid,
                "a machine that resets cannot be ended"
            );
        }
    }
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Event {
    source: String,
    event: String,
    #[serde(default)]
    properties: Option<Properties>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Properties {
    #[serde(default)]
    event: String,
}

impl Ending {
    fn note(&mut self, event: &Event) {
        match (event.source.as_str(), event.event.as_str()) {
            ("guest", "panic") => {
                let kind = event
                    .properties
                    .as_ref()
                    .map(|properties| properties.event.as_str());
                self.panicked |= kind == Some("panic");
            }
            ("vm", "rebooting") => self.reset = true,
            ("vm" | "vmm", "shutdown") => self.shut_down = true,
            _ => {}
        }
    }
}

/// Takes whole events out of what was read. What is none is passed over: the pipe may have been full in the middle of
/// an event.
fn take(bytes: &mut Vec<u8>) -> Vec<Event> {
    let mut events = Vec::new();
    let mut start = 0;
    while let Some(length) = bytes[start..].windows(GAP.len()).position(|window| window == GAP) {
        events.extend(serde_json::from_slice::<Event>(&bytes[start..start + length]).ok());
        start += length + GAP.len();
    }
    bytes.drain(..start);
    if bytes.len() > EVENT_LIMIT {
        bytes.clear();
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    const PANIC: &str = "{\n  \"timestamp\": { \"secs\": 9, \"nanos\": 1 },\n  \"source\": \"guest\",\n  \
        \"event\": \"panic\",\n  \"properties\": {\n    \"event\": \"panic\"\n  }\n}\n\n";
    const REBOOT: &str = "{\n  \"timestamp\": {},\n  \"source\": \"vm\",\n  \"event\": \"rebooting\",\n  \"properties\": null\n}\n\n";

    fn ending(pieces: &[&str]) -> Ending {
        let mut bytes = Vec::new();
        let mut ending = Ending::default();
        for piece in pieces {
            bytes.extend_from_slice(piece.as_bytes());
            for event in take(&mut bytes) {
                ending.note(&event);
            }
        }
        ending
    }

    #[test]
    fn events_are_read_in_whatever_pieces_they_come() {
        let both = format!("{PANIC}{REBOOT}");
        let expected = Ending {
            panicked: true,
            reset: true,
            shut_down: false,
        };
        for cut in 0..both.len() {
            assert_eq!(ending(&[&both[..cut], &both[cut..]]), expected, "{cut}");
        }
    }

    #[test]
    fn what_is_no_event_is_passed_over() {
        let crashed = PANIC.replace("\"event\": \"panic\"\n  }", "\"event\": \"crash_loaded\"\n  }");
        assert_eq!(ending(&[&crashed]), Ending::default());
        assert!(ending(&["{ \"source\": \"guest\"", "\n\n", "noise\n\n", REBOOT]).reset);
        assert!(ending(&[&"x".repeat(2 * EVENT_LIMIT), REBOOT, REBOOT]).reset);
        assert_eq!(
            ending(&[&REBOOT.replace("\"vm\"", "\"virtio-device\"")]),
            Ending::default()
        );
    }
}
