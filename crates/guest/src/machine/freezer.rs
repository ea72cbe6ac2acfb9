//! Holds the workload still around a capture.
//!
//! ```text
//! moving ── freeze ──► still ── captured, here or as a copy ──► told the time, or who it is ── thaw ──► moving
//!             └── not all stood still in time: moving again
//! ```
//!
//! Whatever goes on from a captured state first learns what the clock says and, being a copy, its name, address and
//! fresh random keys; not an instruction of the workload runs before. Without this a copy would draw the random numbers
//! of its source for some milliseconds, and act under its name.
//!
//! All processes but the agent belong to some group below the root of the hierarchy; each of these groups is stopped
//! by the kernel's freezer, which no process notices.
//!
//! Invariant: what the workload has frozen by itself stays frozen.

use std::{
    cell::RefCell,
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use rustix::fs::{Dir, FileType, Mode, OFlags, open, openat};

use super::cgroup;

/// How long processes may take to stand still: those that wait for a disk come to it after that.
const PATIENCE: Duration = Duration::from_millis(500);
/// Checks at short intervals before longer ones: most guests stand still within a millisecond.
const QUICK_CHECKS: u32 = 20;
const QUICK_PAUSE: Duration = Duration::from_micros(100);
const PAUSE: Duration = Duration::from_millis(1);

/// See the module.
pub(super) struct Freezer {
    /// The root of the hierarchy, wherever the workload may have mounted something else since.
    root: Option<OwnedFd>,
    /// The groups that were stopped.
    stopped: RefCell<Vec<String>>,
}

impl Freezer {
    /// Once the hierarchy is mounted.
    pub(super) fn open() -> Freezer {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Freezer {
            root: open(cgroup::ROOT, flags, Mode::empty()).ok(),
            stopped: RefCell::default(),
        }
    }

    /// Returns when nothing of the workload runs. On an error all of it does.
    pub(super) async fn freeze(&self) -> Result<(), String> {
        let outcome = self.stop_all().await;
        if outcome.is_err() {
            self.thaw();
        }
        outcome
    }

    async fn stop_all(&self) -> Result<(), String> {
        let begun = Instant::now();
        let mut checks = 0;
        // A group may be made while the others come to stand.
        while self
            .stop_more()
            .map_err(|error| format!("control groups: {error}"))?
        {
            while let Some(group) = self.moving() {
                if begun.elapsed() > PATIENCE {
                    return Err(format!("processes of the group {group} do not stand still"));
                }
                checks += 1;
                if checks <= QUICK_CHECKS {
                    quick_pause();
                } else {
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        Ok(())
    }

    /// Stops what was not stopped yet; `false` when that is nothing.
    fn stop_more(&self) -> io::Result<bool> {
        let mut more = false;
        for group in self.groups()? {
            let known = self.stopped.borrow().contains(&group);
            if !known && self.read(&group, "cgroup.freeze")?.trim() == "0" {
                self.write(&group, "1")?;
                self.stopped.borrow_mut().push(group);
                more = true;
            }
        }
        Ok(more)
    }

    /// Lets everything run that was stopped here. Does nothing to a workload that runs.
    pub(super) fn thaw(&self) {
        for group in self.stopped.take() {
            // A group can be removed while it is empty.
            if let Err(error) = self.write(&group, "0") {
                crate::log_line!("thaw {group}: {error}");
            }
        }
    }

    /// A group that was stopped and does not stand still yet.
    fn moving(&self) -> Option<String> {
        let stopped = self.stopped.borrow();
        stopped
            .iter()
            .find(|group| {
                self.read(group, "cgroup.events")
                    .is_ok_and(|events| !stands_still(&events))
            })
            .cloned()
    }

    /// The groups of the workload.
    fn groups(&self) -> io::Result<Vec<String>> {
        let root = self.root.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let mut groups = Vec::new();
        for entry in Dir::read_from(root)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy();
            let is_group = entry.file_type() == FileType::Directory && !name.starts_with('.');
            if is_group && name != cgroup::AGENT {
                groups.push(name.into_owned());
            }
        }
        Ok(groups)
    }

    fn file(&self, group: &str, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let root = self.root.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let path = format!("{group}/{name}");
        Ok(openat(
            root.as_fd(),
            path,
            flags | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }

    fn read(&self, group: &str, name: &str) -> io::Result<String> {
        let mut text = [0; 256];
        let count = rustix::io::read(self.file(group, name, OFlags::RDONLY)?, &mut text)?;
        Ok(String::from_utf8_lossy(&text[..count]).into_owned())
    }

    fn write(&self, group: &str, value: &str) -> io::Result<()> {
        let file = self.file(group, "cgroup.freeze", OFlags::WRONLY)?;
        rustix::io::write(file, value.as_bytes()).map(drop)?;
        Ok(())
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "the kernel tells of changes in these files at most every 10 ms, and the runtime sleeps for 1 ms or more"
)]
fn quick_pause() {
    std::thread::sleep(QUICK_PAUSE);
}

fn stands_still(events: &str) -> bool {
    events.lines().any(|line| line == "frozen 1")
}

#[cfg(test)]
mod tests {
    use super::stands_still;

    #[test]
    fn the_events_of_a_group_tell_whether_it_stands_still() {
        assert!(stands_still("populated 1\nfrozen 1\n"));
        assert!(!stands_still("populated 1\nfrozen 0\n"));
        assert!(!stands_still(""));
    }
}
