//! Waits for children, all in one place.
//!
//! As process 1 every orphan of the machine becomes our child: whatever ends is collected, and only those that
//! someone asked for are reported. In any other process only the asked-for ones are touched. A child must be
//! registered before the thread that started it yields, which one thread guarantees.

use std::{cell::RefCell, collections::HashMap, io, rc::Rc};

use rustix::process::{Pid, WaitOptions, WaitStatus, wait, waitpid};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Ending {
    /// As a shell reports it.
    pub fn code(self) -> i32 {
        match self {
            Ending::Code(code) => code,
            Ending::Signal(signal) => 128 + signal,
        }
    }
}

/// See the module.
pub struct Reaper {
    waiting: RefCell<HashMap<i32, oneshot::Sender<Ending>>>,
    orphans_too: bool,
}

impl Reaper {
    /// Starts to collect children, within a `LocalSet`. `orphans_too` is for process 1.
    ///
    /// # Errors
    /// When `SIGCHLD` cannot be listened to.
    pub fn start(orphans_too: bool) -> io::Result<Rc<Reaper>> {
        let mut ended = signal(SignalKind::child())?;
        let reaper = Rc::new(Reaper {
            waiting: RefCell::new(HashMap::new()),
            orphans_too,
        });
        let collector = Rc::clone(&reaper);
        tokio::task::spawn_local(async move {
            while ended.recv().await.is_some() {
                collector.collect();
            }
        });
        Ok(reaper)
    }

    /// Reports the end of this child.
    pub fn watch(&self, pid: Pid) -> oneshot::Receiver<Ending> {
        let (sender, receiver) = oneshot::channel();
        self.waiting
            .borrow_mut()
            .insert(pid.as_raw_nonzero().get(), sender);
        receiver
    }

    fn collect(&self) {
        if self.orphans_too {
            while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                self.report(pid, status);
            }
            return;
        }
        let pids: Vec<i32> = self.waiting.borrow().keys().copied().collect();
        for pid in pids.into_iter().filter_map(Pid::from_raw) {
            if let Ok(Some((pid, status))) = waitpid(Some(pid), WaitOptions::NOHANG) {
                self.report(pid, status);
            }
        }
    }

    fn report(&self, pid: Pid, status: WaitStatus) {
        let ending = match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Ending::Code(code),
            (None, Some(signal)) => Ending::Signal(signal),
            (None, None) => return,
        };
        if let Some(sender) = self.waiting.borrow_mut().remove(&pid.as_raw_nonzero().get()) {
            // The one who asked may be gone.
            let _ = sender.send(ending);
        }
    }
}
