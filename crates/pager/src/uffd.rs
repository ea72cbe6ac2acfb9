//! A userfaultfd: what the kernel says about missing pages of another process, and how they are filled.
//!
//! ```text
//!  read  ◄── Fault (somebody waits)   Removed (somebody waits until this was read; the pages go right after)
//!  copy, zero ──► the pages appear, whoever waits for them goes on
//! ```
//! `unsafe` is for the ioctls, which take structures by address. Filling pages is safe for this process: the kernel
//! writes only where the owner of the memory registered it, and only pages that are missing there.
//!
//! Invariant: while a removal is under way the kernel fills nothing ([`Refusal::Changing`]) until its message was read
//! and the remover has gone on. A page that is filled after a look at the messages was therefore not removed before.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};

/// Bytes of one message.
const MESSAGE: usize = 32;
/// Messages that are read at once.
const BATCH: usize = 64;

const GROUP: u8 = 0xaa;
const API: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0x00);
const UNREGISTER: Opcode = opcode::read::<Range>(GROUP, 0x01);
const WAKE: Opcode = opcode::read::<Range>(GROUP, 0x02);
const COPY: Opcode = opcode::read_write::<Copy>(GROUP, 0x03);
const ZERO: Opcode = opcode::read_write::<Zero>(GROUP, 0x04);

const API_VERSION: u64 = 0xaa;
const FEATURE_EVENT_REMOVE: u64 = 1 << 3;
const MODE_MISSING: u64 = 1;
const FAULT_WRITE: u64 = 1;

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    length: u64,
}

#[repr(C)]
struct Register {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    length: u64,
    mode: u64,
    /// Bytes that were copied, or the number of an error below zero.
    copied: i64,
}

#[repr(C)]
struct Zero {
    range: Range,
    mode: u64,
    /// Bytes that were filled, or the number of an error below zero.
    filled: i64,
}

/// What the kernel says.
#[derive(Debug)]
pub enum Message {
    /// Somebody waits for the page at this address.
    Fault {
        /// Anywhere in the page.
        address: u64,
        /// Somebody wants to write.
        write: bool,
    },
    /// The owner gives these pages back. From now on they are zero.
    Removed {
        /// First address.
        start: u64,
        /// The one after the last.
        end: u64,
    },
    /// Something that nobody asked to be told of; its number.
    Foreign(u8),
}

/// Why nothing was filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The first page is there already.
    Present,
    /// Pages are being removed: read messages, then try again.
    Changing,
    /// No such memory is registered.
    Unmapped,
    /// The process is gone.
    Ended,
    /// Anything else.
    Failed(Errno),
}

impl Refusal {
    fn of(errno: Errno) -> Self {
        match errno {
            Errno::EXIST => Self::Present,
            Errno::AGAIN => Self::Changing,
            Errno::NOENT => Self::Unmapped,
            Errno::SRCH => Self::Ended,
            other => Self::Failed(other),
        }
    }
}

/// A userfaultfd, and with it the right to fill memory of the process that made it.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl Uffd {
    /// Takes a descriptor that another process sent. Anything but a userfaultfd is refused: who sent it may want us
    /// to read something else, or to wait for ever.
    ///
    /// # Errors
    /// The reason, for people.
    pub fn from_stranger(descriptor: OwnedFd) -> Result<Self, &'static str> {
        use std::os::fd::AsRawFd;
        let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        let target = std::fs::read_link(link).map_err(|_| "its descriptor cannot be looked at")?;
        if target.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err("its descriptor is not a userfaultfd");
        }
        let flags = rustix::fs::fcntl_getfl(&descriptor).map_err(|_| "its descriptor cannot be looked at")?;
        rustix::fs::fcntl_setfl(&descriptor, flags | rustix::fs::OFlags::NONBLOCK)
            .map_err(|_| "its descriptor cannot be changed")?;
        Ok(Self(descriptor))
    }

    /// A userfaultfd for memory of this process.
    ///
    /// # Errors
    /// Those of the kernel: it may lack the feature, or the right to it.
    pub fn create() -> io::Result<Self> {
        use rustix::mm::UserfaultfdFlags as Flags;
        // SAFETY: only memory that is registered with it is affected, by those who own that memory.
        let descriptor = unsafe { rustix::mm::userfaultfd(Flags::CLOEXEC | Flags::NONBLOCK) }?;
        let mut api = Api {
            version: API_VERSION,
            features: FEATURE_EVENT_REMOVE,
            ioctls: 0,
        };
        // SAFETY: the structure is the one that this ioctl reads and writes.
        unsafe { ioctl(&descriptor, Updater::<API, Api>::new(&mut api)) }?;
        Ok(Self(descriptor))
    }

    /// Asks to be told of missing pages of anonymous memory of this process.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn register(&self, start: u64, length: u64) -> io::Result<()> {
        let mut register = Register {
            range: Range { start, length },
            mode: MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the structure is the one that this ioctl reads and writes.
        Ok(unsafe { ioctl(&self.0, Updater::<REGISTER, Register>::new(&mut register)) }?)
    }

    /// Lets go of memory: what is missing there is zero from now on, without a message.
    ///
    /// # Errors
    /// Why it is kept.
    pub fn unregister(&self, start: u64, length: u64) -> Result<(), Refusal> {
        let range = Range { start, length };
        // SAFETY: the structure is the one that this ioctl reads.
        unsafe { ioctl(&self.0, Setter::<UNREGISTER, Range>::new(range)) }.map_err(Refusal::of)
    }

    /// Fills missing pages from `address` on. Returns how many bytes were filled: fewer than asked for when it met a
    /// page that is there.
    ///
    /// # Errors
    /// Why nothing was.
    pub fn copy(&self, address: u64, pages: &[u8]) -> Result<usize, Refusal> {
        let mut copy = Copy {
            to: address,
            from: pages.as_ptr() as u64,
            length: pages.len() as u64,
            mode: 0,
            copied: 0,
        };
        // SAFETY: the structure is the one that this ioctl reads and writes; it names a slice that is only read.
        let outcome = unsafe { ioctl(&self.0, Updater::<COPY, Copy>::new(&mut copy)) };
        filled(outcome, copy.copied, pages.len())
    }

    /// Fills missing pages with zeros. As [`Self::copy`] otherwise.
    ///
    /// # Errors
    /// Why nothing was.
    pub fn zero(&self, address: u64, length: usize) -> Result<usize, Refusal> {
        let mut zero = Zero {
            range: Range {
                start: address,
                length: length as u64,
            },
            mode: 0,
            filled: 0,
        };
        // SAFETY: the structure is the one that this ioctl reads and writes.
        let outcome = unsafe { ioctl(&self.0, Updater::<ZERO, Zero>::new(&mut zero)) };
        filled(outcome, zero.filled, length)
    }

    /// Lets those go on that wait for pages which are there already.
    pub fn wake(&self, address: u64, length: usize) {
        let range = Range {
            start: address,
            length: length as u64,
        };
        // SAFETY: the structure is the one that this ioctl reads. It fails only for a process that is gone.
        let _ = unsafe { ioctl(&self.0, Setter::<WAKE, Range>::new(range)) };
    }

    /// What there is to hear, without waiting.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn read(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        let mut buffer = [0; MESSAGE * BATCH];
        loop {
            let length = match rustix::io::read(&self.0, &mut buffer) {
                Ok(length) => length,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            messages.extend(buffer[..length].chunks_exact(MESSAGE).map(parse));
            if length < buffer.len() {
                return Ok(());
            }
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The kernel fails with "again" both when it stopped on its way and when it may not begin.
fn filled(outcome: rustix::io::Result<()>, bytes: i64, wanted: usize) -> Result<usize, Refusal> {
    match outcome {
        Ok(()) => Ok(wanted),
        Err(Errno::AGAIN) if bytes > 0 => Ok(usize::try_from(bytes).unwrap_or(wanted).min(wanted)),
        Err(error) => Err(Refusal::of(error)),
    }
}

fn parse(message: &[u8]) -> Message {
    let number = |at: usize| {
        let bytes = message.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_ne_bytes)
    };
    match message.first() {
        Some(0x12) => Message::Fault {
            address: number(16),
            write: number(8) & FAULT_WRITE != 0,
        },
        Some(0x15) => Message::Removed {
            start: number(8),
            end: number(16),
        },
        // A fork would bring a descriptor, but only to those who asked for such messages; the process is refused.
        other => Message::Foreign(other.copied().unwrap_or_default()),
    }
}
