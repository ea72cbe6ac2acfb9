//! Control groups: who is held still around a capture, and whether the kernel's memory killer struck the program.
//!
//! ```text
//! /                    process 1 in exec mode: the agent. In systemd mode what the init makes of it.
//! ├─ program           the image's program in exec mode; an init that makes no groups of its own
//! ├─ hypeman.sessions  what is run by exec
//! └─ hypeman.agent     the agent in systemd mode
//! ```

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use rustix::fs::{Mode, OFlags, open};

/// Where the hierarchy is mounted.
pub(super) const ROOT: &str = "/sys/fs/cgroup";
/// The agent's own group, where it has one.
pub(super) const AGENT: &str = "hypeman.agent";
const PROGRAM: &str = "program";
const SESSIONS: &str = "hypeman.sessions";

/// A group that processes are born into.
pub(super) struct Group(OwnedFd);

impl Group {
    /// The program's. `None` without control groups.
    pub(super) fn of_program() -> Option<Group> {
        // Kernels without the memory controller still group.
        let _ = fs::write(format!("{ROOT}/cgroup.subtree_control"), "+memory");
        Group::make(PROGRAM)
    }

    /// That of what is run by exec. `None` without control groups.
    pub(super) fn of_sessions() -> Option<Group> {
        Group::make(SESSIONS)
    }

    fn make(name: &str) -> Option<Group> {
        make(name).ok()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(format!("{ROOT}/{name}"), flags, Mode::empty())
            .ok()
            .map(Group)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Moves the agent out of the way of an init that collects what it finds in the root group.
pub(super) fn enter_agent_group() {
    enter(AGENT);
}

/// Moves an init to where it can be held still, though it makes no groups of its own.
pub(super) fn enter_program_group() {
    enter(PROGRAM);
}

fn enter(name: &str) {
    if make(name).is_ok() {
        let _ = fs::write(format!("{ROOT}/{name}/cgroup.procs"), "0");
    }
}

fn make(name: &str) -> io::Result<()> {
    match fs::create_dir(format!("{ROOT}/{name}")) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// How many of the program's processes the memory killer has ended.
pub(super) fn memory_kills() -> u64 {
    fs::read_to_string(format!("{ROOT}/{PROGRAM}/memory.events")).map_or(0, |events| parse_kills(&events))
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
