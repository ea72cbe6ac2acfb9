//! A client of QEMU's machine protocol: JSON lines over a unix socket.
//!
//! ```text
//! execute ──► outgoing queue ──► writer task ──► socket ──► QEMU
//!    ▲                                                        │
//!    └── pending[id] ◄── reader task ◄── one bounded line ◄───┘
//!                            └──► events
//! ```
//!
//! Invariants:
//! - Every wait has a deadline; a VMM that hangs costs its caller that long and nobody else anything.
//! - A caller that gives up leaves the connection whole: lines are written entirely or the connection ends.
//! - The peer is not trusted: a line has a limit, an answer to a question not asked is dropped.

mod line;
mod wire;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;

use self::wire::Wire;

/// Commands that may wait to be written; a VMM that reads nothing fills this and no more.
const OUTGOING_LIMIT: usize = 32;

/// Why a command has no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QmpError {
    #[error("no answer in time")]
    Timeout,
    #[error("the connection ended: {0}")]
    Closed(String),
    #[error("{0}")]
    Refused(String),
    #[error("cannot connect: {0}")]
    Connect(std::io::Error),
}

/// Something that happened in the VMM.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct QmpEvent {
    #[serde(rename = "event")]
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) data: Value,
}

/// Takes events in order, on the reader's task: it must not wait.
pub(crate) type EventSink = Arc<dyn Fn(QmpEvent) + Send + Sync>;

type Answer = Result<Value, String>;

/// A line to be written, and a descriptor that goes with it.
struct Outgoing {
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

#[derive(Default)]
struct Pending {
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    /// Set once, when nothing will be answered any more.
    closed: Option<String>,
}

/// One connection, past its greeting and ready for commands.
pub(crate) struct QmpClient {
    outgoing: mpsc::Sender<Outgoing>,
    pending: Arc<Mutex<Pending>>,
    next_id: AtomicU64,
    drained: watch::Receiver<()>,
    tasks: [AbortHandle; 2],
}

impl std::fmt::Debug for QmpClient {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("QmpClient")
            .field("closed", &lock(&self.pending).closed)
            .finish_non_exhaustive()
    }
}

impl Drop for QmpClient {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl QmpClient {
    /// Connects to the socket and negotiates. `deadline` bounds all of it.
    pub(crate) async fn connect(
        path: &Path,
        deadline: Duration,
        events: EventSink,
    ) -> Result<Self, QmpError> {
        let work = async {
            let stream = UnixStream::connect(path).await.map_err(QmpError::Connect)?;
            let (read, write) = stream.into_split();
            Self::negotiate(read, write, events).await
        };
        tokio::time::timeout(deadline, work)
            .await
            .unwrap_or(Err(QmpError::Timeout))
    }

    async fn negotiate<R, W>(read: R, mut write: W, events: EventSink) -> Result<Self, QmpError>
    where
        R: AsyncRead + Unpin + Send + 'static,
        W: Wire,
    {
        let mut reader = BufReader::new(read);
        let greeting = line::read(&mut reader)
            .await
            .map_err(|error| QmpError::Closed(error.to_string()))?;
        if !matches!(serde_json::from_slice::<Value>(&greeting), Ok(Value::Object(map)) if map.contains_key("QMP"))
        {
            return Err(QmpError::Closed(
                "the peer does not speak the machine protocol".into(),
            ));
        }
        let pending = Arc::new(Mutex::new(Pending::default()));
        let (outgoing, mut queue) = mpsc::channel::<Outgoing>(OUTGOING_LIMIT);

        let write_pending = Arc::clone(&pending);
        let writer = tokio::spawn(async move {
            while let Some(Outgoing { bytes, descriptor }) = queue.recv().await {
                if let Err(error) = write.send(&bytes, descriptor).await {
                    close(&write_pending, error.to_string());
                    return;
                }
            }
        });
        let read_pending = Arc::clone(&pending);
        let stop_writing = writer.abort_handle();
        let (reading, drained) = watch::channel(());
        let reader = tokio::spawn(async move {
            let _reading = reading;
            let reason = loop {
                match line::read(&mut reader).await {
                    Ok(bytes) => dispatch(&bytes, &read_pending, &events),
                    Err(error) => break error.to_string(),
                }
            };
            close(&read_pending, reason);
            // Both halves must go, or the peer would still see an open connection.
            stop_writing.abort();
        });
        let client = Self {
            outgoing,
            pending,
            next_id: AtomicU64::new(1),
            drained,
            tasks: [writer.abort_handle(), reader.abort_handle()],
        };
        client.ask("qmp_capabilities", Value::Null, None).await?;
        Ok(client)
    }

    /// True when no command can be answered any more.
    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.pending).closed.is_some()
    }

    /// Resolves when everything that the peer ever sent has been taken in and its end is seen.
    pub(crate) fn drained(&self) -> impl Future<Output = ()> + Send + use<> {
        let mut drained = self.drained.clone();
        async move { while drained.changed().await.is_ok() {} }
    }

    /// Sends one command and waits for its answer, at most `deadline`.
    pub(crate) async fn execute(
        &self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        tokio::time::timeout(deadline, self.ask(command, arguments, None))
            .await
            .unwrap_or(Err(QmpError::Timeout))
    }

    /// The same with a descriptor for the VMM.
    pub(crate) async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        descriptor: OwnedFd,
        deadline: Duration,
    ) -> Result<Value, QmpError> {
        tokio::time::timeout(deadline, self.ask(command, arguments, Some(descriptor)))
            .await
            .unwrap_or(Err(QmpError::Timeout))
    }

    async fn ask(
        &self,
        command: &str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Value, QmpError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let mut message = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            message["arguments"] = arguments;
        }
        let mut bytes = message.to_string().into_bytes();
        bytes.push(b'\n');
        let (sender, receiver) = oneshot::channel();
        // The queue before the table: a full queue then leaves nothing behind in the table.
        let slot = self.outgoing.reserve().await.map_err(|_| self.closed_error())?;
        {
            let mut pending = lock(&self.pending);
            if let Some(reason) = &pending.closed {
                return Err(QmpError::Closed(reason.clone()));
            }
            pending.answers.insert(id, sender);
        }
        let forget = Forget {
            pending: &self.pending,
            id,
        };
        slot.send(Outgoing { bytes, descriptor });
        let answer = receiver.await;
        drop(forget);
        match answer {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(message)) => Err(QmpError::Refused(message)),
            Err(_) => Err(self.closed_error()),
        }
    }

    fn closed_error(&self) -> QmpError {
        QmpError::Closed(
            lock(&self.pending)
                .closed
                .clone()
                .unwrap_or_else(|| "the client was closed".into()),
        )
    }
}

/// Takes a question out of the table when its asker has gone.
struct Forget<'a> {
    pending: &'a Mutex<Pending>,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        lock(self.pending).answers.remove(&self.id);
    }
}

fn lock(pending: &Mutex<Pending>) -> MutexGuard<'_, Pending> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

fn close(pending: &Mutex<Pending>, reason: String) {
    let mut pending = lock(pending);
    pending.closed.get_or_insert(reason);
    pending.answers.clear();
}

/// What a line from QEMU can be.
#[derive(Deserialize)]
struct Incoming {
    id: Option<u64>,
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<IncomingError>,
}

#[derive(Deserialize)]
struct IncomingError {
    #[serde(default)]
    desc: String,
}

fn dispatch(bytes: &[u8], pending: &Mutex<Pending>, events: &EventSink) {
    if let Ok(event) = serde_json::from_slice::<QmpEvent>(bytes) {
        events(event);
        return;
    }
    let Ok(incoming) = serde_json::from_slice::<Incoming>(bytes) else {
        return;
    };
    let Some(sender) = incoming.id.and_then(|id| lock(pending).answers.remove(&id)) else {
        return;
    };
    let answer = match (incoming.error, incoming.value) {
        (Some(error), _) => Err(error.desc),
        (None, Some(value)) => Ok(value),
        (None, None) => Err("an answer without a value".into()),
    };
    // The asker may have given up in between.
    let _ = sender.send(answer);
}

#[cfg(test)]
mod tests;
