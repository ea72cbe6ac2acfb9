//! The processes of an exec session: how they begin and how they are ended.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, Signal, kill_process, kill_process_group},
};
use tokio::net::unix::pipe;

use super::{fd_stream::FdStream, pty};
use crate::birth::Birth;

/// Ends of a session that the agent holds.
pub(super) enum Ends {
    Pipes {
        stdin: pipe::Sender,
        stdout: pipe::Receiver,
        stderr: pipe::Receiver,
    },
    Terminal(FdStream),
}

/// A started session: the leader's pid is also its session and group id.
pub(super) struct Session {
    pub(super) leader: Pid,
    pub(super) ends: Ends,
}

/// Starts a command as the leader of a session of its own, in the given control group.
pub(super) fn start(
    program: &Path,
    command: &[String],
    environment: &[(String, String)],
    working_directory: &Path,
    tty: Option<(u16, u16)>,
    group: Option<BorrowedFd<'_>>,
) -> io::Result<Session> {
    let (theirs, ends) = match tty {
        None => pipes()?,
        Some((rows, columns)) => {
            let (master, slave, _) = pty::open(rows, columns)?;
            let theirs = [slave.try_clone()?.into(), slave.try_clone()?.into(), slave.into()];
            (theirs, Ends::Terminal(FdStream::new(master)?))
        }
    };
    let birth = Birth {
        file: program,
        arguments: command,
        environment,
        directory: working_directory,
        ends: theirs,
        group,
    };
    let has_terminal = tty.is_some();
    // The agent is spared by the kernel's memory killer; what it starts must not be.
    let spared = oom_is_adjusted();
    // SAFETY: the closure only makes system calls.
    let leader = unsafe {
        birth.start(move || {
            if has_terminal {
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            }
            if spared {
                let file = rustix::fs::open(
                    c"/proc/self/oom_score_adj",
                    rustix::fs::OFlags::WRONLY,
                    rustix::fs::Mode::empty(),
                )?;
                rustix::io::write(&file, b"0")?;
            }
            Ok(())
        })
    }?;
    Ok(Session { leader, ends })
}

/// The command's ends of three pipes, and ours.
fn pipes() -> io::Result<([OwnedFd; 3], Ends)> {
    let pipe = || pipe_with(PipeFlags::CLOEXEC);
    let ((their_input, stdin), (stdout, their_output), (stderr, their_errors)) = (pipe()?, pipe()?, pipe()?);
    let ours = Ends::Pipes {
        stdin: pipe::Sender::from_owned_fd(stdin)?,
        stdout: pipe::Receiver::from_owned_fd(stdout)?,
        stderr: pipe::Receiver::from_owned_fd(stderr)?,
    };
    Ok(([their_input, their_output, their_errors], ours))
}

fn oom_is_adjusted() -> bool {
    std::fs::read_to_string("/proc/self/oom_score_adj").is_ok_and(|value| value.trim() != "0")
}

/// Sends a signal to all processes of a session: its first group at once, then whatever made itself a group of
/// its own (jobs of a shell).
pub(super) fn signal_session(leader: Pid, signal: Signal) {
    // Already gone is as good.
    let _ = kill_process_group(leader, signal);
    for pid in members(leader) {
        let _ = kill_process(pid, signal);
    }
}

fn members(leader: Pid) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| session_of(*pid) == Some(leader.as_raw_nonzero().get()))
        .filter_map(Pid::from_raw)
        .collect()
}

fn session_of(pid: i32) -> Option<i32> {
    let line = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so count from its end: state, parent, group, session.
    line[line.rfind(')')? + 1..]
        .split_whitespace()
        .nth(3)?
        .parse()
        .ok()
}

/// Makes a terminal's reader see the end of its input.
pub(super) fn end_of_terminal_input(terminal: &FdStream) -> io::Result<()> {
    const END_OF_TRANSMISSION: u8 = 4;
    File::from(terminal.descriptor().try_clone_to_owned()?).write_all(&[END_OF_TRANSMISSION])
}
