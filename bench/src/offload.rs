//! The smallest honest offload daemon: the other end of Cloud Hypervisor's local migration, with guest memory from and to
//! one file.
//!
//! ```text
//! captures  VMM ─ Start, MemoryFd…, Config │ the guest is paused │ State, Complete ─► daemon copies, answers, VMM ends
//! restores  daemon ─ Start, (MemoryFd), Config ─► VMM builds memory ─ State, Complete ─► the guest runs
//!           VMM ─ PageFault ─► daemon: one page each, over a second connection
//! ```
//!
//! Each message is a head of 16 bytes (command or status, six bytes of nothing, length) and its payload.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use hypeman_snapshots::CHUNK_BYTES;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use crate::load::pause;
use crate::source::{self, Room, Source};

const START: u16 = 1;
const CONFIG: u16 = 2;
const STATE: u16 = 3;
const COMPLETE: u16 = 5;
const MEMORY_FD: u16 = 7;
const COMPLETE_PAUSED: u16 = 8;
const PAGE_FAULT: u16 = 9;
/// Status of a good answer.
const OK: u16 = 1;
/// Role of the second connection.
const FAULTS: u16 = 2;
/// Bytes of a head.
const HEAD: usize = 16;
/// No part of a machine's description is longer.
const LONGEST: u64 = 64 << 20;
/// Longer than any step takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// How a restored machine gets its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A descriptor of memory that was filled before.
    Filled,
    /// A descriptor of empty memory; the daemon writes pages there when they are asked for.
    Shared,
    /// No descriptor: memory of the VMM's own, and pages travel over the connection.
    Inline,
}

/// What a machine is, besides its memory.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The number under which the VMM knows its memory.
    pub slot: u32,
    /// Its description, with what of it concerns memory.
    pub config: Vec<u8>,
    /// The state of its devices.
    pub state: Vec<u8>,
}

/// Pages are served until this thread ends; it returns how many.
pub type Serving = JoinHandle<io::Result<u64>>;

/// A capture.
#[derive(Debug)]
pub struct Taken {
    /// From before the pause until the device state was here, and memory by its descriptor.
    pub in_hand: Duration,
    /// From before the pause until memory was copied as well.
    pub copied: Duration,
}

/// Lays out the memory of a machine that is to be restored; nothing where the VMM has its own.
///
/// # Errors
/// The source is damaged, or there is no room.
pub fn lay_out(way: Way, source: &Source, bytes: u64) -> io::Result<Option<File>> {
    if way == Way::Inline {
        return Ok(None);
    }
    let memory = File::from(rustix::fs::memfd_create("offload", MemfdFlags::CLOEXEC)?);
    memory.set_len(bytes)?;
    if way == Way::Filled {
        source.fill(&memory)?;
    }
    Ok(Some(memory))
}

/// Sends a machine that then runs. `again` makes the second connection.
///
/// # Errors
/// The VMM refuses a part, or is gone.
pub fn send(
    mut stream: UnixStream,
    again: &Path,
    parts: &Parts,
    memory: Option<&File>,
    served: Option<Arc<Source>>,
) -> io::Result<Option<Serving>> {
    stream.set_read_timeout(Some(PATIENCE))?;
    ask(&mut stream, START, &[])?;
    if let Some(memory) = memory {
        write_head(&mut stream, MEMORY_FD, 4)?;
        send_descriptor(&stream, parts.slot, memory)?;
        expect_ok(&mut stream, "the memory")?;
    }
    ask(&mut stream, CONFIG, &parts.config)?;
    // Faults come as soon as the VMM has the state.
    let serving = match served {
        None => None,
        Some(source) => {
            let mut faults = UnixStream::connect(again)?;
            faults.write_all(&FAULTS.to_le_bytes())?;
            let memory = memory.map(File::try_clone).transpose()?;
            Some(std::thread::spawn(move || {
                serve(faults, &source, memory.as_ref())
            }))
        }
    };
    ask(&mut stream, STATE, &parts.state)?;
    ask(&mut stream, COMPLETE, &[])?;
    Ok(serving)
}

/// Answers page faults until the VMM has all pages or is gone.
fn serve(mut stream: UnixStream, source: &Source, memory: Option<&File>) -> io::Result<u64> {
    let (mut written, mut kept) = (HashSet::new(), HashMap::<u64, Vec<u8>>::new());
    let mut room = Room::new();
    let mut pages = 0;
    while let Ok((command, _)) = read_head(&mut stream) {
        if command != PAGE_FAULT {
            return Err(unexpected(command));
        }
        let mut range = [0; 16];
        stream.read_exact(&mut range)?;
        let [address, length] = [number_at(&range, 0), number_at(&range, 8)];
        let chunk = address / CHUNK_BYTES as u64;
        let within = (address % CHUNK_BYTES as u64) as usize;
        pages += 1;
        let gone = match memory {
            Some(memory) => {
                // All that was expanded at once is there at once; zeros too, or they would be asked for for ever.
                if written.insert(chunk) {
                    source.chunk(chunk, &mut room)?;
                    memory.write_all_at(&room.bytes, chunk * CHUNK_BYTES as u64)?;
                }
                write_head(&mut stream, OK, 0)
            }
            None => {
                let bytes = match kept.entry(chunk) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(place) => {
                        source.chunk(chunk, &mut room)?;
                        place.insert(room.bytes.clone())
                    }
                };
                let page = bytes
                    .get(within..within + length as usize)
                    .ok_or_else(|| odd("a page fault that is not within a chunk"))?;
                let mut answer = Vec::with_capacity(HEAD + page.len());
                write_head(&mut answer, OK, length)?;
                answer.extend_from_slice(page);
                stream.write_all(&answer)
            }
        };
        if gone.is_err() {
            break;
        }
    }
    Ok(pages)
}

/// Takes a machine whose VMM connects, into a copy of its memory. The VMM ends with the answer to its last message,
/// which comes when nothing is needed of it any more.
///
/// # Errors
/// The VMM does something else, or is gone.
pub fn receive(listener: &UnixListener) -> io::Result<Taken> {
    let mut stream = accept(listener)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut memory: Option<(File, File)> = None;
    let mut began = Instant::now();
    loop {
        let (command, length) = read_head(&mut stream)?;
        match command {
            START => {}
            MEMORY_FD if memory.is_none() => {
                let theirs = receive_descriptor(&stream)?;
                // The guest still runs: what can be done before the pause is done.
                let copy = room_like(&theirs)?;
                memory = Some((theirs, copy));
            }
            CONFIG => {
                read_payload(&mut stream, length)?;
                // It pauses the guest once this is answered.
                began = Instant::now();
            }
            STATE => {
                read_payload(&mut stream, length)?;
            }
            COMPLETE | COMPLETE_PAUSED => {
                let (theirs, copy) = memory.as_ref().ok_or_else(|| odd("a machine without memory"))?;
                let in_hand = began.elapsed();
                source::copy(theirs, copy)?;
                let copied = began.elapsed();
                write_head(&mut stream, OK, 0)?;
                return Ok(Taken { in_hand, copied });
            }
            other => return Err(unexpected(other)),
        }
        write_head(&mut stream, OK, 0)?;
    }
}

/// Accepts the VMM's connection. One that fails before it connects says so in its log alone.
fn accept(listener: &UnixListener) -> io::Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let began = Instant::now();
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(error) if error.kind() != io::ErrorKind::WouldBlock || began.elapsed() > PATIENCE => {
                return Err(error);
            }
            Err(_) => pause(Duration::from_micros(200)),
        }
    }
}

/// Room for a copy, with pages where there is something to copy.
fn room_like(memory: &File) -> io::Result<File> {
    let room = File::from(rustix::fs::memfd_create("capture", MemfdFlags::CLOEXEC)?);
    room.set_len(memory.metadata()?.len())?;
    for extent in source::extents(memory)? {
        fallocate(
            &room,
            FallocateFlags::empty(),
            extent.start,
            extent.end - extent.start,
        )?;
    }
    Ok(room)
}

fn ask(stream: &mut UnixStream, command: u16, payload: &[u8]) -> io::Result<()> {
    write_head(stream, command, payload.len() as u64)?;
    stream.write_all(payload)?;
    expect_ok(stream, &format!("message {command}"))
}

fn expect_ok(stream: &mut UnixStream, what: &str) -> io::Result<()> {
    match read_head(stream)? {
        (OK, _) => Ok(()),
        (status, _) => Err(odd(&format!("the VMM answered {what} with {status}"))),
    }
}

fn write_head(stream: &mut impl Write, word: u16, length: u64) -> io::Result<()> {
    let mut head = [0; HEAD];
    head[..2].copy_from_slice(&word.to_le_bytes());
    head[8..].copy_from_slice(&length.to_le_bytes());
    stream.write_all(&head)
}

fn read_head(stream: &mut impl Read) -> io::Result<(u16, u64)> {
    let mut head = [0; HEAD];
    stream.read_exact(&mut head)?;
    Ok((u16::from_le_bytes([head[0], head[1]]), number_at(&head, 8)))
}

fn read_payload(stream: &mut impl Read, length: u64) -> io::Result<Vec<u8>> {
    if length > LONGEST {
        return Err(odd("a part of a machine that is too long"));
    }
    let mut payload = vec![0; length as usize];
    stream.read_exact(&mut payload)?;
    Ok(payload)
}

fn number_at(bytes: &[u8; HEAD], at: usize) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(number)
}

fn send_descriptor(stream: &UnixStream, slot: u32, memory: &File) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [memory.as_fd()];
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let word = slot.to_le_bytes();
    sendmsg(
        stream,
        &[IoSlice::new(&word)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

fn receive_descriptor(stream: &UnixStream) -> io::Result<File> {
    let mut slot = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut buffers = [IoSliceMut::new(&mut slot)];
    recvmsg(stream, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    descriptor
        .map(File::from)
        .ok_or_else(|| odd("a message without the descriptor of memory"))
}

fn unexpected(command: u16) -> io::Error {
    odd(&format!("the VMM sent {command} where that has no meaning"))
}

fn odd(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(bytes: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * CHUNK_BYTES as u64).unwrap();
        file.write_all_at(bytes, CHUNK_BYTES as u64).unwrap();
        file
    }

    /// The VMM's side of a capture, played by hand.
    #[test]
    fn a_machine_is_taken_when_the_vmm_says_that_it_is_complete() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let mut vmm = UnixStream::connect(&socket).unwrap();
        let daemon = std::thread::spawn(move || receive(&listener));
        ask(&mut vmm, START, &[]).unwrap();
        write_head(&mut vmm, MEMORY_FD, 4).unwrap();
        send_descriptor(&vmm, 0, &filled(b"guest")).unwrap();
        expect_ok(&mut vmm, "memory").unwrap();
        ask(&mut vmm, CONFIG, b"{}").unwrap();
        ask(&mut vmm, STATE, b"{}").unwrap();
        ask(&mut vmm, COMPLETE_PAUSED, &[]).unwrap();
        let taken = daemon.join().unwrap().unwrap();
        assert!(taken.in_hand <= taken.copied);
    }

    #[test]
    fn a_page_comes_over_the_connection_or_lies_in_shared_memory() {
        for shared in [false, true] {
            let memory =
                shared.then(|| lay_out(Way::Shared, &Source::Raw(filled(b"")), 2 * CHUNK_BYTES as u64));
            let memory = memory.map(|memory| memory.unwrap().unwrap());
            let (mut vmm, daemon) = UnixStream::pair().unwrap();
            let theirs = memory.as_ref().map(|memory| memory.try_clone().unwrap());
            let serving =
                std::thread::spawn(move || serve(daemon, &Source::Raw(filled(b"guest")), theirs.as_ref()));
            write_head(&mut vmm, PAGE_FAULT, 16).unwrap();
            vmm.write_all(&(CHUNK_BYTES as u64).to_le_bytes()).unwrap();
            vmm.write_all(&4096_u64.to_le_bytes()).unwrap();
            let (status, length) = read_head(&mut vmm).unwrap();
            assert_eq!((status, length), (OK, if shared { 0 } else { 4096 }));
            let mut page = vec![0; 4096];
            match &memory {
                Some(memory) => memory.read_exact_at(&mut page, CHUNK_BYTES as u64).unwrap(),
                None => vmm.read_exact(&mut page).unwrap(),
            }
            assert_eq!(&page[..6], b"guest\0");
            drop(vmm);
            assert_eq!(serving.join().unwrap().unwrap(), 1);
        }
    }
}
