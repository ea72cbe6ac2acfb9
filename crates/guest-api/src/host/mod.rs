//! The server's end of the channel.
//!
//! One [`GuestClient`] is one connection. A task drives it; every request is a stream of its own, so a stalled
//! reader of one never holds up another. All waits for the guest have a deadline, except those that are
//! legitimately endless: the output of a command and the next event.

mod clock;
mod copy;
mod events;
mod exec;

pub use clock::CLOCK_TOLERANCE;
pub use copy::{CopyFromSession, CopyItem, CopyToSession};
pub use events::GuestEvents;
pub use exec::{ExecInput, ExecOutput, ExecReader, ExecSession};

use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Notify, Semaphore, mpsc, oneshot, watch},
};

use self::clock::Attempts;
use crate::{
    AgentKey, ChannelError, CopyFrom, CopyTo, ExecRequest, GuestConfig, PathInfo, Reconfiguration,
    RefusalCode, Reply, Request, frame,
    handshake::{self, HandshakeError},
    mux::{self, MuxStream, Opening},
};

/// How long the guest may take to accept or answer a request that does not run anything.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(30);

/// How long the guest may take to hold its workload still, or to say that it cannot.
pub const FREEZE_DEADLINE: Duration = Duration::from_secs(5);

/// How long a transfer may stand still.
pub const STALL_DEADLINE: Duration = Duration::from_secs(60);

/// Pause between two preambles while the guest does not answer.
const KNOCK: Duration = Duration::from_millis(100);

/// A handle on one connection to a guest. Cheap to clone; the connection ends with the last handle, session and
/// event reader.
#[derive(Clone)]
pub struct GuestClient {
    connection: Arc<Connection>,
    configured: bool,
}

struct Connection {
    openings: mpsc::Sender<Opening>,
    closed: watch::Receiver<bool>,
    close: Arc<Notify>,
    /// Its end comes of a capture of the guest's state.
    captured: AtomicBool,
    /// One permit a stream: the guest refuses a connection with too many, so we wait instead.
    streams: Arc<Semaphore>,
}

/// A stream that keeps its connection alive.
struct Channel {
    stream: MuxStream,
    _permit: tokio::sync::OwnedSemaphorePermit,
    connection: Arc<Connection>,
}

async fn within<T, E: Into<ChannelError>>(
    deadline: Duration,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, ChannelError> {
    match tokio::time::timeout(deadline, work).await {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err(ChannelError::Deadline),
    }
}

impl Connection {
    /// What a failure is, for whoever used the connection.
    fn told(&self, failure: ChannelError) -> ChannelError {
        match failure {
            ChannelError::Closed if self.captured.load(Ordering::Acquire) => ChannelError::Captured,
            other => other,
        }
    }

    async fn open(self: &Arc<Self>, request: &Request) -> Result<(Channel, Reply), ChannelError> {
        let permit = Arc::clone(&self.streams)
            .acquire_owned()
            .await
            .map_err(|_| ChannelError::Closed)?;
        let (sender, receiver) = oneshot::channel();
        self.openings
            .send(sender)
            .await
            .map_err(|_| ChannelError::Closed)?;
        let mut stream = receiver.await.map_err(|_| ChannelError::Closed)??;
        frame::write_header(&mut stream, request).await?;
        let reply = frame::read_header(&mut stream).await?;
        if let Reply::Refused(refusal) = reply {
            return Err(ChannelError::Refused(refusal));
        }
        Ok((
            Channel {
                stream,
                _permit: permit,
                connection: Arc::clone(self),
            },
            reply,
        ))
    }

    async fn ask(self: &Arc<Self>, request: &Request, deadline: Duration) -> Result<Reply, ChannelError> {
        within(deadline, async {
            let (mut channel, reply) = self.open(request).await?;
            mux::finish(&mut channel.stream).await;
            Ok::<_, ChannelError>(reply)
        })
        .await
    }
}

fn done(reply: Reply) -> Result<(), ChannelError> {
    match reply {
        Reply::Done => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn unexpected(reply: &Reply) -> ChannelError {
    let kind = match reply {
        Reply::Done => "done",
        Reply::Path(_) => "path",
        Reply::Written { .. } => "written",
        Reply::Refused(_) => "refused",
    };
    ChannelError::Protocol(format!("unexpected reply `{kind}`"))
}

impl GuestClient {
    /// Takes a connected byte stream (the unix socket of the agent's port), finds the guest on it, proves that we
    /// know `key` and begins to follow its events. `key: None` is the first contact with an unconfigured guest.
    ///
    /// Waits for a guest that still boots, at most `deadline`. Must be called within a Tokio runtime.
    ///
    /// # Errors
    /// [`ChannelError::KeyRequired`] and [`ChannelError::NotAuthentic`] when the guest belongs to someone else,
    /// [`ChannelError::Deadline`], [`ChannelError::Closed`].
    pub async fn connect<S>(
        mut stream: S,
        key: Option<&AgentKey>,
        deadline: Duration,
    ) -> Result<(GuestClient, GuestEvents), ChannelError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        within(deadline, async {
            let agreement = handshake::host(&mut stream, key, KNOCK)
                .await
                .map_err(|error| match error {
                    HandshakeError::Io(error) => ChannelError::from(error),
                    HandshakeError::KeyRequired => ChannelError::KeyRequired,
                    HandshakeError::NotAuthentic => ChannelError::NotAuthentic,
                })?;
            let (openings, requests) = mpsc::channel(16);
            let (closing, closed) = watch::channel(false);
            let close = Arc::new(Notify::new());
            let asked = Arc::clone(&close);
            tokio::spawn(async move {
                tokio::select! {
                    () = mux::drive_host(stream, requests) => {}
                    () = asked.notified() => {}
                }
                closing.send_replace(true);
            });
            // Some room is left for streams that are closed here and not yet forgotten by the guest.
            let streams = Arc::new(Semaphore::new(mux::MAXIMUM_STREAMS - 16));
            let connection = Arc::new(Connection {
                openings,
                closed,
                close,
                captured: AtomicBool::new(false),
                streams,
            });
            let (channel, reply) = connection.open(&Request::Events).await?;
            done(reply)?;
            let client = GuestClient {
                connection,
                configured: agreement.configured,
            };
            Ok::<_, ChannelError>((client, GuestEvents::new(channel)))
        })
        .await
    }

    /// Whether the guest had its configuration when this connection was made.
    pub fn is_configured(&self) -> bool {
        self.configured
    }

    /// Tells the guest who it is. Answered when its program runs; the key is in force from then on, also for
    /// the next connections.
    ///
    /// # Errors
    /// The guest's reason ([`crate::RefusalCode::SetupFailed`] with what failed), or the channel's.
    pub async fn configure(&self, config: &GuestConfig, deadline: Duration) -> Result<(), ChannelError> {
        done(
            self.connection
                .ask(&Request::Configure(Box::new(config.clone())), deadline)
                .await?,
        )
    }

    /// Starts a command. The session ends with its handles: the guest then kills what it started.
    ///
    /// # Errors
    /// [`crate::RefusalCode::CommandNotFound`] and [`crate::RefusalCode::CommandNotExecutable`] by the guest.
    pub async fn exec(&self, request: ExecRequest) -> Result<ExecSession, ChannelError> {
        within(REQUEST_DEADLINE, async {
            let (channel, reply) = self.connection.open(&Request::Exec(request)).await?;
            done(reply)?;
            Ok::<_, ChannelError>(ExecSession::new(channel))
        })
        .await
    }

    /// Describes a path in the container. An absent one is not an error.
    ///
    /// # Errors
    /// Those of the channel.
    pub async fn stat(&self, path: &str, follow_links: bool) -> Result<PathInfo, ChannelError> {
        let request = Request::Stat {
            path: path.to_owned(),
            follow_links,
        };
        match self.connection.ask(&request, REQUEST_DEADLINE).await? {
            Reply::Path(info) => Ok(info),
            other => Err(unexpected(&other)),
        }
    }

    /// Begins to write one file, directory or link. Nothing is visible in the container before
    /// [`CopyToSession::finish`]; a session that is dropped leaves nothing behind.
    ///
    /// # Errors
    /// The guest's reason, such as [`crate::RefusalCode::IsDirectory`].
    pub async fn copy_to(&self, request: CopyTo) -> Result<CopyToSession, ChannelError> {
        within(REQUEST_DEADLINE, async {
            let (channel, reply) = self.connection.open(&Request::CopyTo(request)).await?;
            done(reply)?;
            Ok::<_, ChannelError>(CopyToSession::new(channel))
        })
        .await
    }

    /// Begins to read a file or a tree.
    ///
    /// # Errors
    /// [`crate::RefusalCode::NotFound`] and other reasons of the guest.
    pub async fn copy_from(&self, request: CopyFrom) -> Result<CopyFromSession, ChannelError> {
        within(REQUEST_DEADLINE, async {
            let (channel, reply) = self.connection.open(&Request::CopyFrom(request)).await?;
            done(reply)?;
            Ok::<_, ChannelError>(CopyFromSession::new(channel))
        })
        .await
    }

    /// Asks the guest to end: the program's stop signal now, `SIGKILL` after `grace`, then sync and power off.
    /// Returns when the guest has accepted; the end shows as [`crate::GuestEvent::Exited`], [`Self::closed`]
    /// and the end of the VMM.
    ///
    /// # Errors
    /// Those of the channel.
    pub async fn shutdown(&self, grace: Duration) -> Result<(), ChannelError> {
        let grace_milliseconds = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
        done(
            self.connection
                .ask(&Request::Shutdown { grace_milliseconds }, REQUEST_DEADLINE)
                .await?,
        )
    }

    /// Sets the guest's wall clock.
    ///
    /// # Errors
    /// Those of the channel, or the guest's.
    pub async fn set_time(&self, time_unix_nanos: i128) -> Result<(), ChannelError> {
        done(
            self.connection
                .ask(&Request::SetTime { time_unix_nanos }, REQUEST_DEADLINE)
                .await?,
        )
    }

    /// Sets the guest's wall clock to that of this host, again while that may bring it notably closer, at best to within
    /// [`CLOCK_TOLERANCE`], and returns by how much they can differ.
    ///
    /// # Errors
    /// Those of the channel, or the guest's.
    pub async fn synchronise_clock(&self) -> Result<Duration, ChannelError> {
        let mut attempts = Attempts::default();
        loop {
            let begun = Instant::now();
            let now = SystemTime::now()
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default();
            self.set_time(now.as_nanos() as i128).await?;
            // It was set at some moment between question and answer.
            let bound = begun.elapsed();
            if !attempts.is_another_worth_it(bound) {
                return Ok(bound);
            }
        }
    }

    /// Gives a forked guest its own identity. Answered when all of it is in force: clock, network, a generator of
    /// random numbers with new keys, names. Whoever is connected with the old key is disconnected, and refused
    /// from then on. The clock is as late as the message was under way: see [`Self::synchronise_clock`].
    ///
    /// # Errors
    /// The guest's reason when any part of it failed: the fork must then not be used.
    pub async fn reconfigure(&self, identity: &Reconfiguration) -> Result<(), ChannelError> {
        let request = Request::Reconfigure(Box::new(identity.clone()));
        done(self.connection.ask(&request, REQUEST_DEADLINE).await?)
    }

    /// Holds the workload still, so that whatever is captured now does nothing before it was told the time and who it
    /// is. Returns when nothing but the agent runs.
    ///
    /// # Errors
    /// The guest's reason, such as a process that waits for a disk that does not answer: the workload then goes on.
    pub async fn freeze(&self) -> Result<(), ChannelError> {
        done(self.connection.ask(&Request::Freeze, FREEZE_DEADLINE).await?)
    }

    /// Lets the workload go on, if it stands still.
    ///
    /// # Errors
    /// Those of the channel. A guest too old to know how never stands still.
    pub async fn thaw(&self) -> Result<(), ChannelError> {
        match self.connection.ask(&Request::Thaw, REQUEST_DEADLINE).await {
            Err(ChannelError::Refused(refusal)) if refusal.code == RefusalCode::Unsupported => Ok(()),
            reply => done(reply?),
        }
    }

    /// Asks for a sign of life.
    ///
    /// # Errors
    /// [`ChannelError::Deadline`] when none came in time, or those of the channel.
    pub async fn ping(&self, deadline: Duration) -> Result<(), ChannelError> {
        done(self.connection.ask(&Request::Ping, deadline).await?)
    }

    /// Notes that the connection has ended, or is about to, because the state of the guest's machine was written: its
    /// sessions end with [`ChannelError::Captured`].
    pub fn note_captured(&self) {
        self.connection.captured.store(true, Ordering::Release);
    }

    /// Ends the connection now, under all sessions that still use it.
    pub fn close(&self) {
        self.connection.close.notify_one();
    }

    /// Resolves when the connection is gone.
    pub async fn closed(&self) {
        let mut closed = self.connection.closed.clone();
        // An error means that the driver is gone without a word, which is the same.
        let _ = closed.wait_for(|closed| *closed).await;
    }
}
