//! Cleaning up when the stories are interrupted: no destructor runs then, so the servers are known here as well.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, PoisonError};

use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{SignalKind, signal};

use crate::vmms_of;

/// Servers that run: process id, data directory, directory to remove.
static RUNNING: Mutex<Vec<(u32, PathBuf, PathBuf)>> = Mutex::new(Vec::new());
static WATCH: Once = Once::new();

/// Notes a server that was started, in place of the one before it in the same directory.
pub(crate) fn started(pid: u32, data: &Path, directory: &Path) {
    WATCH.call_once(|| {
        std::thread::spawn(watch);
    });
    ended(directory);
    let mut running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
    running.push((pid, data.to_owned(), directory.to_owned()));
}

/// Forgets the server of a directory.
pub(crate) fn ended(directory: &Path) {
    RUNNING
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .retain(|(_, _, other)| other != directory);
}

/// Waits for an interruption, ends what runs, and ends the stories.
fn watch() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).expect("SIGTERM");
        let mut interrupt = signal(SignalKind::interrupt()).expect("SIGINT");
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    });
    for (pid, data, directory) in RUNNING.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        // The child is not waited for yet, so the number is still its own.
        let _ = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .map(|pid| kill_process(pid, Signal::KILL));
        for vmm in vmms_of(&data) {
            vmm.signal(Signal::KILL);
        }
        let _ = std::fs::remove_dir_all(directory);
    }
    std::process::exit(130);
}
