//! Opens one file for a process that may not open it itself: memory, or a TAP (see [`crate::tap`]).
//!
//! QEMU opens what is behind a private mapping for reading and writing, although it only ever reads it. Allowed to, a
//! VMM that its guest has taken over could write into an image that other machines are made of. So the file stays
//! outside of the jail; the process's filter asks us about opens of exactly this kind, and for the one path it gets a
//! descriptor that can be read from. After that nobody answers, and such opens fail.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::event::{PollFd, PollFlags, poll};

use crate::{Lent, Memory, tap};

/// A path that is longer is not the one.
const PATH_LIMIT: usize = 4096;

/// Answers the process's questions on a thread of its own, until it has what it needs or has ended.
pub(crate) fn answer(listener: OwnedFd, lent: Lent) -> io::Result<()> {
    let work = move || {
        if let Err(error) = serve(&listener, &lent) {
            tracing::warn!(what = %lent.name(), %error, "a VMM did not get what it asked for");
        }
    };
    std::thread::Builder::new()
        .name("jail-opener".to_owned())
        .spawn(work)
        .map(drop)
}

fn serve(listener: &OwnedFd, lent: &Lent) -> io::Result<()> {
    loop {
        let mut ready = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut ready, None) {
            Ok(_) if ready[0].revents().contains(PollFlags::IN) => {}
            // Nobody is left to ask.
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        let question = match receive(listener) {
            Ok(question) => question,
            // Who asked has been killed, or interrupted and asks again.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => continue,
            Err(error) => return Err(error),
        };
        let outcome = match lent {
            Lent::Memory(memory) => answer_memory(listener, &question, memory),
            Lent::Tap(tap) => tap::answer(listener, &question, tap),
        };
        match outcome {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Whether this was the last question.
fn answer_memory(listener: &OwnedFd, question: &libc::seccomp_notif, memory: &Memory) -> io::Result<bool> {
    let path = read_text(question.pid, question.data.args[1]);
    if path.is_ok_and(|path| path == memory.path.as_os_str().as_bytes()) {
        hand_over(listener, question.id, &memory.file).map(|()| true)
    } else {
        let_go_on(listener, question.id).map(|()| false)
    }
}

fn receive(listener: &OwnedFd) -> io::Result<libc::seccomp_notif> {
    // SAFETY: the kernel wants the structure zeroed and fills it; all of its bit patterns are valid.
    unsafe {
        let mut question: libc::seccomp_notif = std::mem::zeroed();
        let result = libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_RECV,
            &raw mut question,
        );
        if result == 0 {
            Ok(question)
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// A string with its end in the memory of a process. It may change right after; then it was this once.
pub(crate) fn read_text(pid: u32, address: u64) -> io::Result<Vec<u8>> {
    let mut text = vec![0; PATH_LIMIT];
    let local = libc::iovec {
        iov_base: text.as_mut_ptr().cast(),
        iov_len: text.len(),
    };
    // The end of the string may lie right before memory that is not there.
    let page = 4096 - (address as usize % 4096);
    let remote = [
        (address as usize, page),
        (address as usize + page, text.len() - page),
    ]
    .map(|(start, length)| libc::iovec {
        iov_base: start as *mut libc::c_void,
        iov_len: length,
    });
    // SAFETY: the local vector is `text`, which is ours and as long as it says. The remote ones are checked by the
    // kernel, which copies up to the first that is not there.
    let count = unsafe {
        libc::process_vm_readv(
            pid as libc::pid_t,
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    let end = text[..count].iter().position(|byte| *byte == 0);
    text.truncate(end.ok_or(io::ErrorKind::InvalidData)?);
    Ok(text)
}

/// The call returns a descriptor of this file.
pub(crate) fn hand_over(listener: &OwnedFd, id: u64, file: &File) -> io::Result<()> {
    let answer = libc::seccomp_notif_addfd {
        id,
        flags: libc::SECCOMP_ADDFD_FLAG_SEND as u32,
        srcfd: file.as_raw_fd() as u32,
        newfd: 0,
        newfd_flags: libc::O_CLOEXEC as u32,
    };
    // SAFETY: `answer` is a whole structure that the kernel only reads; the file in it is open.
    let result = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_ADDFD,
            &raw const answer,
        )
    };
    if result >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The call does what it would have done.
pub(crate) fn let_go_on(listener: &OwnedFd, id: u64) -> io::Result<()> {
    respond(listener, id, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32)
}

/// The call returns zero and does nothing.
pub(crate) fn reply(listener: &OwnedFd, id: u64) -> io::Result<()> {
    respond(listener, id, 0)
}

fn respond(listener: &OwnedFd, id: u64, flags: u32) -> io::Result<()> {
    let mut answer = libc::seccomp_notif_resp {
        id,
        val: 0,
        error: 0,
        flags,
    };
    // SAFETY: `answer` is a whole structure.
    let result = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_SEND,
            &raw mut answer,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// An error where the process no longer waits for this answer.
pub(crate) fn still_asks(listener: &OwnedFd, id: u64) -> io::Result<()> {
    // SAFETY: the kernel reads one number.
    let result = unsafe {
        libc::ioctl(
            listener.as_raw_fd(),
            libc::SECCOMP_IOCTL_NOTIF_ID_VALID,
            &raw const id,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
