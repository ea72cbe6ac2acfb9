//! Control groups: one for the program, so that the kernel tells whether its memory killer struck there.

use std::{
    fs::{self, File},
    io,
};

const ROOT: &str = "/sys/fs/cgroup";
const PROGRAM: &str = "/sys/fs/cgroup/program";
const AGENT: &str = "/sys/fs/cgroup/hypeman.agent";

/// The program's group: write `0` to the file to move the writer there. `None` without control groups.
pub(super) fn for_program() -> Option<File> {
    // Kernels without the memory controller still group.
    let _ = fs::write(format!("{ROOT}/cgroup.subtree_control"), "+memory");
    make(PROGRAM).ok()
}

/// Moves the agent out of the way of an init that collects what it finds in the root group.
pub(super) fn enter_agent_group() {
    if make(AGENT).is_ok() {
        let _ = fs::write(format!("{AGENT}/cgroup.procs"), "0");
    }
}

fn make(path: &str) -> io::Result<File> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    File::options().write(true).open(format!("{path}/cgroup.procs"))
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
