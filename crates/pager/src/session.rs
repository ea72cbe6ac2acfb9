//! The thread of one machine: from listening for its VMM to the end of it.
//!
//! ```text
//!  listen ─► connected ─► message checked ─► hear ─► answer all faults ─► poll ─┐   VMM hangs up ─► Gone
//!                │                            ▲─────────────────────────────────┘   cannot answer ─► Failed, wait
//!                └─ refused ─► Failed                                               released ─► last messages ─► end
//! ```
//! A thread for each machine: a slow disk under one slows no other, and nobody hands faults around.

use std::collections::VecDeque;
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::handshake::{self, HandshakeError};
use crate::machine::{Halt, Link, Machine};
use crate::protocol::MachineState;
use crate::uffd::{Message, Refusal};

/// A fault that waits for its answer.
struct Fault {
    address: u64,
    heard: Instant,
}

/// How a machine's service ended.
enum End {
    /// The VMM hung up, or nobody wants the machine any more.
    Gone,
    /// It does not need us any more.
    Released,
    Failed {
        reason: String,
        damaged: bool,
    },
}

impl From<HandshakeError> for End {
    fn from(error: HandshakeError) -> Self {
        Self::Failed {
            reason: error.to_string(),
            damaged: false,
        }
    }
}

impl From<std::io::Error> for End {
    fn from(error: std::io::Error) -> Self {
        HandshakeError::Io(error).into()
    }
}

/// Runs a machine until its VMM has ended or needs us no more. Says everything but that it is gone.
pub(crate) fn run(machine: &Arc<Machine>, listener: UnixListener) {
    let accepted = accept(machine, &listener);
    let checked = match &accepted {
        Ok(Some(stream)) => handshake::check_user(stream, &machine.socket),
        _ => Ok(()),
    };
    // One VMM, once: from here on nobody else can connect.
    drop(listener);
    let _ = std::fs::remove_file(&machine.socket);
    let end = match &accepted {
        Ok(Some(stream)) => match checked {
            Ok(()) => connected(machine, stream),
            Err(error) => error.into(),
        },
        Ok(None) => End::Gone,
        Err(error) => End::Failed {
            reason: format!("nobody can connect: {error}"),
            damaged: false,
        },
    };
    keep_working_set(machine, matches!(end, End::Released));
    match end {
        End::Gone => {}
        End::Released => machine.become_(MachineState::Graduated),
        End::Failed { reason, damaged } => {
            tracing::error!(machine = machine.id, reason, "a machine cannot be served");
            machine.become_(MachineState::Failed { reason, damaged });
            wait_for_end(machine, accepted.ok().flatten().as_ref());
        }
    }
}

/// Waits for readiness of what matters: `None` as timeout waits for ever.
fn wait(descriptors: &mut [PollFd<'_>], timeout: Option<Duration>) -> std::io::Result<()> {
    let timeout = timeout.map(|timeout| Timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    });
    match poll(descriptors, timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn accept(machine: &Machine, listener: &UnixListener) -> std::io::Result<Option<UnixStream>> {
    loop {
        if machine.is_stopping() {
            return Ok(None);
        }
        let mut descriptors = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(&machine.kick, PollFlags::IN),
        ];
        wait(&mut descriptors, None)?;
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(Some(stream));
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

fn connected(machine: &Arc<Machine>, stream: &UnixStream) -> End {
    let received = handshake::receive(stream, machine.image.reader().memory_bytes());
    let (uffd, regions) = match received {
        Ok(link) => link,
        Err(error) => return error.into(),
    };
    if let Err(error) = stream.set_nonblocking(true) {
        return error.into();
    }
    let link = machine.link.get_or_init(|| Link { uffd, regions });
    machine.serving_since.get_or_init(Instant::now);
    machine.become_(MachineState::Serving);
    serve(machine, link, stream).unwrap_or_else(|end| end)
}

fn serve(machine: &Arc<Machine>, link: &Link, stream: &UnixStream) -> Result<End, End> {
    let mut faults = VecDeque::new();
    loop {
        if machine.is_stopping() {
            return Ok(End::Gone);
        }
        if machine.released.load(Ordering::SeqCst) {
            return let_go(machine, link, &mut faults);
        }
        let timeout = recording_timeout(machine);
        let mut descriptors = [
            PollFd::new(&link.uffd, PollFlags::IN),
            PollFd::new(stream, PollFlags::IN | PollFlags::RDHUP),
            PollFd::new(&machine.kick, PollFlags::IN),
        ];
        wait(&mut descriptors, timeout)?;
        let [memory, vmm, kick] = descriptors.map(|descriptor| !descriptor.revents().is_empty());
        if kick {
            let _ = rustix::io::read(&machine.kick, &mut [0; 8]);
        }
        if vmm {
            hung_up(stream)?;
        }
        if memory {
            hear(machine, link, &mut faults)?;
        }
        while let Some(&Fault { address, heard }) = faults.front() {
            let outcome = match link.regions.offset(address) {
                Some(offset) => machine.answer(offset),
                // Registered by the VMM and not named to us: it waits for a page that nobody has.
                None => Err(Halt::Failed {
                    reason: format!("a fault at {address:#x} lies outside of the guest's memory"),
                    damaged: false,
                }),
            };
            match outcome {
                Ok(()) => {
                    faults.pop_front();
                    machine.latencies.add(heard.elapsed());
                    machine.set_waiting(faults.len());
                }
                Err(Halt::Changing) => {
                    hear(machine, link, &mut faults)?;
                    std::thread::yield_now();
                }
                Err(Halt::Ended) => return Ok(End::Gone),
                Err(Halt::Failed { reason, damaged }) => return Ok(End::Failed { reason, damaged }),
            }
        }
    }
}

/// Reads what the kernel says: removals are noted before anybody can fill pages again.
fn hear(machine: &Machine, link: &Link, faults: &mut VecDeque<Fault>) -> Result<(), End> {
    let mut messages = Vec::new();
    let mut ledger = machine.ledger();
    link.uffd.read(&mut messages)?;
    let heard = Instant::now();
    for message in messages {
        match message {
            Message::Fault { address, .. } => faults.push_back(Fault { address, heard }),
            Message::Removed { start, end } => {
                link.regions
                    .offsets(start..end)
                    .for_each(|range| ledger.remove(range));
            }
            Message::Foreign(number) => {
                return Err(End::Failed {
                    reason: format!("the VMM changes its memory in a way that is not served ({number:#x})"),
                    damaged: false,
                });
            }
        }
    }
    machine.note_populated(&ledger);
    drop(ledger);
    machine.set_waiting(faults.len());
    Ok(())
}

/// The VMM keeps its end of the stream for as long as it lives, and says nothing more.
fn hung_up(mut stream: &UnixStream) -> Result<(), End> {
    match stream.read(&mut [0; 64]) {
        Ok(0) => Err(End::Gone),
        Ok(_) => Err(End::Failed {
            reason: "the VMM said more than where its memory lies".into(),
            damaged: false,
        }),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(()),
        Err(_) => Err(End::Gone),
    }
}

/// Nothing is registered any more. A removal that began before must still be heard, or its thread would wait for ever:
/// the kernel says whether there is one.
fn let_go(machine: &Machine, link: &Link, faults: &mut VecDeque<Fault>) -> Result<End, End> {
    loop {
        hear(machine, link, faults)?;
        let Some(first) = link.regions.all().next() else {
            return Ok(End::Released);
        };
        match link.uffd.zero(first.address, hypeman_snapshots::PAGE_BYTES) {
            Err(Refusal::Changing) => std::thread::yield_now(),
            _ => return Ok(End::Released),
        }
    }
}

/// Until when to wait for more questions before the working set is kept; keeps it when that is over.
fn recording_timeout(machine: &Arc<Machine>) -> Option<Duration> {
    let end = machine.recorder().as_ref()?.end()?;
    let left = end.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        return Some(left);
    }
    keep_working_set(machine, true);
    None
}

/// Keeps what was recorded, or forgets it. Syncing takes its time, and faults must not wait for it.
fn keep_working_set(machine: &Arc<Machine>, whole: bool) {
    let Some(recorder) = machine.recorder().take() else {
        return;
    };
    let set = recorder.finish();
    let owned = Arc::clone(machine);
    let keep = move || {
        if whole
            && !set.chunks.is_empty()
            && let Err(error) = owned.image.reader().keep_working_set(&set)
        {
            tracing::warn!(machine = owned.id, %error, "the working set is not kept");
        }
        owned.recording.store(false, Ordering::SeqCst);
    };
    if let Err(error) = std::thread::Builder::new().name("keep".into()).spawn(keep) {
        tracing::warn!(machine = machine.id, %error, "the working set is not kept");
    }
}

/// The VMM may hang in a fault until it is killed; its descriptor stays open so that it never sees wrong bytes.
fn wait_for_end(machine: &Machine, stream: Option<&UnixStream>) {
    while !machine.is_stopping() {
        let mut descriptors = vec![PollFd::new(&machine.kick, PollFlags::IN)];
        if let Some(stream) = stream {
            descriptors.push(PollFd::new(stream, PollFlags::RDHUP));
        }
        if wait(&mut descriptors, None).is_err() {
            return;
        }
        let ended = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        if descriptors
            .get(1)
            .is_some_and(|stream| stream.revents().intersects(ended))
        {
            return;
        }
        let _ = rustix::io::read(&machine.kick, &mut [0; 8]);
    }
}
