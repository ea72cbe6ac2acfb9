//! The VMM processes of one data directory, and their pagers, found by what stands on their command lines.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// A running VMM, or a pager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmmProcess {
    /// Process id.
    pub pid: u32,
    /// Command line, words joined by spaces.
    pub command_line: String,
}

/// Every VMM whose command line names `data_directory`.
#[must_use]
pub fn vmms_of(data_directory: &Path) -> Vec<VmmProcess> {
    let vmms = ["qemu-system", "cloud-hypervisor", "firecracker"];
    processes_of(data_directory, |program, _| {
        vmms.iter().any(|name| program.starts_with(name))
    })
}

/// Every pager whose command line names `data_directory`.
#[must_use]
pub fn pagers_of(data_directory: &Path) -> Vec<VmmProcess> {
    processes_of(data_directory, |program, words| {
        program == "hypeman" && words.contains(" pager ")
    })
}

/// Processes that name `data_directory`, by their program and their command line.
fn processes_of(data_directory: &Path, wanted: impl Fn(&str, &str) -> bool) -> Vec<VmmProcess> {
    let needle = data_directory.to_string_lossy().into_owned();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
        .filter_map(|pid| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let command_line = String::from_utf8_lossy(&words).replace('\0', " ");
            let program = command_line.split(' ').next()?.rsplit('/').next()?.to_owned();
            let found = wanted(&program, &command_line) && command_line.contains(&needle);
            found.then_some(VmmProcess { pid, command_line })
        })
        .collect()
}

impl VmmProcess {
    /// Sends a signal, provided that the pid still is this process.
    pub fn signal(&self, signal: Signal) {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else {
            return;
        };
        let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
            return;
        };
        let same = fs::read(format!("/proc/{}/cmdline", self.pid))
            .is_ok_and(|words| String::from_utf8_lossy(&words).replace('\0', " ") == self.command_line);
        if same {
            // Gone in between is what was wanted.
            let _ = pidfd_send_signal(pidfd, signal);
        }
    }

    /// Whether it still runs.
    #[must_use]
    pub fn lives(&self) -> bool {
        fs::read(format!("/proc/{}/cmdline", self.pid))
            .is_ok_and(|words| String::from_utf8_lossy(&words).replace('\0', " ") == self.command_line)
    }
}
