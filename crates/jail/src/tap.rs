//! Answers a process that opens its TAP by name, although it sees an empty network.
//!
//! ```text
//!  it opens /dev/net/tun            ─► gets a descriptor that is attached to its TAP already
//!  it attaches it to the TAP        ─► is told that this is done
//!  it asks for address, flags, MTU  ─► is told those of its TAP
//! ```
//!
//! The TAP stays in the host's network, where the rules for it hold. Whatever name the process says, it is not looked
//! at: there is one TAP, and the kernel attaches no descriptor twice.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::Tap;
use crate::filter::{TAP_ATTACH, TAP_MTU};
use crate::opener::{hand_over, let_go_on, read_text, reply, still_asks};

const DEVICE: &[u8] = b"/dev/net/tun";

/// `struct ifreq`: a name, and what was asked about it.
#[repr(C, align(8))]
struct Request([u8; size_of::<libc::ifreq>()]);

/// Answers one question. Whether it was the last.
pub(crate) fn answer(listener: &OwnedFd, question: &libc::seccomp_notif, tap: &Tap) -> io::Result<bool> {
    let call = libc::c_long::from(question.data.nr);
    if call != libc::SYS_ioctl {
        let path = question.data.args[usize::from(call == libc::SYS_openat)];
        return match read_text(question.pid, path) {
            Ok(path) if path == DEVICE => hand_over(listener, question.id, &tap.file),
            _ => let_go_on(listener, question.id),
        }
        .map(|()| false);
    }
    let asked = question.data.args[1] as u32;
    if asked == TAP_ATTACH {
        reply(listener, question.id)?;
        return Ok(!tap.described);
    }
    let memory = File::options()
        .write(true)
        .open(format!("/proc/{}/mem", question.pid))?;
    // While it still asks, the number has not become another's.
    still_asks(listener, question.id)?;
    memory.write_all_at(&look(&tap.name, asked)?.0, question.data.args[2])?;
    reply(listener, question.id)?;
    Ok(asked == TAP_MTU)
}

/// Asks the kernel, in the host's network.
fn look(name: &str, asked: u32) -> io::Result<Request> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut request = Request([0; size_of::<libc::ifreq>()]);
    let room = request.0[..libc::IF_NAMESIZE - 1].iter_mut();
    for (to, from) in room.zip(name.bytes()) {
        *to = from;
    }
    // SAFETY: the kernel reads and writes one whole structure, which is as long and as aligned as it takes it.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), asked as _, &raw mut request) };
    if result == 0 {
        Ok(request)
    } else {
        Err(io::Error::last_os_error())
    }
}
