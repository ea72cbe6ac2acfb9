//! What confines a process without any privilege of ours: it gains none, its files and descriptors are limited, and its
//! system calls are filtered.
#![allow(unsafe_code)]

use std::io;

use libc::c_int;

use crate::{Item, Limits, filter};

/// What a restraint does.
pub(crate) const ITEMS: [Item; 4] = [
    Item::NoNewPrivileges,
    Item::SystemCalls,
    Item::FileSize,
    Item::Descriptors,
];

/// To be put on by the process itself, between fork and exec.
#[derive(Debug)]
pub struct Restraint {
    limits: Vec<(c_int, u64)>,
    filter: Vec<libc::sock_filter>,
}

impl Restraint {
    pub(crate) fn new(limits: &Limits) -> Self {
        let limits = Limits {
            // Counted by user, and this one's is shared.
            processes: None,
            ..limits.clone()
        };
        Self {
            limits: resource_limits(&limits),
            filter: filter::restrict(),
        }
    }

    /// Puts it on. Makes system calls and nothing else.
    ///
    /// # Errors
    /// The kernel refuses one of them.
    pub fn apply(&self) -> io::Result<()> {
        let done = |result: c_int| {
            if result == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        };
        for (resource, limit) in &self.limits {
            // SAFETY: whole structures; the first call only writes, the second only reads.
            unsafe {
                let mut now: libc::rlimit = std::mem::zeroed();
                done(libc::getrlimit(*resource as _, &raw mut now))?;
                // Nobody without privilege goes beyond what he has.
                now.rlim_max = now.rlim_max.min(*limit);
                now.rlim_cur = now.rlim_max;
                done(libc::setrlimit(*resource as _, &raw const now))?;
            }
        }
        let program = libc::sock_fprog {
            len: self.filter.len() as u16,
            filter: self.filter.as_ptr().cast_mut(),
        };
        // SAFETY: plain numbers, and a description of a list of that length, which the kernel only reads.
        unsafe {
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            done(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
            done(libc::prctl(
                libc::PR_SET_SECCOMP,
                libc::SECCOMP_MODE_FILTER,
                &raw const program,
            ))
        }
    }
}

/// Limits that the kernel keeps by process or by user.
pub(crate) fn resource_limits(limits: &Limits) -> Vec<(c_int, u64)> {
    let mut set = vec![(libc::RLIMIT_CORE as c_int, 0)];
    let optional = [
        (libc::RLIMIT_NOFILE, limits.descriptors),
        (libc::RLIMIT_FSIZE, limits.file_bytes),
        // Counted by user, and each confined process has its own.
        (libc::RLIMIT_NPROC, limits.processes),
    ];
    for (resource, limit) in optional {
        set.extend(limit.map(|limit| (resource as c_int, limit)));
    }
    set
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_program_bears_it_and_is_held() {
        let limits = Limits {
            descriptors: Some(50),
            file_bytes: Some(1024),
            processes: Some(1),
            ..Limits::default()
        };
        let restraint = Restraint::new(&limits);
        let script = "ulimit -n; ulimit -c; grep -E 'NoNewPrivs|Seccomp:' /proc/self/status; unshare -U true || echo no";
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        // SAFETY: it makes system calls and nothing else.
        unsafe { command.pre_exec(move || restraint.apply()) };
        let output = command.output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let words: Vec<&str> = text.split_whitespace().collect();
        assert_eq!(words, ["50", "0", "NoNewPrivs:", "1", "Seccomp:", "2", "no"]);
    }
}
