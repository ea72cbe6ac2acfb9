//! A stream that two halves of one task share, and that can be asked whether the host gave it up.

use std::{
    cell::RefCell,
    io,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll},
};

use hypeman_guest_api::mux::MuxStream;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Both halves at once: clones read and write the same stream. One clone reads, one writes.
#[derive(Clone)]
pub(super) struct SharedStream(Rc<RefCell<MuxStream>>);

impl SharedStream {
    pub(super) fn new(stream: MuxStream) -> Self {
        SharedStream(Rc::new(RefCell::new(stream)))
    }

    /// The host dropped its end, even if bytes that it sent before still wait to be read.
    pub(super) fn is_abandoned(&self) -> bool {
        self.0.borrow().get_ref().is_closed()
    }
}

impl AsyncRead for SharedStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_read(cx, buf)
    }
}

impl AsyncWrite for SharedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.borrow_mut()).poll_shutdown(cx)
    }
}
