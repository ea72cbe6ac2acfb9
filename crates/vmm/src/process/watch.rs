//! The end of a process, learnt once by one task and known to everybody who asks.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process, pidfd_open, pidfd_send_signal, waitid,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::ProcessIdentity;
use super::identity::usage_of;
use crate::{MachineStats, VmmError};

/// Time between the end of a socket and the end of the process that held it.
const END_GRACE: Duration = Duration::from_secs(1);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It exited with this code.
    Code(i32),
    /// This signal ended it.
    Signal(i32),
    /// It ended, but it was not our child, so the kernel told somebody else how.
    Unseen,
}

/// A process that cannot be mistaken for another one.
#[derive(Debug)]
pub(crate) struct ProcessHandle {
    identity: ProcessIdentity,
    pidfd: OwnedFd,
    ended: watch::Receiver<Option<Ended>>,
    stopped: AtomicBool,
}

impl ProcessHandle {
    /// Takes a child that we just started and that nobody has reaped.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] when it has ended already; else the host has no room to watch it. Either way it is gone
    /// then, and reaped.
    pub(crate) fn of_child(pid: u32) -> io::Result<Self> {
        open_pidfd(pid)
            .and_then(|pidfd| Self::watch(ProcessIdentity::read(pid)?, pidfd))
            .inspect_err(|_| end_unwatched(pid))
    }

    /// Takes back a process that was recorded; `None` when it is gone or its number has a new owner.
    pub(crate) fn of_recorded(identity: &ProcessIdentity) -> io::Result<Option<Self>> {
        let pidfd = match open_pidfd(identity.pid) {
            Ok(pidfd) => pidfd,
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(error) => return Err(error),
        };
        // Compared after the pidfd is open: from here on the number cannot change hands.
        if !identity.is_alive() {
            return Ok(None);
        }
        Self::watch(identity.clone(), pidfd).map(Some)
    }

    fn watch(identity: ProcessIdentity, pidfd: OwnedFd) -> io::Result<Self> {
        let watched = readable(pidfd.try_clone()?)?;
        let (sender, ended) = watch::channel(None);
        tokio::spawn(async move {
            let outcome = match watched.readable().await {
                Ok(_) => reap(watched.get_ref()),
                Err(_) => return,
            };
            sender.send_replace(Some(outcome));
        });
        Ok(Self {
            identity,
            pidfd,
            ended,
            stopped: AtomicBool::new(false),
        })
    }

    pub(crate) fn identity(&self) -> &ProcessIdentity {
        &self.identity
    }

    /// True while the process has not ended, by the pidfd, so also before its watching task has noticed.
    pub(crate) fn is_alive(&self) -> bool {
        let mut descriptors = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(poll(&mut descriptors, Some(&Timespec::default())), Ok(0))
    }

    /// How it ended, if it has.
    pub(crate) fn ended_now(&self) -> Option<Ended> {
        *self.ended.borrow()
    }

    /// Waits for the end. Cancel safe.
    pub(crate) async fn ended(&self) -> Ended {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(outcome) => outcome.unwrap_or(Ended::Unseen),
            // The watching task went with its runtime; there is nobody left to wait for.
            Err(_) => Ended::Unseen,
        }
    }

    /// Takes back the process of a machine that another server started.
    ///
    /// # Errors
    /// [`VmmError::Gone`] when it has ended.
    pub(crate) fn adopt(identity: &ProcessIdentity) -> Result<Arc<Self>, VmmError> {
        let adopted = Self::of_recorded(identity)
            .map_err(VmmError::io(format!("cannot look at process {}", identity.pid)))?;
        adopted.map(Arc::new).ok_or(VmmError::Gone)
    }

    /// Ends it on our own behalf, unless it has ended already, and waits for its end.
    pub(crate) async fn stop(&self) -> Result<(), VmmError> {
        if self.ended_now().is_some() {
            return Ok(());
        }
        self.stopped.store(true, Ordering::Release);
        self.end().await
    }

    /// Whether [`ProcessHandle::stop`] was to end it.
    pub(crate) fn was_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Kills it and waits for its end.
    pub(super) async fn end(&self) -> Result<(), VmmError> {
        self.kill()
            .map_err(VmmError::io(format!("cannot kill process {}", self.identity.pid)))?;
        self.ended().await;
        Ok(())
    }

    /// Whether it ends in a moment: what it says by its sockets ends a little earlier.
    pub(crate) async fn ends_soon(&self) -> bool {
        tokio::time::timeout(END_GRACE, self.ended()).await.is_ok()
    }

    /// What it uses of the host.
    ///
    /// # Errors
    /// [`VmmError::Gone`] when it has ended.
    pub(crate) fn usage(&self) -> Result<MachineStats, VmmError> {
        if self.ended_now().is_some() || !self.identity.is_alive() {
            return Err(VmmError::Gone);
        }
        usage_of(self.identity.pid).map_err(|_| VmmError::Gone)
    }

    /// Sends SIGKILL. A process that has ended is no error.
    pub(crate) fn kill(&self) -> io::Result<()> {
        match pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

/// A descriptor whose readiness for reading can be waited for.
pub(crate) fn readable(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the descriptor is owned, and owned by the `AsyncFd`, which gives it back to nobody.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }?)
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = number(pid).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "not a process id"))?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn number(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

/// Ends a child that nobody watches, and nobody else would end or reap. Until it is reaped its number is its own.
fn end_unwatched(pid: u32) {
    let Some(pid) = number(pid) else { return };
    let _ = kill_process(pid, Signal::KILL);
    let _ = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
}

fn reap(pidfd: &OwnedFd) -> Ended {
    match waitid(
        WaitId::PidFd(pidfd.as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    ) {
        Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ended::Code(code),
            (None, Some(signal)) => Ended::Signal(signal),
            (None, None) => Ended::Unseen,
        },
        // ECHILD: adopted, so its parent of today reaps it.
        Ok(None) | Err(_) => Ended::Unseen,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;

    use rustix::fs::Mode;

    use super::super::spawn::{Detached, spawn_detached};
    use super::*;

    /// Holds a script back until the test has looked at its process: one that has ended can't be looked at.
    struct Gate(tempfile::TempDir);

    impl Gate {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            rustix::fs::mkfifoat(
                rustix::fs::CWD,
                directory.path().join("gate"),
                Mode::RUSR | Mode::WUSR,
            )
            .unwrap();
            Self(directory)
        }

        fn path(&self) -> std::path::PathBuf {
            self.0.path().join("gate")
        }

        fn before(&self, script: &str) -> String {
            format!("read line < {}; {script}", self.path().display())
        }

        fn open(&self) {
            std::fs::write(self.path(), "go\n").unwrap();
        }
    }

    fn shell(script: &str) -> u32 {
        let output = File::options().write(true).open("/dev/null").unwrap();
        let arguments = vec!["-c".into(), script.into()];
        spawn_detached(Detached {
            program: "/bin/sh".into(),
            arguments,
            directory: "/".into(),
            output,
            errors: None,
            keep: Vec::new(),
            forbid_holes: false,
            jail: None,
            restraint: None,
        })
        .unwrap()
        .pid
    }

    #[tokio::test]
    async fn the_exit_code_of_a_child_is_known_and_no_zombie_stays() {
        let gate = Gate::new();
        let handle = ProcessHandle::of_child(shell(&gate.before("exit 7"))).unwrap();
        assert_eq!(handle.ended_now(), None);
        gate.open();
        assert_eq!(handle.ended().await, Ended::Code(7));
        assert_eq!(handle.ended().await, Ended::Code(7));
        assert!(!Path::new(&format!("/proc/{}", handle.identity().pid)).exists());
    }

    #[tokio::test]
    async fn a_child_that_has_ended_already_is_told_from_one_that_cannot_be_watched_and_reaped() {
        let pid = shell("exit 0");
        // Ended, and not reaped.
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        waitid(WaitId::Pid(number(pid).unwrap()), options).unwrap();
        let error = ProcessHandle::of_child(pid).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[tokio::test]
    async fn a_killed_child_says_by_which_signal() {
        let handle = ProcessHandle::of_child(shell("exec sleep 600")).unwrap();
        handle.kill().unwrap();
        assert_eq!(handle.ended().await, Ended::Signal(9));
        handle.kill().unwrap();
    }

    #[tokio::test]
    async fn a_recorded_process_is_taken_back_only_while_it_is_the_same() {
        let child = ProcessHandle::of_child(shell("exec sleep 600")).unwrap();
        // The shell becomes sleep a moment after the start.
        let identity = loop {
            let now = ProcessIdentity::read(child.identity().pid).unwrap();
            if now.executable.ends_with("sleep") || now.executable.ends_with("coreutils") {
                break now;
            }
            tokio::task::yield_now().await;
        };
        let stranger = ProcessIdentity {
            start_ticks: identity.start_ticks + 1,
            ..identity.clone()
        };
        assert!(ProcessHandle::of_recorded(&stranger).unwrap().is_none());
        let taken = ProcessHandle::of_recorded(&identity).unwrap().unwrap();
        taken.kill().unwrap();
        taken.ended().await;
        child.ended().await;
        assert!(ProcessHandle::of_recorded(&identity).unwrap().is_none());
    }

    #[tokio::test]
    async fn a_detached_program_leads_its_own_session_and_keeps_only_what_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("out");
        let output = File::create(&path).unwrap();
        let kept: OwnedFd = File::open("/dev/zero").unwrap().into();
        let number = std::os::fd::AsRawFd::as_raw_fd(&kept);
        let script = format!(
            "readlink /proc/self/fd/{number}; ls /proc/self/fd | wc -l; ps -o sid= -p $$; echo $$; pwd"
        );
        let gate = Gate::new();
        let arguments = vec!["-c".into(), gate.before(&script).into()];
        let pid = spawn_detached(Detached {
            program: "/bin/sh".into(),
            arguments,
            directory: "/".into(),
            output,
            errors: None,
            keep: vec![kept],
            forbid_holes: false,
            jail: None,
            restraint: None,
        })
        .unwrap()
        .pid;
        let handle = ProcessHandle::of_child(pid).unwrap();
        gate.open();
        handle.ended().await;
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines[0], "/dev/zero");
        // 0, 1, 2, the one named, and the one that ls itself opens.
        assert_eq!(lines[1], "5");
        assert_eq!(lines[2], lines[3]);
        assert_eq!(lines[4], "/");
    }
}
