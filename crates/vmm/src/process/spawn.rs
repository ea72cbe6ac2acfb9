//! Starts a program that outlives us: own session, nothing inherited but what is named; in a jail where there is one.
#![allow(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;

use hypeman_jail::{Jail, JailSpec, Launch, Lent, Report, Restraint};
use rustix::io::FdFlags;

use super::{filter, own_filter};

/// A program to start and what it gets from us.
#[derive(Debug)]
pub(crate) struct Detached {
    pub(crate) program: PathBuf,
    pub(crate) arguments: Vec<OsString>,
    /// Where it starts.
    pub(crate) directory: PathBuf,
    /// Receives standard output.
    pub(crate) output: File,
    /// Receives standard error, where that does not go the same way.
    pub(crate) errors: Option<File>,
    /// Descriptors that the program keeps, under the numbers that they have here.
    pub(crate) keep: Vec<OwnedFd>,
    /// The program may not make holes in files (see [`super::filter`]). In a jail it has none to make them in.
    pub(crate) forbid_holes: bool,
    /// Where it is confined.
    pub(crate) jail: Option<Confinement>,
    /// What it bears where it is not.
    pub(crate) restraint: Option<(Restraint, Report)>,
}

/// The jail of one program.
#[derive(Debug)]
pub(crate) struct Confinement {
    pub(crate) jail: Arc<Jail>,
    pub(crate) spec: JailSpec,
    /// What it asks us for and does not see.
    pub(crate) lent: Option<Lent>,
}

/// A program that was started.
#[derive(Debug)]
pub(super) struct Spawned {
    /// The caller reaps it (see [`super::ProcessHandle`]).
    pub(super) pid: u32,
    /// What of its jail is in force.
    pub(super) jail: Option<Report>,
    /// How many filters of system calls it began with.
    pub(super) filters: u32,
}

/// Starts the program as leader of a session of its own, with an empty environment but `PATH`. Returns once it executes.
pub(super) fn spawn_detached(detached: Detached) -> io::Result<Spawned> {
    match detached.jail {
        Some(_) => confined(detached),
        None => unconfined(detached),
    }
}

fn confined(detached: Detached) -> io::Result<Spawned> {
    let Some(confinement) = detached.jail else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // The jail's own, and the one that asks us for what is lent.
    let filters = own_filter::ours() + 1 + u32::from(confinement.lent.is_some());
    let launch = Launch {
        program: &detached.program,
        arguments: &detached.arguments,
        directory: &detached.directory,
        output: detached.output.as_fd(),
        keep: &detached.keep,
        lent: confinement.lent,
    };
    let confined = confinement
        .jail
        .spawn(&confinement.spec, launch)
        .map_err(io::Error::other)?;
    Ok(Spawned {
        pid: confined.pid,
        jail: Some(confined.report),
        filters,
    })
}

fn unconfined(detached: Detached) -> io::Result<Spawned> {
    let (restraint, report) = detached.restraint.unzip();
    let keep: Vec<i32> = detached.keep.iter().map(AsRawFd::as_raw_fd).collect();
    let mut command = Command::new(&detached.program);
    command
        .args(&detached.arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir(&detached.directory)
        .stdin(Stdio::null())
        .stdout(detached.output.as_fd().try_clone_to_owned()?)
        .stderr(detached.errors.unwrap_or(detached.output));
    let forbid_holes = detached.forbid_holes;
    let filters = own_filter::ours() + u32::from(restraint.is_some()) + u32::from(forbid_holes);
    let prepare = move || {
        rustix::process::setsid()?;
        // Everything that some library may have opened without close-on-exec ends here.
        // SAFETY: close_range with CLOSE_RANGE_CLOEXEC only sets flags on descriptors of this new process.
        let result = unsafe {
            libc::syscall(
                libc::SYS_close_range,
                3_u32,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC as libc::c_uint,
            )
        };
        if result != 0 {
            let error = io::Error::last_os_error();
            // Kernels before 5.11 lack it; there we rely on every descriptor being opened close-on-exec.
            if !matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) {
                return Err(error);
            }
        }
        for number in &keep {
            // SAFETY: the parent holds these descriptors open until spawn has returned.
            let descriptor = unsafe { BorrowedFd::borrow_raw(*number) };
            rustix::io::fcntl_setfd(descriptor, FdFlags::empty())?;
        }
        if let Some(restraint) = &restraint {
            restraint.apply()?;
        }
        if forbid_holes {
            filter::forbid_holes()?;
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec and makes only system calls: no allocation, no lock.
    unsafe { command.pre_exec(prepare) };
    let child = command.spawn()?;
    Ok(Spawned {
        pid: child.id(),
        jail: report,
        filters,
    })
}
