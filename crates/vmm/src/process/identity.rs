//! Who a VMM process is, beyond its number, as `/proc` tells it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::MachineStats;

/// A command line longer than this is not one of ours.
const COMMAND_LINE_LIMIT: usize = 256 * 1024;
/// How long a program of ours may take from being executed until its arguments show. It takes microseconds, unless the
/// host stalls or the program's interpreter comes from a slow disk.
const EXECUTION_PATIENCE: Duration = Duration::from_secs(10);
const EXECUTION_PAUSE: Duration = Duration::from_millis(1);

/// Identity of a process that outlives the server. A pid alone is never trusted: numbers are reused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Process id.
    pub pid: u32,
    /// Start time in clock ticks since boot, field 22 of `/proc/<pid>/stat`.
    pub start_ticks: u64,
    /// `/proc/sys/kernel/random/boot_id` when it was started: after a reboot nothing matches.
    pub boot_id: String,
    /// Executable, as resolved from `/proc/<pid>/exe` after the start.
    pub executable: String,
}

impl ProcessIdentity {
    /// Reads who process `pid` is now. Fails for a process that is gone or only waits to be reaped.
    pub fn read(pid: u32) -> io::Result<Self> {
        Ok(Self {
            pid,
            start_ticks: start_ticks(pid)?,
            boot_id: boot_id()?.to_owned(),
            executable: executable(pid)?,
        })
    }

    /// True when the process with this number is still the one that was recorded.
    pub fn is_alive(&self) -> bool {
        Self::read(self.pid).is_ok_and(|now| now == *self)
    }
}

/// The identity of this boot of the host; it cannot change while we run.
pub fn boot_id() -> io::Result<&'static str> {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(known) = BOOT_ID.get() {
        return Ok(known);
    }
    let read = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(BOOT_ID.get_or_init(|| read.trim().to_owned()))
}

fn executable(pid: u32) -> io::Result<String> {
    let link = fs::read_link(format!("/proc/{pid}/exe"))?;
    let text = link.to_string_lossy();
    // An upgrade of the package unlinks the file that a running VMM was started from.
    Ok(text.strip_suffix(" (deleted)").unwrap_or(&text).to_owned())
}

/// The fields of `/proc/<pid>/stat` from the third on: the second is a name that may hold spaces and brackets.
fn stat_fields(pid: u32) -> io::Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = text.rsplit_once(')').map(|(_, rest)| rest).unwrap_or_default();
    Ok(after_name.split_ascii_whitespace().map(str::to_owned).collect())
}

fn field(fields: &[String], number: usize) -> io::Result<u64> {
    fields
        .get(number - 3)
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "unexpected form of /proc/<pid>/stat"))
}

fn start_ticks(pid: u32) -> io::Result<u64> {
    field(&stat_fields(pid)?, 22)
}

/// Processor time and memory of process `pid`.
pub(super) fn usage_of(pid: u32) -> io::Result<MachineStats> {
    let fields = stat_fields(pid)?;
    let ticks = field(&fields, 14)? + field(&fields, 15)?;
    Ok(MachineStats {
        cpu_seconds: ticks as f64 / rustix::param::clock_ticks_per_second().max(1) as f64,
        memory_rss_bytes: field(&fields, 24)? * rustix::param::page_size() as u64,
        memory_vms_bytes: field(&fields, 23)?,
    })
}

/// Live processes of executables whose names begin with one of `programs`, with `argument` as one whole word of their
/// command line. Processes that vanish during the scan are skipped.
pub(crate) fn processes_with_argument(
    programs: &[OsString],
    argument: &OsStr,
) -> io::Result<Vec<ProcessIdentity>> {
    let is_ours = |executable: &Path| {
        let name = executable.file_name().unwrap_or_default().as_bytes();
        programs
            .iter()
            .any(|program| name.starts_with(program.as_bytes()))
    };
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        let Ok(command_line) = settled_command_line(pid, is_ours) else {
            continue;
        };
        if command_line.len() > COMMAND_LINE_LIMIT
            || !command_line
                .split(|byte| *byte == 0)
                .any(|word| word == argument.as_bytes())
        {
            continue;
        }
        let Ok(identity) = ProcessIdentity::read(pid) else {
            continue;
        };
        if is_ours(Path::new(&identity.executable)) {
            found.push(identity);
        }
    }
    found.sort_by_key(|identity| identity.start_ticks);
    Ok(found)
}

/// The command line of process `pid`. The kernel shows an empty one from the instant in which a program replaces its
/// process until its arguments are laid out; a program that `is_ours` must not be overlooked in between. Empty stay
/// those of kernel threads and of processes that have ended.
#[allow(
    clippy::disallowed_methods,
    reason = "nothing tells of this instant, and one is met only right after a crash"
)]
fn settled_command_line(pid: u32, is_ours: impl Fn(&Path) -> bool) -> io::Result<Vec<u8>> {
    let end = Instant::now() + EXECUTION_PATIENCE;
    loop {
        let command_line = fs::read(format!("/proc/{pid}/cmdline"))?;
        if !command_line.is_empty()
            || !executable(pid).is_ok_and(|executable| is_ours(Path::new(&executable)))
        {
            return Ok(command_line);
        }
        if Instant::now() > end {
            tracing::warn!(pid, "a process that may be a VMM of ours shows no command line");
            return Ok(command_line);
        }
        thread::sleep(EXECUTION_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_itself_and_not_one_that_started_at_another_time() {
        let identity = ProcessIdentity::read(std::process::id()).unwrap();
        assert!(identity.is_alive());
        assert!(
            !ProcessIdentity {
                start_ticks: identity.start_ticks + 1,
                ..identity.clone()
            }
            .is_alive()
        );
        assert!(
            !ProcessIdentity {
                boot_id: "another boot".into(),
                ..identity.clone()
            }
            .is_alive()
        );
        assert!(
            !ProcessIdentity {
                executable: "/bin/other".into(),
                ..identity
            }
            .is_alive()
        );
    }

    #[test]
    fn usage_is_read() {
        let stats = usage_of(std::process::id()).unwrap();
        assert!(stats.memory_rss_bytes > 0 && stats.memory_vms_bytes >= stats.memory_rss_bytes);
    }

    #[test]
    fn a_process_is_found_by_a_word_of_its_command_line_from_its_first_instant() {
        // Often enough to meet the instant in which a new program shows no arguments yet.
        for round in 0..100 {
            let word = OsString::from(format!("600.{round}{}", std::process::id()));
            let mut child = std::process::Command::new("/bin/sleep")
                .arg(&word)
                .spawn()
                .unwrap();
            let found = processes_with_argument(&["other".into(), "".into()], &word).unwrap();
            let refused = processes_with_argument(&["qemu".into()], &word).unwrap();
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(
                found.iter().map(|identity| identity.pid).collect::<Vec<_>>(),
                [child.id()]
            );
            assert!(refused.is_empty());
        }
    }
}
