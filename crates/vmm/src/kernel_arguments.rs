//! The kernel's command line, for each VMM.
//!
//! Invariant: nothing of an instance's identity is in it. A booted guest that was told nothing yet could become any
//! instance.

use crate::{MachineSpec, VmmError};

/// Longest kernel command line that x86 takes.
const LIMIT: usize = 2047;

/// A reboot ends the machine, so a panic ends it at once, its message on the console. `cryptomgr.notests` spares a
/// distribution's kernel its self-tests, a tenth of its boot.
const COMMON: [&str; 5] = [
    "console=ttyS0",
    "quiet",
    "panic=-1",
    "cryptomgr.notests",
    "net.ifnames=0",
];

/// For both boards of QEMU. `tsc_khz`: frequency of the time stamp counter where the guest reads the host's.
pub(crate) fn qemu(spec: &MachineSpec, tsc_khz: Option<u64>) -> Result<String, VmmError> {
    let mut words = vec!["reboot=t".to_owned()];
    if let Some(khz) = tsc_khz {
        // Without these a microvm guest calibrates its clock by polling, which fails on a busy host and then
        // hangs for ever; q35 merely boots faster.
        words.push(format!("tsc_early_khz={khz}"));
        words.push("no_timer_check".to_owned());
    }
    line(spec, words)
}

/// For Cloud Hypervisor.
pub(crate) fn cloud_hypervisor(spec: &MachineSpec) -> Result<String, VmmError> {
    let mut words = vec!["reboot=k".to_owned()];
    if spec.hotplug_bytes > 0 {
        // Added memory comes into use by itself, and the kernel puts nothing there that it could not move away again.
        words.push("memhp_default_state=online_movable".to_owned());
    }
    line(spec, words)
}

/// For Firecracker, which has no power to switch off: it ends when its guest resets it by the keyboard controller.
pub(crate) fn firecracker(spec: &MachineSpec) -> Result<String, VmmError> {
    line(spec, vec!["reboot=k".to_owned(), "hypeman.end=reset".to_owned()])
}

fn line(spec: &MachineSpec, own: Vec<String>) -> Result<String, VmmError> {
    let mut words: Vec<String> = COMMON.into_iter().map(str::to_owned).chain(own).collect();
    for word in &spec.kernel_arguments {
        if word.is_empty() || !word.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(VmmError::InvalidSpec(format!(
                "the kernel argument {word:?} is not one word of printable ASCII"
            )));
        }
        words.push(word.clone());
    }
    let joined = words.join(" ");
    if joined.len() > LIMIT {
        return Err(VmmError::InvalidSpec(format!(
            "the kernel arguments have {} bytes, a kernel takes {LIMIT}",
            joined.len()
        )));
    }
    Ok(joined)
}
