//! Rotation of an instance's logs: the file is renamed, and its writer continues in a fresh one.
//!
//! Nothing is copied and nothing truncated, so no line can be lost or doubled: the VMM writes to the old file
//! until it has opened the new one. A VMM that could not be told is told at the next turn.
//!
//! A machine that must stand still for it may lose the connections to its guest, as it does when it is captured. Whoever
//! uses them is told why, and they are made anew at once.
//!
//! Turns come at the configured interval, and at once for a running machine whose log is seen to be too large: a
//! guest that floods must not fill the disk until its turn.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::driver::Driver;
use super::logs::rotated;
use super::table::Slot;
use crate::LogOptions;
use crate::shared::Shared;

const LOGS: [&str; 3] = ["app.log", "vmm.log", "hypeman.log"];
/// How often the logs of running machines are looked at: three cheap calls each.
pub(crate) const GROWTH_CHECK: Duration = Duration::from_secs(2);

/// Running instances with a log that is too large.
pub(crate) async fn overgrown(shared: &Arc<Shared>) -> Vec<Arc<Slot>> {
    let mut slots = shared.table.slots();
    slots.retain(|slot| slot.live.machine().is_some());
    let (layout, limit) = (shared.layout.clone(), shared.options.logs.max_size);
    let look = move || {
        slots.retain(|slot| {
            let logs = layout.logs(&slot.id);
            let size = |name| std::fs::metadata(logs.join(name)).map_or(0, |metadata| metadata.len());
            LOGS.into_iter().any(|name| size(name) > limit)
        });
        slots
    };
    tokio::task::spawn_blocking(look).await.unwrap_or_default()
}

impl Driver {
    /// Rotates what has grown too large.
    pub(super) async fn rotate_logs(&mut self) {
        let options = self.shared.options.logs;
        let logs = self.shared.layout.logs(&self.record.id);
        for name in LOGS {
            let path = logs.join(name);
            let renamed = match std::fs::metadata(&path) {
                Ok(metadata) if metadata.len() <= options.max_size => continue,
                Ok(_) => make_room(&path, &options),
                // Renamed in an earlier turn, but its writer could not be told.
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = renamed {
                tracing::warn!(instance = %self.record.id, %error, "log not rotated");
                continue;
            }
            if name == "hypeman.log" {
                self.log.reopen();
                continue;
            }
            let Some(run) = &self.run else { continue };
            let told = match name {
                "app.log" => run.machine.reopen_workload_log().await,
                _ => run.machine.reopen_vmm_log().await,
            };
            if let Err(error) = told {
                tracing::warn!(instance = %self.record.id, %error, "log not continued in a new file yet");
            }
            self.mend_connections("when it turned to a new log").await;
        }
    }
}

/// Renames the files of one log up by one; the oldest goes.
fn make_room(path: &Path, options: &LogOptions) -> io::Result<()> {
    if options.max_files == 0 {
        return std::fs::remove_file(path);
    }
    for number in (1..options.max_files).rev() {
        match std::fs::rename(rotated(path, number), rotated(path, number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    std::fs::rename(path, rotated(path, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_file_goes_and_the_others_move_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.log");
        let options = LogOptions {
            max_files: 2,
            ..LogOptions::default()
        };
        for content in ["first", "second", "third"] {
            std::fs::write(&path, content).unwrap();
            make_room(&path, &options).unwrap();
        }
        assert!(!path.exists());
        assert_eq!(std::fs::read_to_string(rotated(&path, 1)).unwrap(), "third");
        assert_eq!(std::fs::read_to_string(rotated(&path, 2)).unwrap(), "second");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 2);
    }
}
