//! What the workload prints, on its way to a host that is not always there.
//!
//! ```text
//! nothing to send ── printed ──► dial ─► HELLO ─► START ─► bytes ─► all written
//!                                 ▲  refused, broken, or the host owes a word for too long
//!                                 └────────── a pause, short at first ◄──┘
//! ```
//!
//! A machine that was captured finds its connection reset, or leading nowhere: the next byte, or the wait for the
//! host's word, shows that. The protocol sees to it that no byte is lost or doubled then.
//!
//! Invariants: nothing is dialled and no timer runs while there is nothing to send, so that an idle machine stays
//! idle. Memory is bounded by [`HELD`](hypeman_guest_api::workload_log::HELD).

use std::{
    io,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use hypeman_guest_api::workload_log::Outbox;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ioctl_fionbio, read, write},
};

/// Pauses between attempts to reach the host.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(250));

/// How long the host may owe a word before the connection is taken for dead. Grows, because a host without room on its
/// disk is silent for long.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(32));

/// Read at a time, in bytes.
const BLOCK: usize = 32 * 1024;

/// What happens to a program that prints more than can be kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum WhenFull {
    /// It waits.
    Wait,
    /// It goes on, and what it prints is lost.
    Lose,
}

enum Line {
    Down { again: Instant },
    Dialled(OwnedFd),
    Up(OwnedFd),
}

struct Courier<C> {
    outbox: Outbox,
    dial: C,
    line: Line,
    pause: Duration,
    patience: Duration,
    /// When the host must have said something, if it owes a word.
    deadline: Instant,
}

/// Sends all that comes from `source` until it ends and the host has written everything. `dial` begins a connection
/// and need not wait for it.
pub(super) fn carry(source: &OwnedFd, when_full: WhenFull, dial: impl FnMut() -> io::Result<OwnedFd>) {
    // Another reader of it, if there is one, must not leave us waiting for what it has taken.
    let _ = ioctl_fionbio(source, true);
    let now = Instant::now();
    let mut courier = Courier {
        outbox: Outbox::new(),
        dial,
        line: Line::Down { again: now },
        pause: PAUSES.0,
        patience: PATIENCE.0,
        deadline: now,
    };
    let mut block = vec![0; BLOCK];
    let mut ended = false;
    while !(ended && courier.outbox.is_empty()) {
        let room = match when_full {
            WhenFull::Wait => courier.outbox.room().min(BLOCK),
            WhenFull::Lose => BLOCK,
        };
        let (printed, line) = courier.wait(source, !ended && room > 0);
        if printed {
            match read(source, &mut block[..room]) {
                Ok(0) => ended = true,
                Ok(count) => {
                    // Fewer are taken only where the rest may be lost.
                    courier.outbox.push(&block[..count]);
                }
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => ended = true,
            }
        }
        courier.tend(line);
    }
}

impl<C: FnMut() -> io::Result<OwnedFd>> Courier<C> {
    /// Waits until there is something to do: whether something was printed, and what the connection is ready for.
    fn wait(&mut self, source: &OwnedFd, listen: bool) -> (bool, PollFlags) {
        let mut interest = PollFlags::IN;
        let (socket, until) = match &self.line {
            Line::Down { again } => (None, (!self.outbox.is_empty()).then_some(*again)),
            Line::Dialled(socket) => {
                interest |= PollFlags::OUT;
                (Some(socket), Some(self.deadline))
            }
            Line::Up(socket) => {
                interest.set(PollFlags::OUT, !self.outbox.unsent().is_empty());
                (Some(socket), self.outbox.waits().then_some(self.deadline))
            }
        };
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            }
        });
        let mut set = [
            PollFd::new(source, PollFlags::IN),
            PollFd::new(socket.unwrap_or(source), interest),
        ];
        let asked = usize::from(!listen)..1 + usize::from(socket.is_some());
        if poll(&mut set[asked.clone()], timeout.as_ref()).is_err() {
            return (false, PollFlags::empty());
        }
        let said = |index: usize| match asked.contains(&index) {
            true => set[index].revents(),
            false => PollFlags::empty(),
        };
        (!said(0).is_empty(), said(1))
    }

    /// Moves what can be moved.
    fn tend(&mut self, ready: PollFlags) {
        let moved = match &self.line {
            Line::Down { again } => {
                if !self.outbox.is_empty() && *again <= Instant::now() {
                    self.dial();
                }
                return;
            }
            Line::Dialled(_) if ready.is_empty() => Ok(()),
            Line::Dialled(_) => self.greet(),
            Line::Up(_) if ready.difference(PollFlags::OUT).is_empty() => self.send(),
            Line::Up(_) => self.listen().and_then(|()| self.send()),
        };
        let owed = matches!(self.line, Line::Dialled(_)) || self.outbox.waits();
        let late = owed && self.deadline <= Instant::now();
        if late {
            self.patience = PATIENCE.1.min(self.patience * 2);
        }
        if late || moved.is_err() {
            self.hang_up();
        }
    }

    fn dial(&mut self) {
        match (self.dial)() {
            Ok(socket) => {
                self.line = Line::Dialled(socket);
                self.deadline = Instant::now() + self.patience;
            }
            Err(_) => self.hang_up(),
        }
    }

    fn hang_up(&mut self) {
        self.line = Line::Down {
            again: Instant::now() + self.pause,
        };
        self.pause = PAUSES.1.min(self.pause * 2);
    }

    /// Something happened to the new connection: it stands, or this fails.
    fn greet(&mut self) -> io::Result<()> {
        let again = Instant::now();
        let Line::Dialled(socket) = std::mem::replace(&mut self.line, Line::Down { again }) else {
            return Ok(());
        };
        let hello = self.outbox.greet();
        // It is empty still: so few bytes go at once or not at all.
        if write(&socket, &hello)? != hello.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.line = Line::Up(socket);
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let Line::Up(socket) = &self.line else {
            return Ok(());
        };
        let owed = self.outbox.waits();
        loop {
            let piece = self.outbox.unsent();
            if piece.is_empty() {
                return Ok(());
            }
            match write(socket, piece) {
                Ok(count) => self.outbox.left(count),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            if !owed {
                self.deadline = Instant::now() + self.patience;
            }
        }
    }

    fn listen(&mut self) -> io::Result<()> {
        let Line::Up(socket) = &self.line else {
            return Ok(());
        };
        let mut said = [0; 512];
        let count = match read(socket, &mut said) {
            Ok(0) => return Err(io::ErrorKind::ConnectionReset.into()),
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let came_further = self
            .outbox
            .hear(&said[..count])
            .map_err(|_| io::ErrorKind::InvalidData)?;
        if came_further {
            (self.pause, self.patience) = (PAUSES.0, PATIENCE.0);
        }
        self.deadline = Instant::now() + self.patience;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
