//! Named instants at which tests cut the process, as `kill -9` would; and connections that they cut.
//!
//! Without the feature `fault-points` nothing here is compiled into the product but empty inline functions.

/// Every instant, in the order in which the operations pass them. Tests iterate over this list.
pub const ALL: &[&str] = &[
    "image.recorded",
    "image.pulled",
    "image.converted",
    "image.renamed",
    "image.ready",
    "image.delete.unrecorded",
    "push.manifest.stored",
    "push.manifest.recorded",
    "create.recorded",
    "create.disks",
    "create.network",
    "create.launched",
    "create.committed",
    "start.recorded",
    "start.network",
    "start.launched",
    "start.committed",
    "stop.recorded",
    "stop.guest_down",
    "stop.detached",
    "stop.committed",
    "delete.recorded",
    "delete.guest_down",
    "delete.detached",
    "delete.files",
    "delete.committed",
    "standby.recorded",
    "standby.held",
    "standby.given_back",
    "standby.paused",
    "standby.memory",
    "standby.devices",
    "standby.committed",
    "standby.detached",
    "restore.recorded",
    "restore.memory",
    "restore.network",
    "restore.launched",
    "restore.committed",
    "restore.resumed",
    "restore.confirmed",
    "capture.recorded",
    "capture.held",
    "capture.given_back",
    "capture.paused",
    "capture.taken",
    "capture.resumed",
    "capture.let_go",
    "capture.memory",
    "capture.kept",
    "snapshot.committed",
    "snapshot.delete.begun",
    "snapshot.delete.unrecorded",
    "import.files",
    "import.done",
    "import.adopted",
    "import.settled",
    "rewind.copied",
    "rewind.committed",
    "fork.recorded",
    "fork.copied",
    "fork.committed",
    "memory.capture.begun",
    "memory.capture.written",
    "memory.capture.synced",
    "memory.capture.renamed",
    "memory.compress.begun",
    "memory.compress.written",
    "memory.compress.frames",
    "memory.compress.renamed",
    "compress.framed",
    "memory.raw.dropped",
    "compress.dropped",
    "memory.sweep.renamed",
    "memory.sweep.removed",
    "memory.sweep.reduced",
    "memory.sweep.cut",
    "schedule.recorded",
    "schedule.captured",
];

/// Ends the process here when a test asked for it through `HYPEMAN_FAULT`, or waits while a test wants it to: as long
/// as there is the file in `HYPEMAN_HOLD`, which is a name, a space and a path.
#[inline]
pub fn point(name: &str) {
    #[cfg(feature = "fault-points")]
    armed::pass(name);
    #[cfg(not(feature = "fault-points"))]
    let _ = name;
}

/// Whether each capture is to cost its guest all connections, on any VMM as with those that end them: tests ask for it
/// through `HYPEMAN_CUT_CONNECTIONS`.
#[inline]
pub(crate) fn cuts_connections() -> bool {
    cfg!(feature = "fault-points") && std::env::var_os("HYPEMAN_CUT_CONNECTIONS").is_some()
}

#[cfg(feature = "fault-points")]
mod armed {
    use std::path::PathBuf;
    use std::sync::OnceLock;
    use std::time::Duration;

    /// Where to wait, and for what to go.
    fn held() -> Option<&'static (String, PathBuf)> {
        static HELD: OnceLock<Option<(String, PathBuf)>> = OnceLock::new();
        let read = || {
            let wanted = std::env::var("HYPEMAN_HOLD").ok()?;
            let (name, path) = wanted.split_once(' ')?;
            Some((name.to_owned(), PathBuf::from(path)))
        };
        HELD.get_or_init(read).as_ref()
    }

    #[allow(
        clippy::disallowed_methods,
        reason = "only tests wait here, and a file that goes is no event everywhere"
    )]
    pub(super) fn pass(name: &str) {
        static WANTED: OnceLock<Option<String>> = OnceLock::new();
        debug_assert!(super::ALL.contains(&name), "{name} is not listed");
        if let Some((_, file)) = held().filter(|(held, _)| held == name) {
            while file.exists() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let wanted = WANTED.get_or_init(|| std::env::var("HYPEMAN_FAULT").ok());
        if wanted.as_deref() == Some(name) {
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            // The signal is delivered before the call returns to user code; this is never reached.
            loop {
                std::hint::spin_loop();
            }
        }
    }
}
