//! What the workload prints, on its way to the host's log file.
//!
//! Programs get a pipe and not the port itself: the port can be opened only once, and images open
//! `/dev/stdout` again (a link to their own output). Pages move from the pipe to the port without being copied
//! through us. An init of an image gets a terminal as its console.
//!
//! ```text
//! program ── pipe ──┬─► log port (QEMU): it writes the host's file itself
//! init ── terminal ─┼─► the host, by vsock, which may have to wait for it: see [`log_stream`]
//!                   └─► the kernel's console, where there is neither
//! ```

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice},
};
use tokio::sync::watch;

use hypeman_guest_api::LOG_VSOCK_PORT;

use super::{
    log_stream::{self, WhenFull},
    port, vsock,
};

const PIPE_BYTES: usize = 256 * 1024;

/// Largest pipe that is spliced: QEMU takes at most 1,024 pieces at once. Programs without privilege cannot make a
/// larger one.
const MAXIMUM_SPLICED: usize = 1 << 20;

/// More than any pipe holds. The port's driver makes a list of as many pieces as the pipe has and then hands on all of
/// the list, also when the length let it fill only a part: the rest is garbage that breaks the whole device.
const WHOLE_PIPE: usize = 1 << 30;

/// Where output goes.
pub(super) enum Sink {
    /// The log port, or the console.
    Device(File),
    /// The host, reached by vsock.
    Host,
}

impl Sink {
    pub(super) fn open() -> io::Result<Sink> {
        match port::open_log_port() {
            Some(port) => Ok(Sink::Device(port)),
            None if vsock::is_present() => Ok(Sink::Host),
            None => Ok(Sink::Device(File::options().write(true).open("/dev/console")?)),
        }
    }
}

fn send_to_host(source: &OwnedFd, when_full: WhenFull) {
    log_stream::carry(source, when_full, || vsock::dial(LOG_VSOCK_PORT));
}

/// A pipe whose content goes to the sink.
pub(super) struct Output {
    /// For programs.
    pub(super) writer: OwnedFd,
    /// Turns true when the last writer is gone and all is written, by the host where it is the one that writes.
    pub(super) drained: watch::Receiver<bool>,
}

impl Output {
    pub(super) fn start(sink: Sink) -> io::Result<Output> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        // The default size works too.
        let _ = fcntl_setpipe_size(&writer, PIPE_BYTES);
        let (done, drained) = watch::channel(false);
        std::thread::Builder::new()
            .name("output".into())
            .stack_size(64 * 1024)
            .spawn(move || {
                match &sink {
                    Sink::Device(device) => move_all(&reader, device),
                    Sink::Host => send_to_host(&reader, WhenFull::Wait),
                }
                done.send_replace(true);
            })?;
        Ok(Output { writer, drained })
    }
}

fn move_all(reader: &OwnedFd, sink: &File) {
    let mut spliceable = true;
    let mut buffer = vec![0; 16 * 1024];
    loop {
        // The port answers an empty pipe with 0 bytes at once, so the wait is ours, and so is telling the end.
        let mut set = [PollFd::new(reader, PollFlags::IN)];
        if poll(&mut set, None).is_err() {
            continue;
        }
        if !set[0].revents().contains(PollFlags::IN) {
            return;
        }
        if spliceable && fcntl_getpipe_size(reader).is_ok_and(|size| size <= MAXIMUM_SPLICED) {
            match splice(reader, None, sink.as_fd(), None, WHOLE_PIPE, SpliceFlags::MOVE) {
                Ok(_) | Err(Errno::INTR | Errno::AGAIN) => {}
                Err(_) => spliceable = false,
            }
        } else if let Ok(count) = rustix::io::read(reader, &mut buffer) {
            // A sink that fails loses what comes; the program must not block on it.
            let _ = write_all(sink, &buffer[..count]);
        }
    }
}

fn write_all(mut sink: &File, data: &[u8]) -> Result<(), Errno> {
    sink.write_all(data)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

/// Takes what an init prints on its console. Held open here for ever, so that it never hangs up. Losing output is
/// better than stopping the init, and with it the machine.
pub(super) fn follow_terminal(master: OwnedFd, slave: File, sink: Sink) -> io::Result<()> {
    std::thread::Builder::new()
        .name("console".into())
        .stack_size(64 * 1024)
        .spawn(move || {
            let _slave = slave;
            match &sink {
                Sink::Device(device) => copy_all(&mut File::from(master), device),
                Sink::Host => send_to_host(&master, WhenFull::Lose),
            }
        })?;
    Ok(())
}

fn copy_all(master: &mut File, sink: &File) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        match master.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => drop(write_all(sink, &buffer[..count])),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}
