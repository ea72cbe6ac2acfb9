//! What a capture needs of a paused machine: where its memory lies, and the state of its devices.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::MemfdFlags;
use serde_json::json;

use super::control::{COMMAND_DEADLINE, Control};
use crate::memory::Segment;
use crate::{GuestMemory, VmmError};

/// Saving writes back the host's cache of the disks first.
const SAVE_DEADLINE: Duration = Duration::from_secs(120);
/// A device state has some hundred kilobytes at most.
const STATE_LIMIT: u64 = 64 * 1024 * 1024;

/// The block of guest memory. Both boards have one block for all RAM and show its first part at address 0; what
/// lies above the hole of 32-bit devices follows it in the block.
pub(super) async fn guest_memory(control: &Control, length: u64) -> Result<GuestMemory, VmmError> {
    let command = "human-monitor-command";
    let answer = control
        .command(command, json!({ "command-line": "gpa2hva 0" }), COMMAND_DEADLINE)
        .await?;
    let text = answer.as_str().unwrap_or_default();
    let address = host_address(text)
        .ok_or_else(|| VmmError::refused("gpa2hva", text.chars().take(200).collect::<String>()))?;
    let process = Arc::clone(control.process());
    let pid = process.identity().pid;
    GuestMemory::open(process, vec![Segment { address, length }]).map_err(VmmError::io(format!(
        "cannot look at the memory of process {pid}"
    )))
}

/// `Host virtual address for 0x0 (mem) is 0x7f5c3be00000`
fn host_address(answer: &str) -> Option<u64> {
    let digits = answer.trim().rsplit_once("(mem) is 0x")?.1;
    u64::from_str_radix(digits, 16).ok()
}

/// State of all devices, without RAM. The command is made for Xen, and does without it; `live` off keeps the disks
/// with the machine, so that it can go on.
pub(super) async fn save_devices(control: &Control) -> Result<Vec<u8>, VmmError> {
    let failed = |source| VmmError::io("cannot take a device state")(source);
    let file = rustix::fs::memfd_create("device-state", MemfdFlags::CLOEXEC)
        .map_err(|error| failed(error.into()))?;
    let mut file = File::from(file);
    // No disk to wait for, and nothing to clean up. QEMU opens it for writing, and gets what is opened so.
    let writer = File::options()
        .write(true)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(failed)?;
    let lent = control.lend(writer).await?;
    let arguments = json!({ "filename": lent.path(), "live": false });
    let saved = control
        .command("xen-save-devices-state", arguments, SAVE_DEADLINE)
        .await;
    control.take_back(lent).await?;
    saved?;
    let mut state = Vec::new();
    file.rewind()
        .and_then(|()| file.take(STATE_LIMIT + 1).read_to_end(&mut state))
        .map_err(failed)?;
    if state.is_empty() || state.len() as u64 > STATE_LIMIT {
        return Err(failed(std::io::Error::other(format!(
            "it has {} bytes",
            state.len()
        ))));
    }
    Ok(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_ram_is_read_and_nothing_else_is_taken_for_it() {
        let answer = "Host virtual address for 0x0 (mem) is 0x7f5c3be00000\r\n";
        assert_eq!(host_address(answer), Some(0x7f5c_3be0_0000));
        assert_eq!(
            host_address("Host virtual address for 0x0 (pc.bios) is 0x7f5c3be00000\r\n"),
            None
        );
        assert_eq!(host_address("No memory is mapped at address 0x0\r\n"), None);
        assert_eq!(host_address(""), None);
    }
}
