//! Ends the connections that a copy has from its source.
//!
//! They belong to another machine's address: nothing that the copy sends on them arrives, and its programs would wait
//! for minutes before they noticed. Ended, they fail at once, and whoever keeps them makes new ones. What listens goes
//! on, and so do connections within the machine.
//!
//! ```text
//! request: all TCP sockets that do not listen ──► one message each ──► request: end this one
//! ```
//!
//! By the kernel's socket diagnosis over netlink. A kernel without it leaves the connections to their time limits.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

const SOCKET_DIAGNOSIS: u32 = 4;
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
const DONE: u16 = 3;
const ERROR: u16 = 2;
const IS_REQUEST: u16 = 1;
const ACKNOWLEDGE: u16 = 4;
const DUMP: u16 = 0x300;
/// All states but `TCP_LISTEN` (10) and `TCP_CLOSE` (7).
const CONNECTED: u32 = !(1 << 10 | 1 << 7);

/// Length of the header of a message, and of what comes before a socket's id in requests and answers.
const HEADER: usize = 16;
const BEFORE_ID: [usize; 2] = [8, 4];
const ID: usize = 48;
/// More sockets than a machine has.
const MOST: usize = 1_000_000;

/// Ends them; how many there were.
pub(super) fn end() -> io::Result<usize> {
    let mut ended = 0;
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let socket = open()?;
        let sockets = list(&socket, family)?;
        for id in sockets.iter().filter(|id| !is_internal(family, id)) {
            request(&socket, DESTROY, IS_REQUEST | ACKNOWLEDGE, family, id)?;
            // One that ended by itself meanwhile is as good.
            let _ = answers(&socket, |_| {});
            ended += 1;
        }
    }
    Ok(ended)
}

fn open() -> io::Result<OwnedFd> {
    let protocol = rustix::net::Protocol::from_raw(
        std::num::NonZero::new(SOCKET_DIAGNOSIS).ok_or(io::ErrorKind::Other)?,
    );
    Ok(socket_with(
        AddressFamily::NETLINK,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        Some(protocol),
    )?)
}

/// The ids of all connected sockets of a family.
fn list(socket: &OwnedFd, family: u8) -> io::Result<Vec<[u8; ID]>> {
    request(socket, BY_FAMILY, IS_REQUEST | DUMP, family, &[0; ID])?;
    let mut found = Vec::new();
    answers(socket, |message| {
        let id = message.get(BEFORE_ID[1]..).and_then(|rest| rest.first_chunk());
        if let Some(id) = id
            && found.len() < MOST
        {
            found.push(*id);
        }
    })?;
    Ok(found)
}

fn request(socket: &OwnedFd, kind: u16, flags: u16, family: u8, id: &[u8; ID]) -> io::Result<()> {
    let length = HEADER + BEFORE_ID[0] + ID;
    let mut message = Vec::with_capacity(length);
    message.extend_from_slice(&(length as u32).to_ne_bytes());
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&[family, libc::IPPROTO_TCP as u8, 0, 0]);
    message.extend_from_slice(&CONNECTED.to_ne_bytes());
    message.extend_from_slice(id);
    send(socket, &message, SendFlags::empty())?;
    Ok(())
}

/// Reads the messages up to the last answer to one request.
fn answers(socket: &OwnedFd, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let (count, _) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
        let mut rest = &buffer[..count];
        while let Some((kind, content, next)) = split(rest) {
            match kind {
                DONE => return Ok(()),
                ERROR => return error_in(content),
                _ => each(content),
            }
            rest = next;
        }
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

/// The first message: its kind, its content, and what follows it.
fn split(messages: &[u8]) -> Option<(u16, &[u8], &[u8])> {
    let length = u32::from_ne_bytes(*messages.first_chunk()?) as usize;
    let kind = u16::from_ne_bytes([*messages.get(4)?, *messages.get(5)?]);
    let content = messages.get(HEADER..length)?;
    let next = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    Some((kind, content, next))
}

/// An error of 0 is an acknowledgement.
fn error_in(content: &[u8]) -> io::Result<()> {
    match content.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Whether both ends are in this machine: the own one has an address of the loopback.
fn is_internal(family: u8, id: &[u8; ID]) -> bool {
    let own = &id[4..20];
    let address = match own.first_chunk() {
        Some(four) if i32::from(family) == libc::AF_INET => IpAddr::V4(Ipv4Addr::from(*four)),
        _ => match own.first_chunk::<16>() {
            Some(all) => IpAddr::V6(Ipv6Addr::from(*all)).to_canonical(),
            None => return false,
        },
    };
    address.is_loopback()
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::{ID, is_internal, list, open, split};

    #[test]
    fn connections_within_the_machine_are_told_apart() {
        let mut id = [0; ID];
        id[4..8].copy_from_slice(&[127, 0, 0, 1]);
        assert!(is_internal(libc::AF_INET as u8, &id));
        id[4..8].copy_from_slice(&[10, 0, 0, 1]);
        assert!(!is_internal(libc::AF_INET as u8, &id));
        let mut id = [0; ID];
        id[14..20].copy_from_slice(&[0xff, 0xff, 127, 0, 0, 1]);
        assert!(
            is_internal(libc::AF_INET6 as u8, &id),
            "in the clothes of version 6"
        );
        id[14..20].copy_from_slice(&[0xff, 0xff, 10, 0, 0, 1]);
        assert!(!is_internal(libc::AF_INET6 as u8, &id));
        id[4..20].copy_from_slice(&std::net::Ipv6Addr::LOCALHOST.octets());
        assert!(is_internal(libc::AF_INET6 as u8, &id));
    }

    #[test]
    fn messages_that_lie_about_their_length_are_not_read() {
        assert!(split(&[]).is_none());
        assert!(split(&[255, 0, 0, 0, 1, 0, 0, 0]).is_none());
        assert!(split(&[3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).is_none());
    }

    #[test]
    fn the_sockets_of_this_machine_are_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let port = stream.local_addr().unwrap().port().to_be_bytes();
        let Ok(found) = open().and_then(|socket| list(&socket, libc::AF_INET as u8)) else {
            // This kernel has no socket diagnosis.
            return;
        };
        assert!(found.iter().any(|id| id[..2] == port));
        let listens = listener.local_addr().unwrap().port().to_be_bytes();
        let listening = found.iter().filter(|id| id[..2] == listens && id[2..4] == [0, 0]);
        assert_eq!(listening.count(), 0, "what listens is left alone");
    }
}
