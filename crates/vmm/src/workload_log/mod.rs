//! The workload's log of a machine whose VMM does not write it: the guest connects to us, through its vsock device.
//!
//! ```text
//!  guest ── vsock ──► VMM ── <socket of the device>_<port> ──► task ──► app.log
//!    ◄────────────── written up to here ──────────────────────┘  └────► app.log.position
//! ```
//!
//! While no server listens, the guest keeps what is printed, and lets the program wait when that becomes too much. The
//! same when the host's disk is full: what cannot be written is not acknowledged, and tried again.
//!
//! Invariants:
//! - A byte is acknowledged only after it is in the file, and written once: see
//!   [`hypeman_guest_api::workload_log`] for how both ends find each other again.
//! - One connection counts, the newest that has said a proper HELLO. One more may be about to say it.
//! - One of us writes to a log: whoever comes later in this process takes over, and the server's lock keeps others out.
//! - Of a guest at most one block is held in memory.

mod record;
mod writer;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use hypeman_guest_api::workload_log::{HELLO, Hello, acknowledgement};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use self::record::FileId;
use self::writer::{Appended, Writer};
use crate::VmmError;
use crate::files::{io_error, remove_if_there};
use crate::socket::open_to_vmm;

/// Read at a time, in bytes.
const BLOCK: usize = 64 * 1024;

/// Pause before another attempt at what the host refused: room on a disk, one more descriptor.
const RETRY: Duration = Duration::from_millis(500);

/// Takes what one machine's workload prints, until it is dropped.
///
/// Listening again at the same paths goes on exactly where an earlier one stopped, in this process or in one that was
/// killed.
#[derive(Debug)]
pub struct WorkloadLog {
    writer: Arc<Mutex<Writer>>,
    socket: PathBuf,
    bound: FileId,
    task: AbortHandle,
    connected: watch::Receiver<bool>,
}

impl WorkloadLog {
    /// Listens at `socket`, to which the VMM connects for the guest, and appends to `log`. Needs a runtime. Takes over
    /// from an earlier one for the same log, which writes nothing from then on.
    ///
    /// # Errors
    /// The socket or the files can't be made.
    pub fn listen(socket: &Path, log: &Path) -> Result<WorkloadLog, VmmError> {
        let writer = take_over(log)?;
        remove_if_there(socket).map_err(io_error("cannot remove", socket))?;
        let listener = UnixListener::bind(socket).map_err(io_error("cannot listen on", socket))?;
        open_to_vmm(socket).map_err(io_error("cannot open to its VMM", socket))?;
        let metadata = std::fs::symlink_metadata(socket).map_err(io_error("cannot look at", socket))?;
        let (connection, connected) = watch::channel(false);
        let serving = serve(listener, Arc::clone(&writer), connection);
        Ok(WorkloadLog {
            writer,
            socket: socket.to_owned(),
            bound: FileId::of(&metadata),
            task: tokio::spawn(serving).abort_handle(),
            connected,
        })
    }

    /// Continues in a fresh file of the same name, after the caller renamed the old one. No byte is lost or written
    /// twice. The new file gets its name only after we have turned to it: a reader that sees the name knows that the
    /// old one is complete.
    ///
    /// # Errors
    /// The new file can't be made; the old one is continued then. Or it could not be named: then another call does.
    /// [`VmmError::Gone`] when another has taken over.
    pub async fn reopen(&self) -> Result<(), VmmError> {
        with(&self.writer, Writer::reopen)
            .await
            .unwrap_or_else(|error| Err(io_error("cannot continue the log of", &self.socket)(error)))
    }

    /// Resolves when no guest is connected and all that it sent is in the file. After the end of the VMM this is soon,
    /// unless the host's disk is full.
    pub async fn settled(&self) {
        // An error says that the task is gone, and any connection with it.
        let _ = self.connected.clone().wait_for(|connected| !connected).await;
    }
}

impl Drop for WorkloadLog {
    fn drop(&mut self) {
        self.task.abort();
        // Waits for an append that is under way: from here on the file is another's.
        lock(&self.writer).close();
        let ours =
            std::fs::symlink_metadata(&self.socket).is_ok_and(|metadata| FileId::of(&metadata) == self.bound);
        if ours {
            let _ = std::fs::remove_file(&self.socket);
        }
    }
}

/// Who writes to which log.
static WRITERS: Mutex<BTreeMap<PathBuf, Weak<Mutex<Writer>>>> = Mutex::new(BTreeMap::new());

/// The machine that an earlier one wrote for has ended, but somebody may hold on to its handle still.
fn take_over(log: &Path) -> Result<Arc<Mutex<Writer>>, VmmError> {
    let mut writers = WRITERS.lock().unwrap_or_else(PoisonError::into_inner);
    writers.retain(|_, writer| writer.strong_count() > 0);
    if let Some(earlier) = writers.get(log).and_then(Weak::upgrade) {
        lock(&earlier).close();
    }
    let writer = Arc::new(Mutex::new(Writer::open(log)?));
    writers.insert(log.to_owned(), Arc::downgrade(&writer));
    Ok(writer)
}

fn lock(writer: &Mutex<Writer>) -> MutexGuard<'_, Writer> {
    writer.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Works with the file where that may block.
async fn with<T: Send + 'static>(
    writer: &Arc<Mutex<Writer>>,
    work: impl FnOnce(&mut Writer) -> T + Send + 'static,
) -> io::Result<T> {
    let writer = Arc::clone(writer);
    Ok(tokio::task::spawn_blocking(move || work(&mut lock(&writer))).await?)
}

type Step<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Waits for a step that is there.
async fn of<T>(step: &mut Option<Step<T>>) -> T {
    match step {
        Some(step) => step.await,
        None => pending().await,
    }
}

async fn serve(listener: UnixListener, writer: Arc<Mutex<Writer>>, connected: watch::Sender<bool>) {
    // A connection that says nothing gives way to the next one, and hinders the one that counts in nothing.
    let mut greeting: Option<Step<Option<(UnixStream, Hello)>>> = None;
    let mut guest: Option<Step<io::Result<()>>> = None;
    loop {
        tokio::select! {
            stream = accept(&listener) => greeting = Some(Box::pin(greet(stream))),
            greeted = of(&mut greeting) => {
                greeting = None;
                if let Some((stream, hello)) = greeted {
                    guest = Some(Box::pin(take(stream, hello, Arc::clone(&writer))));
                }
            }
            ended = of(&mut guest) => {
                guest = None;
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection of a workload's log ended");
                }
            }
        }
        connected.send_replace(guest.is_some());
    }
}

async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                tracing::warn!(%error, "no connection for a workload's log");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// `None` for whoever does not speak the protocol.
async fn greet(mut stream: UnixStream) -> Option<(UnixStream, Hello)> {
    let mut hello = [0; HELLO];
    stream.read_exact(&mut hello).await.ok()?;
    Some((stream, Hello::decode(&hello)?))
}

/// Writes what a guest sends until the connection ends or counts no more.
async fn take(mut stream: UnixStream, hello: Hello, writer: Arc<Mutex<Writer>>) -> io::Result<()> {
    let (turn, answer) = with(&writer, move |writer| writer.begin(&hello)).await??;
    stream.write_all(&answer).await?;
    loop {
        stream.readable().await?;
        // Only now: most workloads are silent most of the time.
        let mut bytes = Vec::with_capacity(BLOCK);
        match stream.try_read_buf(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
            Err(error) => return Err(error),
        }
        let Some(offset) = write(turn, bytes, &writer).await? else {
            return Ok(());
        };
        stream.write_all(&acknowledgement(offset)).await?;
    }
}

/// Writes all of it, however long the host takes to have room. `None` when the connection counts no more.
async fn write(turn: u64, mut bytes: Vec<u8>, writer: &Arc<Mutex<Writer>>) -> io::Result<Option<u64>> {
    let mut told = false;
    loop {
        let (appended, rest) = with(writer, move |writer| (writer.append(turn, &bytes), bytes)).await?;
        bytes = rest;
        match appended {
            Ok(Appended::Written { count, offset }) if count == bytes.len() => return Ok(Some(offset)),
            Ok(Appended::Written { count, .. }) => drop(bytes.drain(..count)),
            Ok(Appended::Superseded) => return Ok(None),
            Err(error) => {
                if !std::mem::replace(&mut told, true) {
                    let log = lock(writer).path().to_owned();
                    tracing::warn!(log = %log.display(), %error, "a workload's log cannot be written: its guest waits");
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}
