//! Processes: on which core they run, how much memory they hold, what they were started with.

use std::fs;
use std::path::Path;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::error::{BenchError, Result};

/// Puts all threads of a process on one core.
///
/// # Errors
/// The kernel refuses.
pub fn pin(process: u32, core: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(core);
    bind(process, &set)
}

/// Lets all threads of a process run on every core again.
///
/// # Errors
/// The kernel refuses.
pub fn unpin(process: u32) -> Result<()> {
    let mut set = CpuSet::new();
    for core in 0..CpuSet::MAX_CPU {
        set.set(core);
    }
    bind(process, &set)
}

fn bind(process: u32, set: &CpuSet) -> Result<()> {
    for thread in tasks(process)? {
        match sched_setaffinity(Pid::from_raw(thread), set) {
            // A thread may end meanwhile.
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(BenchError::io("bind a process to a core", error.into())),
        }
    }
    Ok(())
}

fn tasks(process: u32) -> Result<Vec<i32>> {
    let folder = format!("/proc/{process}/task");
    let entries =
        fs::read_dir(folder).map_err(|error| BenchError::io("list the threads of a process", error))?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect())
}

/// Resident memory of a process in KiB: all of it, and the part that no file backs.
///
/// # Errors
/// The process is gone.
pub fn resident_kib(process: u32) -> Result<(u64, u64)> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))
        .map_err(|error| BenchError::io("read the memory of a process", error))?;
    Ok((status_field(&text, "VmRSS:"), status_field(&text, "RssAnon:")))
}

/// Highest resident memory that a process had, in KiB.
///
/// # Errors
/// The process is gone.
pub fn peak_kib(process: u32) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))
        .map_err(|error| BenchError::io("read the memory of a process", error))?;
    Ok(status_field(&text, "VmHWM:"))
}

fn status_field(text: &str, field: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// Command lines of all processes that have a word containing `mark`, with their ids.
pub fn started_for(mark: &str) -> Vec<(u32, Vec<String>)> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir("/proc") else {
        return found;
    };
    for entry in entries.flatten() {
        let Some(process) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        if let Some(words) = command_line(&entry.path())
            && words.iter().any(|word| word.contains(mark))
        {
            found.push((process, words));
        }
    }
    found
}

fn command_line(folder: &Path) -> Option<Vec<String>> {
    let bytes = fs::read(folder.join("cmdline")).ok()?;
    Some(
        bytes
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect(),
    )
}
