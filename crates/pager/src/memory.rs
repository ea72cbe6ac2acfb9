//! Anonymous memory under a userfaultfd, as a VMM has it: to find out whether this host can serve faults at all, and
//! for tests and benches that stand in a VMM's place.
//!
//! `unsafe` is for the mapping and for looking at it: a page that is missing makes the one who looks wait until
//! somebody fills it, so it is read and written by single volatile accesses and never lent as a slice.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr;

use hypeman_snapshots::PAGE_BYTES;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::uffd::Uffd;

/// Memory whose missing pages somebody else fills.
#[derive(Debug)]
pub struct WatchedMemory {
    start: *mut c_void,
    length: usize,
    uffd: Uffd,
}

// SAFETY: the mapping belongs to this value until it is dropped; all accesses are volatile and of single bytes or
// into memory of the caller.
unsafe impl Send for WatchedMemory {}
// SAFETY: as above; threads that write the same byte race as the processors of a guest do, without tearing it.
unsafe impl Sync for WatchedMemory {}

impl WatchedMemory {
    /// Memory of `length` bytes, all of them missing.
    ///
    /// # Errors
    /// Those of the kernel, where it offers no userfaultfd to this process.
    pub fn new(length: usize) -> io::Result<Self> {
        let uffd = Uffd::create()?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), length, protection, flags) }?;
        let memory = Self { start, length, uffd };
        memory.uffd.register(start as u64, length as u64)?;
        Ok(memory)
    }

    /// Where it begins.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.start as u64
    }

    /// Its size.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.length, "beyond the end of the memory");
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.start.cast::<u8>().add(offset) }
    }

    /// Reads a byte. Waits while its page is missing.
    #[must_use]
    pub fn byte(&self, offset: usize) -> u8 {
        // SAFETY: `at` is within the mapping.
        unsafe { self.at(offset).read_volatile() }
    }

    /// Writes a byte. Waits while its page is missing.
    pub fn set_byte(&self, offset: usize, value: u8) {
        // SAFETY: `at` is within the mapping.
        unsafe { self.at(offset).write_volatile(value) }
    }

    /// Copies bytes out. Waits while their pages are missing.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        if into.is_empty() {
            return;
        }
        let (from, _) = (self.at(offset), self.at(offset + into.len() - 1));
        // SAFETY: both ends are within the mapping, and `into` is elsewhere.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) }
    }

    /// Gives pages back, as a balloon does. Waits until whoever fills pages has heard of it.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn discard(&self, offset: usize, length: usize) -> io::Result<()> {
        let (start, _) = (self.at(offset), self.at(offset + length.max(1) - 1));
        // SAFETY: whole pages of this mapping, to which nobody has a reference.
        unsafe { madvise(start.cast(), length, Advice::LinuxDontNeed) }?;
        Ok(())
    }

    /// Hands the descriptor and `message` to whoever listens at `socket`. Keep the stream: its end is the machine's.
    ///
    /// # Errors
    /// Those of the socket.
    pub fn send(&self, socket: &Path, message: &[u8]) -> io::Result<UnixStream> {
        let stream = UnixStream::connect(socket)?;
        send_with(&stream, message, &[self.uffd.as_fd()])?;
        Ok(stream)
    }

    /// The message that Firecracker sends for such memory, as one region.
    #[must_use]
    pub fn firecracker_message(&self) -> String {
        let (address, length) = (self.address(), self.length);
        format!(
            r#"[{{"base_host_virt_addr":{address},"size":{length},"offset":0,"page_size":{PAGE_BYTES},"page_size_kib":{PAGE_BYTES}}}]"#
        )
    }
}

/// Sends bytes with descriptors.
///
/// # Errors
/// Those of the socket.
pub fn send_with(
    stream: &UnixStream,
    message: &[u8],
    descriptors: &[std::os::fd::BorrowedFd<'_>],
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "too many descriptors",
        ));
    }
    sendmsg(
        stream,
        &[IoSlice::new(message)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

impl Drop for WatchedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and nobody can look at it any more.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

/// Whether faults can be served on this host: makes memory of one page, and fills it.
///
/// # Errors
/// What the kernel refuses.
pub fn probe() -> io::Result<()> {
    let memory = WatchedMemory::new(PAGE_BYTES)?;
    let page = [7; PAGE_BYTES];
    let filled = memory.uffd.copy(memory.address(), &page);
    match filled {
        Ok(_) if memory.byte(PAGE_BYTES - 1) == 7 => Ok(()),
        other => Err(io::Error::other(format!(
            "userfaultfd does not fill pages: {other:?}"
        ))),
    }
}
