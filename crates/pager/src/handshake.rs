//! The first and only message of a VMM: its userfaultfd and where its memory lies.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::regions::{MAX_MESSAGE, Mapping, RegionError, Regions};
use crate::uffd::Uffd;

/// A VMM sends its message right after it connected. One that stands still must not be waited for without end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a VMM was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandshakeError {
    #[error("the VMM runs as user {found}, not {expected}")]
    User { found: u32, expected: u32 },
    #[error("the VMM hung up before it said where its memory lies")]
    HungUp,
    #[error("the VMM did not say within {} seconds where its memory lies", PATIENCE.as_secs())]
    Silent,
    #[error("the VMM sent {0} descriptors with its message, not one")]
    Descriptors(usize),
    #[error("the VMM was refused: {0}")]
    Descriptor(&'static str),
    #[error("the VMM did not say in a known form where its memory lies")]
    Form,
    #[error("the VMM was refused: {0}")]
    Regions(#[from] RegionError),
    #[error("the VMM could not be heard: {0}")]
    Io(#[from] io::Error),
}

/// Whether the peer is who may connect: this process's own user, or the one to whom the socket was given.
pub(crate) fn check_user(stream: &UnixStream, socket: &Path) -> Result<(), HandshakeError> {
    let found = rustix::net::sockopt::socket_peercred(stream)
        .map_err(io::Error::from)?
        .uid
        .as_raw();
    let own = rustix::process::geteuid().as_raw();
    let expected = std::fs::symlink_metadata(socket)?.uid();
    if found == own || found == expected {
        return Ok(());
    }
    Err(HandshakeError::User { found, expected })
}

/// Receives and checks the message.
pub(crate) fn receive(stream: &UnixStream, memory_bytes: u64) -> Result<(Uffd, Regions), HandshakeError> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut descriptors = Vec::new();
    let mut message = Vec::new();
    // It comes in one piece as a rule; nothing promises that.
    let mappings: Vec<Mapping> = loop {
        let length = receive_part(stream, &mut message, &mut descriptors)?;
        if length == 0 {
            return Err(HandshakeError::HungUp);
        }
        if message.len() > MAX_MESSAGE {
            return Err(HandshakeError::Form);
        }
        match serde_json::from_slice(&message) {
            Ok(mappings) => break mappings,
            Err(error) if error.is_eof() => {}
            Err(_) => return Err(HandshakeError::Form),
        }
    };
    let count = descriptors.len();
    let Some(descriptor) = descriptors.pop().filter(|_| count == 1) else {
        return Err(HandshakeError::Descriptors(count));
    };
    let regions = Regions::check(&mappings, memory_bytes)?;
    let uffd = Uffd::from_stranger(descriptor).map_err(HandshakeError::Descriptor)?;
    Ok((uffd, regions))
}

fn receive_part(
    stream: &UnixStream,
    message: &mut Vec<u8>,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize, HandshakeError> {
    let mut part = vec![0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut buffers = [IoSliceMut::new(&mut part)];
        match recvmsg(stream, &mut buffers, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Err(HandshakeError::Silent),
            other => break other.map_err(io::Error::from)?,
        }
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    message.extend_from_slice(&part[..received.bytes]);
    Ok(received.bytes)
}
