//! Control groups: one for the program, so that the kernel tells whether its memory killer struck there.
//!
//! The program is born in its group. Moving a process there makes the kernel wait for all its processors to have passed
//! a quiet point, tens of milliseconds of a boot.
#![allow(unsafe_code)]

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use rustix::{
    fs::{Mode, OFlags, open},
    pipe::{PipeFlags, pipe_with},
    process::{Pid, WaitOptions, waitpid},
};

use super::program;

const ROOT: &str = "/sys/fs/cgroup";
const PROGRAM: &str = "/sys/fs/cgroup/program";
const AGENT: &str = "/sys/fs/cgroup/hypeman.agent";

/// The directory of the program's group. `None` without control groups.
pub(super) fn for_program() -> Option<OwnedFd> {
    // Kernels without the memory controller still group.
    let _ = fs::write(format!("{ROOT}/cgroup.subtree_control"), "+memory");
    make(PROGRAM).ok()?;
    open(
        PROGRAM,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .ok()
}

/// Moves the agent out of the way of an init that collects what it finds in the root group.
pub(super) fn enter_agent_group() {
    if make(AGENT).is_ok() {
        let _ = fs::write(format!("{AGENT}/cgroup.procs"), "0");
    }
}

fn make(path: &str) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// `CLONE_INTO_CGROUP` of the kernel, since 5.7.
const INTO_GROUP: u64 = 1 << 33;

/// Starts a command in the group. The process that calls must have one thread. A kernel that can't gets it started
/// in the group of the caller.
///
/// # Errors
/// As [`Command::spawn`].
pub(super) fn spawn(mut command: Command, group: &OwnedFd) -> io::Result<Pid> {
    let (mut failure, mut told) =
        pipe_with(PipeFlags::CLOEXEC).map(|(reader, writer)| (File::from(reader), File::from(writer)))?;
    // SAFETY: all zeroes are a valid structure of integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = INTO_GROUP;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = group.as_raw_fd() as u64;
    // SAFETY: without shared memory this is a fork. The process has one thread, so that no lock is held for ever in
    // the child, which becomes another program or ends.
    let child = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) };
    match i32::try_from(child) {
        Ok(0) => {
            let error = command.exec();
            let _ = told.write_all(&error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes());
            // SAFETY: ends the child without the parent's exit handlers.
            unsafe { libc::_exit(127) }
        }
        Ok(child) if child > 0 => {
            drop(told);
            let child = Pid::from_raw(child).ok_or(io::ErrorKind::Other)?;
            let mut code = [0; 4];
            match failure.read_exact(&mut code) {
                // Closed by exec.
                Err(_) => Ok(child),
                Ok(()) => {
                    // Whoever waits for all children may have been faster.
                    let _ = waitpid(Some(child), WaitOptions::empty());
                    Err(io::Error::from_raw_os_error(i32::from_ne_bytes(code)))
                }
            }
        }
        _ => program::spawn(command),
    }
}

/// How many of the program's processes the memory killer has ended.
pub(super) fn memory_kills() -> u64 {
    fs::read_to_string(format!("{PROGRAM}/memory.events")).map_or(0, |events| parse_kills(&events))
}

fn parse_kills(events: &str) -> u64 {
    events
        .lines()
        .find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::parse_kills;

    #[test]
    fn kills_are_read_from_the_events() {
        assert_eq!(
            parse_kills("low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n"),
            2
        );
        assert_eq!(parse_kills(""), 0);
    }
}
