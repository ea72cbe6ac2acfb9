//! One connection as many streams: yamux with fixed bounds, driven by one task.
//!
//! Memory that a peer can make us hold is bounded by construction: [`MAXIMUM_STREAMS`] windows of 256 KiB each.
//! The limit of a connection equals that product, which also keeps yamux from growing any single window.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, BufStream},
    sync::{mpsc, oneshot},
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

/// Streams of one connection at any time.
pub const MAXIMUM_STREAMS: usize = 128;

const WINDOW: usize = 256 * 1024;

/// Bytes that are gathered before they are written or read, so that a yamux header and its body travel together.
const BUFFER: usize = 32 * 1024;

/// One stream of a connection.
pub type MuxStream = Compat<yamux::Stream>;

/// A wish for a stream and where to put it.
pub type Opening = oneshot::Sender<io::Result<MuxStream>>;

fn config() -> yamux::Config {
    let mut config = yamux::Config::default();
    config.set_max_num_streams(MAXIMUM_STREAMS);
    config.set_max_connection_receive_window(Some(MAXIMUM_STREAMS * WINDOW));
    config.set_split_send_size(crate::frame::MAXIMUM_DATA + 64);
    config
}

type Connection<S> = yamux::Connection<Compat<BufStream<S>>>;

fn connection<S: AsyncRead + AsyncWrite + Unpin>(stream: S, mode: yamux::Mode) -> Connection<S> {
    yamux::Connection::new(
        BufStream::with_capacity(BUFFER, BUFFER, stream).compat(),
        config(),
        mode,
    )
}

/// Drives the host's end until it fails, ends or nobody holds a sender of openings any more. Streams that the
/// guest opens are reset: it has nothing to ask.
pub async fn drive_host<S: AsyncRead + AsyncWrite + Unpin>(stream: S, mut openings: mpsc::Receiver<Opening>) {
    let mut connection = connection(stream, yamux::Mode::Client);
    let mut waiting: Option<Opening> = None;
    poll_fn(|cx| {
        loop {
            if waiting.is_none() {
                match openings.poll_recv(cx) {
                    Poll::Ready(Some(opening)) => waiting = Some(opening),
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
            }
            if waiting.is_some()
                && let Poll::Ready(opened) = connection.poll_new_outbound(cx)
                && let Some(opening) = waiting.take()
            {
                let opened = opened
                    .map(FuturesAsyncReadCompatExt::compat)
                    .map_err(io::Error::other);
                // Nobody waits for it any more: dropping the stream resets it.
                let _ = opening.send(opened);
                continue;
            }
            match connection.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(_)) | None) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

/// The guest's end: yields the streams that the host opens.
pub struct GuestMux<S> {
    connection: Connection<S>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> GuestMux<S> {
    /// Takes a stream behind its handshake.
    pub fn new(stream: S) -> Self {
        GuestMux {
            connection: connection(stream, yamux::Mode::Server),
        }
    }

    /// The next stream; `None` when the connection is gone. Must be polled for any stream to move.
    pub async fn next(&mut self) -> Option<MuxStream> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<MuxStream>> {
        self.connection
            .poll_next_inbound(cx)
            .map(|stream| stream.and_then(Result::ok).map(FuturesAsyncReadCompatExt::compat))
    }
}

/// Closes the writing half politely, ignoring a peer that is gone.
pub async fn finish(stream: &mut (impl AsyncWrite + Unpin)) {
    let _ = poll_fn(|cx| Pin::new(&mut *stream).poll_shutdown(cx)).await;
}
