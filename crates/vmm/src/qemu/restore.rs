//! Makes a fresh process the machine that was captured.
//!
//! ```text
//! started, waiting at the pipe ─► patch over its memory ─► state into the pipe ─► loaded, paused
//! ```
//!
//! Invariant: the patch is complete before the first byte of the state is sent. Devices read their queues in guest
//! memory while they are loaded.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use serde_json::json;
use tokio::sync::watch;

use super::capture;
use super::control::{COMMAND_DEADLINE, Control, Load};
use crate::blocking::blocking;
use crate::{Restore, VmmError};

/// How long the loading may take. It takes 10 ms on an idle host.
const LOAD_DEADLINE: Duration = Duration::from_secs(60);
/// States that fit are written without waiting for their reader.
const PIPE_BYTES: usize = 1024 * 1024;

/// The way of a device state into a process. A pipe and not a file: newer versions warn of files.
pub(super) struct StatePipe {
    pub(super) read: OwnedFd,
    pub(super) write: OwnedFd,
}

impl StatePipe {
    pub(super) fn new() -> Result<Self, VmmError> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)
            .map_err(io::Error::from)
            .map_err(VmmError::io("cannot make a pipe"))?;
        // Only spares waiting; a host may forbid it.
        let _ = fcntl_setpipe_size(&write, PIPE_BYTES);
        Ok(Self { read, write })
    }
}

/// Patches memory and loads the state into a process that waits for it. On error the process is to be killed.
pub(super) async fn load(
    control: &Control,
    memory_bytes: u64,
    restore: Restore,
    pipe: OwnedFd,
) -> Result<(), VmmError> {
    let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
    // By default the new process would announce the MAC address of the captured machine, which may still run.
    let silence = json!({ "announce-rounds": 0 });
    let Restore {
        device_state, patch, ..
    } = restore;
    let is_patched = patch.is_some();
    let memory = async move {
        match is_patched {
            true => capture::guest_memory(control, memory_bytes).await.map(Some),
            false => Ok(None),
        }
    };
    // Sent together, answered in order: one way there and back instead of three.
    let (_, _, memory) = tokio::try_join!(
        control.command("migrate-set-capabilities", events, COMMAND_DEADLINE),
        control.command("migrate-set-parameters", silence, COMMAND_DEADLINE),
        memory,
    )?;
    if let (Some(patch), Some(memory)) = (patch, memory) {
        blocking(move || patch(&memory))
            .await
            .map_err(VmmError::io("cannot write the memory of the restored machine"))?;
    }
    let mut progress = control.load();
    // Not waited for: the reader's verdict counts, and a reader that is gone ends the writer.
    tokio::task::spawn_blocking(move || File::from(pipe).write_all(&device_state));
    match tokio::time::timeout(LOAD_DEADLINE, loaded(&mut progress)).await {
        Ok(Load::Completed) => Ok(()),
        Ok(_) => Err(VmmError::Gone),
        Err(_) => Err(VmmError::unresponsive(
            "the loading of a device state",
            LOAD_DEADLINE,
        )),
    }
}

async fn loaded(progress: &mut watch::Receiver<Load>) -> Load {
    match progress.wait_for(|load| *load != Load::Pending).await {
        Ok(load) => *load,
        Err(_) => Load::Failed,
    }
}
