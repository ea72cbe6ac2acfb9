//! The virtio-serial ports: the agent's channel and the workload's output.
//!
//! A port has no connections. While no host has it open, reads give 0 bytes and `poll` says that it is hung up,
//! for ever, which would turn any level-triggered wait into a busy loop. So the port sits in an edge-triggered
//! epoll set of its own: the kernel wakes its waiters exactly when a host opens or closes the port and when data
//! or room comes, and each wake-up is taken out once.

use std::{
    cell::Cell,
    fs,
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
    time::Duration,
};

use hypeman_guest_api::{AGENT_PORT_NAME, LOG_PORT_NAME};
use rustix::{
    event::{PollFd, PollFlags, Timespec, epoll, poll},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf, unix::AsyncFd};

use crate::agent::asynchronous;

const PORTS: &str = "/sys/class/virtio-ports";

/// Device node of the port with this name, once it is there.
fn node(name: &str) -> Option<String> {
    fs::read_dir(PORTS).ok()?.flatten().find_map(|entry| {
        let said = fs::read_to_string(entry.path().join("name")).ok()?;
        (said.trim() == name).then(|| format!("/dev/{}", entry.file_name().to_string_lossy()))
    })
}

/// Opens the agent's port; the kernel may still be finding its devices.
pub(super) async fn open_agent_port() -> io::Result<OwnedFd> {
    // There is no event for a class device without udev, so look, soon at first.
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(path) = node(AGENT_PORT_NAME)
            && let Ok(file) = File::options().read(true).write(true).open(&path)
        {
            return Ok(file.into());
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Opens the port that takes the workload's output, if the machine has one.
pub(super) fn open_log_port() -> Option<File> {
    File::options().write(true).open(node(LOG_PORT_NAME)?).ok()
}

/// The agent's port. Held open for life: the kernel lets it be opened once, which keeps others out.
pub(super) struct Port {
    port: OwnedFd,
    wakeups: AsyncFd<OwnedFd>,
    reader_waits: Cell<bool>,
    writer_waits: Cell<bool>,
}

impl Port {
    pub(super) fn new(port: OwnedFd) -> io::Result<Port> {
        fcntl_setfl(&port, fcntl_getfl(&port)? | OFlags::NONBLOCK)?;
        let set = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&set, &port, epoll::EventData::new_u64(0), interest)?;
        Ok(Port {
            port,
            wakeups: asynchronous(set)?,
            reader_waits: Cell::new(false),
            writer_waits: Cell::new(false),
        })
    }

    fn is_hung_up(&self) -> bool {
        let mut set = [PollFd::new(&self.port, PollFlags::IN)];
        match poll(
            &mut set,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        ) {
            Ok(_) => set[0].revents().contains(PollFlags::HUP),
            Err(_) => true,
        }
    }

    /// Waits until a host has the port open.
    pub(super) async fn host_is_there(&self) {
        while self.is_hung_up() {
            // The limit only guards against a wake-up that some kernel forgets.
            let _ = tokio::time::timeout(
                Duration::from_secs(1),
                std::future::poll_fn(|cx| self.poll_wakeup(cx)),
            )
            .await;
        }
    }

    /// Ready after each wake-up of the port since the last call.
    fn poll_wakeup(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut guard = ready!(self.wakeups.poll_read_ready(cx))?;
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); 1];
        epoll::wait(
            self.wakeups.get_ref().as_fd(),
            &mut events,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )?;
        guard.clear_ready();
        Poll::Ready(Ok(()))
    }

    /// Tries until it succeeds or must wait. Reader and writer are polled by one task; a wake-up taken by one of
    /// them is passed on to the other.
    fn poll_io(
        &self,
        cx: &mut Context<'_>,
        mine: &Cell<bool>,
        other: &Cell<bool>,
        mut attempt: impl FnMut() -> Result<usize, Errno>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match attempt() {
                Ok(count) => {
                    mine.set(false);
                    return Poll::Ready(Ok(count));
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    mine.set(true);
                    ready!(self.poll_wakeup(cx))?;
                    if other.replace(false) {
                        cx.waker().wake_by_ref();
                    }
                }
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

/// The port during one connection.
pub(super) struct PortStream(Rc<Port>);

impl PortStream {
    pub(super) fn new(port: Rc<Port>) -> Self {
        PortStream(port)
    }
}

impl AsyncRead for PortStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let port = &self.0;
        let target = buf.initialize_unfilled();
        let count = ready!(port.poll_io(cx, &port.reader_waits, &port.writer_waits, || {
            rustix::io::read(&port.port, &mut *target)
        }))?;
        // 0 bytes: the host closed the port, or the machine was restored.
        buf.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PortStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let port = &self.0;
        port.poll_io(cx, &port.writer_waits, &port.reader_waits, || {
            rustix::io::write(&port.port, buf)
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
