//! Device state without memory, of a machine that then stands still altogether.
//!
//! Firecracker writes a snapshot on the thread that also runs its devices: first the device state, which it syncs and
//! closes, then memory. Memory is taken by us from outside, faster and without what did not change. So the file for
//! memory is a pipe that nobody reads: opening it waits.
//!
//! ```text
//! PUT /snapshot/create ─► state written, closed ─► opens the pipe, and waits ─── resume: we open it ─► no file for
//!                               │                  no device runs, no vCPU runs                        memory: refused
//!                               └► we read the state, then memory
//! ```
//!
//! Paused vCPUs would not be enough: a packet from the network that arrived between the two would be in memory and not
//! in the device state, and the restored device would write into a buffer that the guest took back long ago.
//!
//! Invariant: a machine whose pipe exists is let go of before anything else is asked of it, also by the next server.

use std::fs;
use std::path::Path;
use std::time::Duration;

use hyper::Method;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use rustix::io::Errno;
use serde_json::json;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::files::{Files, HOLD, STATE};
use crate::VmmError;
use crate::files::io_error;
use crate::rest::RestClient;

/// Saving takes milliseconds, and a sync of the state.
const SAVE_DEADLINE: Duration = Duration::from_secs(120);
/// A device state has some ten kilobytes.
const STATE_LIMIT: u64 = 64 << 20;

/// A machine that waits at its pipe.
#[derive(Debug)]
pub(super) struct Hold {
    files: Files,
    answer: JoinHandle<Result<serde_json::Value, VmmError>>,
}

/// Takes the device state of a paused machine, which stands still until the hold is released.
pub(super) async fn save(client: &RestClient, files: &Files) -> Result<(Vec<u8>, Hold), VmmError> {
    let (pipe, directory) = (files.hold(), files.own().path());
    let _ = fs::remove_file(&pipe);
    files.forget_state();
    let failed = |error: Errno| io_error("cannot make", &pipe)(error.into());
    mkfifoat(CWD, &pipe, Mode::RUSR | Mode::WUSR).map_err(failed)?;
    files
        .own()
        .give(HOLD)
        .map_err(io_error("cannot hand over", &pipe))?;
    let closed = Closings::of(directory).map_err(io_error("cannot watch", directory))?;
    let asked = client.clone();
    let request = json!({ "snapshot_type": "Full", "snapshot_path": STATE, "mem_file_path": HOLD });
    let mut answer = tokio::spawn(async move {
        asked
            .call(Method::PUT, "/snapshot/create", Some(&request), SAVE_DEADLINE)
            .await
    });
    let outcome = tokio::select! {
        biased;
        closed = closed.wait_for(STATE) => closed.map_err(io_error("cannot watch", directory)),
        // It never came to the pipe.
        early = &mut answer => Err(refusal(early)),
    };
    if let Err(error) = outcome {
        let_go(&pipe);
        return Err(error);
    }
    let hold = Hold {
        files: files.clone(),
        answer,
    };
    let read = files.own().read(STATE, STATE_LIMIT);
    files.forget_state();
    match read {
        Ok(state) => Ok((state, hold)),
        Err(error) => {
            hold.release().await;
            Err(io_error("cannot read the device state in", directory)(error))
        }
    }
}

impl Hold {
    /// Lets the machine answer again. It is still paused.
    pub(super) async fn release(mut self) {
        // Kept open until Firecracker has seen that this is no file for memory.
        let reader = open(&self.files.hold());
        if let Ok(Ok(answer)) = (&mut self.answer).await {
            // It would have to find a way to make a pipe a large file.
            tracing::warn!(%answer, "a pipe was taken for memory");
        }
        drop(reader);
        let _ = fs::remove_file(self.files.hold());
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Not released: the caller went away. Nobody is to hang for that.
        let_go(&self.files.hold());
    }
}

/// Lets whoever waits at the pipe go on, and removes it.
pub(super) fn let_go(pipe: &Path) {
    drop(open(pipe));
    let _ = fs::remove_file(pipe);
}

fn open(pipe: &Path) -> Option<std::os::fd::OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(pipe, flags, Mode::empty()).ok()
}

fn refusal(answer: Result<Result<serde_json::Value, VmmError>, tokio::task::JoinError>) -> VmmError {
    match answer {
        Ok(Err(error)) => error,
        _ => VmmError::refused("PUT /snapshot/create", "no device state was written"),
    }
}

/// Files of a directory that somebody has written and closed.
struct Closings(AsyncFd<std::os::fd::OwnedFd>);

impl Closings {
    fn of(directory: &Path) -> std::io::Result<Self> {
        let watch = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&watch, directory, WatchFlags::CLOSE_WRITE)?;
        crate::process::readable(watch).map(Self)
    }

    async fn wait_for(&self, name: &str) -> std::io::Result<()> {
        let mut buffer = [std::mem::MaybeUninit::<u8>::uninit(); 4096];
        loop {
            let mut ready = self.0.readable().await?;
            let mut events = inotify::Reader::new(self.0.get_ref(), &mut buffer);
            loop {
                match events.next() {
                    Ok(event)
                        if event
                            .file_name()
                            .is_some_and(|file| file.to_bytes() == name.as_bytes()) =>
                    {
                        return Ok(());
                    }
                    Ok(_) => {}
                    Err(Errno::AGAIN) => break,
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
        }
    }
}
