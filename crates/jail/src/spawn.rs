//! From a thread at its stage to a process that executes its program, or the step that failed.
//!
//! By the kernel's own `clone3`: no library makes a process in a PID namespace and in a control group at once.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType, recvmsg,
    socketpair,
};
use rustix::process::{Pid, WaitOptions};

use crate::JailError;
use crate::child::{LISTENER, Plan, Step, read_failure};

/// Flags beyond 32 bits: signals that are handled get their default, the process is born in a control group.
const CLEAR_SIGNAL_HANDLERS: u64 = 1 << 32;
const INTO_GROUP: u64 = 1 << 33;

/// Namespaces and groups that only a new process can be put into.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Birth<'a> {
    pub(crate) pid_namespace: bool,
    /// Directory of its control group.
    pub(crate) group: Option<BorrowedFd<'a>>,
}

/// A process that executes its program.
#[derive(Debug)]
pub(crate) struct Born {
    pub(crate) pid: u32,
    /// Where its questions arrive.
    pub(crate) listener: Option<OwnedFd>,
}

/// Why there is none.
#[derive(Debug)]
pub(crate) enum Stillborn {
    /// Nothing was started.
    Before(JailError),
    /// It got this far.
    At(Step, io::Error),
}

/// How parent and child speak until the program is executed.
pub(crate) struct Line {
    ours: OwnedFd,
    theirs: OwnedFd,
    /// What standard input is.
    pub(crate) input: OwnedFd,
}

impl Line {
    /// Opened from the host's view.
    pub(crate) fn open() -> Result<Self, JailError> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| JailError::io("cannot make a socket", error))?;
        let input = File::open("/dev/null").map_err(|error| JailError::io("cannot open /dev/null", error))?;
        Ok(Self {
            ours,
            theirs,
            input: input.into(),
        })
    }

    /// Where the child writes.
    pub(crate) fn report(&self) -> i32 {
        self.theirs.as_raw_fd()
    }
}

/// Makes the process and waits until it executes its program.
pub(crate) fn spawn(plan: &Plan, birth: Birth<'_>, line: Line) -> Result<Born, Stillborn> {
    let before = |error| Stillborn::Before(JailError::io("cannot make a process", error));
    let mut flags = CLEAR_SIGNAL_HANDLERS;
    if birth.pid_namespace {
        flags |= libc::CLONE_NEWPID as u64;
    }
    if birth.group.is_some() {
        flags |= INTO_GROUP;
    }
    // SAFETY: a structure of numbers, in which zero is "nothing wanted".
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = birth.group.map_or(0, |group| group.as_raw_fd() as u64);
    // SAFETY: without CLONE_VM the child has a copy of all memory, and continues on its copy of this stack. It only
    // runs the plan, which makes system calls and never returns.
    let pid = unsafe {
        let pid = libc::syscall(
            libc::SYS_clone3,
            &raw mut arguments,
            size_of::<libc::clone_args>(),
        );
        if pid == 0 {
            plan.run();
        }
        pid
    };
    if pid < 0 {
        return Err(before(io::Error::last_os_error()));
    }
    let Line { ours, theirs, input } = line;
    drop((theirs, input));
    let mut listener = None;
    loop {
        match hear(ours.as_fd()) {
            Ok(Heard::Listener(descriptor)) => listener = Some(descriptor),
            // Exec has closed the other end.
            Ok(Heard::End) => {
                return Ok(Born {
                    pid: pid as u32,
                    listener,
                });
            }
            Ok(Heard::Failure(step, error)) => {
                reap(pid);
                return Err(Stillborn::At(step, error));
            }
            Err(error) => {
                if let Some(pid) = Pid::from_raw(pid as i32) {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
                reap(pid);
                return Err(before(error));
            }
        }
    }
}

enum Heard {
    Listener(OwnedFd),
    Failure(Step, io::Error),
    End,
}

fn hear(line: BorrowedFd<'_>) -> io::Result<Heard> {
    let mut message = [0; 5];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut words = [io::IoSliceMut::new(&mut message)];
        match recvmsg(line, &mut words, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "an unexpected message");
    match received.bytes {
        0 => Ok(Heard::End),
        5 => read_failure(message)
            .map(|(step, error)| Heard::Failure(step, error))
            .ok_or_else(odd),
        1 if message.starts_with(&LISTENER) => ancillary
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                _ => None,
            })
            .map(Heard::Listener)
            .ok_or_else(odd),
        _ => Err(odd()),
    }
}

fn reap(pid: libc::c_long) {
    let _ = rustix::process::waitpid(Pid::from_raw(pid as i32), WaitOptions::empty());
}
