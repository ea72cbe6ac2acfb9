//! The end of the machine.

use std::path::Path;

use rustix::{
    process::{Pid, Signal, kill_process},
    system::{RebootCommand, reboot},
};

use crate::log_line;

/// On the command line of machines that have firmware tables and no power switch behind them (Firecracker).
const NO_SWITCH: &str = "hypeman.end=reset";

/// Whether the kernel can switch the machine off; asked while `/sys` and `/proc` are surely ours.
pub(super) fn has_power_switch() -> bool {
    let words = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let told_otherwise = words.split_ascii_whitespace().any(|word| word == NO_SWITCH);
    !told_otherwise && Path::new("/sys/firmware/acpi/tables").exists()
}

/// Switches off. Without a power switch the machine is reset instead, which its VMM takes for the end as well;
/// asking for power-off there would halt it for ever.
pub(super) fn power_off(power_switch: bool) {
    let command = if power_switch {
        RebootCommand::PowerOff
    } else {
        RebootCommand::Restart
    };
    if let Err(error) = reboot(command) {
        log_line!("cannot power off: {error}");
    }
}

/// Kills every process but ourselves. Only for process 1.
pub(super) fn kill_all() {
    // Each process is named, because the interface has no call for all of them; the second round catches those
    // that were being born.
    for _ in 0..2 {
        let Ok(entries) = std::fs::read_dir("/proc") else {
            return;
        };
        for pid in entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        {
            if let Some(pid) = Pid::from_raw(pid)
                && pid != super::init_process()
            {
                // Kernel threads do not listen.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}
