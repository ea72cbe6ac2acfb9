//! Tells followers of logs that there may be more to read: one inotify instance for all of them.
//!
//! ```text
//!   follower ──┐ subscribe                      ┌── directory of logs A ── changed ──► its followers
//!   follower ──┼──────────► one inotify, one task ┤
//!   follower ──┘                                └── directory of logs B ── changed ──► its followers
//! ```
//!
//! The kernel grants a user few instances (128) and many watches. A watch is shared by all followers of a directory and
//! goes with the last of them.
//!
//! Invariant: whatever is written after [`LogWatcher::watch`] has returned makes [`Watched::changed`] resolve.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::StreamExt;
use inotify::{EventMask, EventOwned, EventStream, Inotify, WatchDescriptor, WatchMask, Watches};
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Room for the events of one read, in bytes.
const BUFFER: usize = 16 << 10;

/// Watches directories of logs.
#[derive(Debug, Default)]
pub(crate) struct LogWatcher(Mutex<Option<Running>>);

/// The inotify instance and the task that reads it; the task ends with this.
#[derive(Debug)]
struct Running {
    watches: Watches,
    directories: Arc<Mutex<Directories>>,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is watched. The two maps hold the same directories.
#[derive(Debug, Default)]
struct Directories {
    by_path: HashMap<PathBuf, Directory>,
    paths: HashMap<WatchDescriptor, PathBuf>,
}

#[derive(Debug)]
struct Directory {
    descriptor: WatchDescriptor,
    changed: watch::Sender<()>,
}

impl LogWatcher {
    /// Begins to watch what is written and renamed in `directory`.
    ///
    /// # Errors
    /// There is no such directory, or the user's limits of inotify are used up.
    pub(crate) fn watch(&self, directory: &Path) -> io::Result<Watched> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if running.as_ref().is_none_or(|running| running.task.is_finished()) {
            *running = Some(Running::start()?);
        }
        let Some(running) = running.as_ref() else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        running.watch(directory)
    }
}

impl Running {
    fn start() -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let watches = inotify.watches();
        let events = inotify.into_event_stream(vec![0; BUFFER])?;
        let directories = Arc::default();
        let task = tokio::spawn(tell(events, Arc::clone(&directories))).abort_handle();
        Ok(Self {
            watches,
            directories,
            task,
        })
    }

    fn watch(&self, path: &Path) -> io::Result<Watched> {
        let mut directories = lock(&self.directories);
        let mask = WatchMask::MODIFY | WatchMask::CREATE | WatchMask::MOVED_TO | WatchMask::ONLYDIR;
        // A directory that is watched already gives the same descriptor again, unless it is a new one of the old name.
        let descriptor = self.watches.clone().add(path, mask)?;
        let known = directories.by_path.get(path);
        let changed = match known.filter(|known| known.descriptor == descriptor) {
            Some(known) => known.changed.subscribe(),
            None => {
                let (changed, receiver) = watch::channel(());
                let directory = Directory {
                    descriptor: descriptor.clone(),
                    changed,
                };
                directories.paths.insert(descriptor.clone(), path.to_owned());
                if let Some(old) = directories.by_path.insert(path.to_owned(), directory) {
                    directories.paths.remove(&old.descriptor);
                }
                receiver
            }
        };
        Ok(Watched {
            changed,
            descriptor,
            watches: self.watches.clone(),
            directories: Arc::clone(&self.directories),
        })
    }
}

/// Reads events until that fails, which ends all followers.
async fn tell(mut events: EventStream<Vec<u8>>, directories: Arc<Mutex<Directories>>) {
    while let Some(Ok(event)) = events.next().await {
        lock(&directories).tell(&event);
    }
    *lock(&directories) = Directories::default();
}

impl Directories {
    fn tell(&mut self, event: &EventOwned) {
        if event.mask.contains(EventMask::Q_OVERFLOW) {
            // Events were lost: anything may have changed.
            for directory in self.by_path.values() {
                directory.changed.send_replace(());
            }
            return;
        }
        let Some(path) = self.paths.get(&event.wd) else {
            return;
        };
        if event.mask.contains(EventMask::IGNORED) {
            self.by_path.remove(path);
            self.paths.remove(&event.wd);
        } else if let Some(directory) = self.by_path.get(path) {
            directory.changed.send_replace(());
        }
    }
}

fn lock(directories: &Mutex<Directories>) -> MutexGuard<'_, Directories> {
    directories.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One follower's share of a watch.
#[derive(Debug)]
pub(crate) struct Watched {
    changed: watch::Receiver<()>,
    descriptor: WatchDescriptor,
    watches: Watches,
    directories: Arc<Mutex<Directories>>,
}

impl Watched {
    /// Resolves when something has changed since the last time. `false`: the directory is gone, nothing will follow.
    /// Cancel safe.
    pub(crate) async fn changed(&mut self) -> bool {
        self.changed.changed().await.is_ok()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut directories = lock(&self.directories);
        let Some(path) = directories.paths.get(&self.descriptor) else {
            return;
        };
        let last = directories
            .by_path
            .get(path)
            .is_some_and(|directory| directory.changed.receiver_count() == 1);
        if last {
            let path = path.clone();
            directories.by_path.remove(&path);
            directories.paths.remove(&self.descriptor);
            // It fails only when the directory went first.
            let _ = self.watches.remove(self.descriptor.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(watcher: &LogWatcher) -> usize {
        let running = watcher.0.lock().unwrap();
        let directories = lock(&running.as_ref().unwrap().directories);
        assert_eq!(directories.by_path.len(), directories.paths.len());
        directories.by_path.len()
    }

    /// Instances of inotify that this process holds.
    fn instances() -> usize {
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
        descriptors
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .filter(|target| target.to_string_lossy().contains("inotify"))
            .count()
    }

    #[tokio::test]
    async fn a_thousand_followers_share_one_instance() {
        let root = tempfile::tempdir().unwrap();
        let watcher = LogWatcher::default();
        let mut followers = Vec::new();
        for number in 0..500 {
            let directory = root.path().join(number.to_string());
            std::fs::create_dir(&directory).unwrap();
            followers.push((directory.clone(), watcher.watch(&directory).unwrap()));
            followers.push((directory.clone(), watcher.watch(&directory).unwrap()));
        }
        assert_eq!(instances(), 1);
        for (directory, _) in &followers {
            std::fs::write(directory.join("app.log"), "line\n").unwrap();
        }
        for (_, follower) in &mut followers {
            assert!(follower.changed().await);
        }
        assert_eq!(watched(&watcher), 500);
        let (directory, mut last) = followers.pop().unwrap();
        followers.clear();
        assert_eq!(watched(&watcher), 1);
        std::fs::rename(directory.join("app.log"), directory.join("app.log.1")).unwrap();
        assert!(last.changed().await);
        drop(last);
        assert_eq!(watched(&watcher), 0);
    }

    #[tokio::test]
    async fn a_directory_that_goes_ends_its_followers_and_may_come_again() {
        let root = tempfile::tempdir().unwrap();
        let watcher = LogWatcher::default();
        let directory = root.path().join("logs");
        assert_eq!(
            watcher.watch(&directory).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        std::fs::create_dir(&directory).unwrap();
        let mut first = watcher.watch(&directory).unwrap();
        std::fs::remove_dir(&directory).unwrap();
        while first.changed().await {}
        std::fs::create_dir(&directory).unwrap();
        let mut second = watcher.watch(&directory).unwrap();
        drop(first);
        std::fs::write(directory.join("app.log"), "line\n").unwrap();
        assert!(second.changed().await);
    }
}
