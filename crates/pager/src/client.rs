//! A server's connection to one pager.
//!
//! ```text
//!  call ──► written, in order ──► answered by number ──► the caller
//!                                 events             ──► all who listen
//!  the stream ends, or the process does ──► Gone: every call fails, now and later
//!  no answer to a question of health    ──► Silent: calls still wait, and people are told
//! ```
//! Invariant: nobody waits for a pager that is gone. [`PagerClient::gone`] is the promise: it completes when the
//! kernel says that the process has closed its end, which it does however it ends.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{broadcast, oneshot, watch};

use crate::error::PagerError;
use crate::protocol::{
    Call, Event, Health, Hello, Line, MAX_LINE, MachineState, PROTOCOL, Refused, Registration, Reply,
    Request, Stats,
};

/// Events that may wait for one listener.
const EVENTS: usize = 4096;
/// How often a pager is asked how it feels.
const HEALTH_INTERVAL: Duration = Duration::from_secs(5);
/// How long it may take to say so.
const HEALTH_PATIENCE: Duration = Duration::from_secs(10);

/// Whether a pager can be relied on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// It answers.
    Well,
    /// It lives and does not answer: its machines may stand still.
    Silent,
    /// It has ended. The machines that it served hang at their next fault: they must be killed.
    Gone {
        /// How that showed.
        reason: String,
    },
}

#[derive(Debug, Default)]
struct Pending(HashMap<u64, oneshot::Sender<Result<Reply, Refused>>>);

#[derive(Debug)]
struct Shared {
    pending: Mutex<Option<Pending>>,
    next: AtomicU64,
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    condition: watch::Sender<Condition>,
    events: broadcast::Sender<Event>,
    /// The last that was heard of each machine.
    machines: Mutex<HashMap<String, MachineState>>,
}

impl Shared {
    fn pending(&self) -> MutexGuard<'_, Option<Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn machines(&self) -> MutexGuard<'_, HashMap<String, MachineState>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, reason: String) {
        // Dropping the senders tells all who wait.
        self.pending().take();
        self.condition.send_replace(Condition::Gone { reason });
    }

    fn gone(&self) -> PagerError {
        match &*self.condition.borrow() {
            Condition::Gone { reason } => PagerError::Gone(reason.clone()),
            _ => PagerError::Gone("it closed the connection".into()),
        }
    }
}

/// A connection to a pager. Dropping it ends nothing but the connection.
#[derive(Debug)]
pub struct PagerClient {
    shared: Arc<Shared>,
    hello: Hello,
    /// It said so at first, or was told to since.
    draining: AtomicBool,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Drop for PagerClient {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

impl PagerClient {
    /// Connects to the pager that listens at `socket`, on behalf of `release`.
    ///
    /// # Errors
    /// [`PagerError::Connect`] when nobody listens there; [`PagerError::Refused`] when it speaks another protocol and
    /// can only be told to [`drain`].
    pub async fn connect(socket: &Path, release: &str) -> Result<Self, PagerError> {
        let stream = connect(socket).await?;
        let (input, output) = stream.into_split();
        let shared = Arc::new(Shared {
            pending: Mutex::new(Some(Pending::default())),
            next: AtomicU64::new(1),
            writer: tokio::sync::Mutex::new(output),
            condition: watch::Sender::new(Condition::Well),
            events: broadcast::Sender::new(EVENTS),
            machines: Mutex::default(),
        });
        let reader = tokio::spawn(read(Arc::clone(&shared), input));
        let mut client = Self {
            shared,
            hello: Hello {
                protocol: PROTOCOL,
                release: String::new(),
                pid: 0,
                draining: false,
                machines: Vec::new(),
            },
            draining: AtomicBool::new(false),
            tasks: vec![reader],
        };
        let release = release.to_owned();
        let hello = Request::Hello {
            protocol: PROTOCOL,
            release,
        };
        let Reply::Hello(hello) = client.ask(hello).await? else {
            return Err(PagerError::Protocol("it does not say hello"));
        };
        for machine in &hello.machines {
            let mut known = client.shared.machines();
            // An event that came right after is newer.
            known
                .entry(machine.machine.clone())
                .or_insert(machine.state.clone());
        }
        client.draining = AtomicBool::new(hello.draining);
        client.hello = hello;
        client
            .tasks
            .push(tokio::spawn(watch_health(Arc::clone(&client.shared))));
        Ok(client)
    }

    /// Who it said it was.
    #[must_use]
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// Its process, as it says.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.hello.pid
    }

    /// Whether it takes no more machines.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Whether it can be relied on, now and later.
    #[must_use]
    pub fn condition(&self) -> watch::Receiver<Condition> {
        self.shared.condition.subscribe()
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(*self.shared.condition.borrow(), Condition::Gone { .. })
    }

    /// Completes when it has ended, with how that showed. Cancel safe.
    pub async fn gone(&self) -> String {
        let mut condition = self.shared.condition.subscribe();
        let gone = condition
            .wait_for(|condition| matches!(condition, Condition::Gone { .. }))
            .await;
        match gone.as_deref() {
            Ok(Condition::Gone { reason }) => reason.clone(),
            _ => "the connection was given up".into(),
        }
    }

    /// What happens to its machines, from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.shared.events.subscribe()
    }

    /// The last that was heard of a machine; `None` when it is not known there.
    #[must_use]
    pub fn machine(&self, machine: &str) -> Option<MachineState> {
        self.shared.machines().get(machine).cloned()
    }

    /// Machines that it knows, whatever became of them.
    #[must_use]
    pub fn known(&self) -> Vec<String> {
        self.shared.machines().keys().cloned().collect()
    }

    /// Machines that would miss it.
    #[must_use]
    pub fn machines(&self) -> Vec<String> {
        let needs = |(machine, state): (&String, &MachineState)| {
            (!matches!(state, MachineState::Graduated | MachineState::Gone)).then(|| machine.clone())
        };
        self.shared.machines().iter().filter_map(needs).collect()
    }

    /// Has it listen for a VMM. When this returns, the VMM can connect.
    ///
    /// # Errors
    /// [`PagerError::Refused`], [`PagerError::Gone`].
    pub async fn register(&self, registration: Registration) -> Result<(), PagerError> {
        let machine = registration.machine.clone();
        // Its first event may be faster than the answer.
        let fresh = {
            let mut machines = self.shared.machines();
            let fresh = !machines.contains_key(&machine);
            machines.entry(machine.clone()).or_insert(MachineState::Waiting);
            fresh
        };
        let outcome = self.ask(Request::Register(Box::new(registration))).await;
        if outcome.is_err() && fresh {
            self.shared.machines().remove(&machine);
        }
        outcome.map(|_| ())
    }

    /// Ends the service of a machine whose VMM is gone or will be killed.
    ///
    /// # Errors
    /// [`PagerError::Refused`] also when it is not known; [`PagerError::Gone`].
    pub async fn forget(&self, machine: &str) -> Result<(), PagerError> {
        let machine = machine.to_owned();
        self.ask(Request::Forget { machine }).await.map(|_| ())
    }

    /// Prepares the memory of a machine that stands still for being captured: afterwards, pages that its page tables
    /// do not show are the image's.
    ///
    /// # Errors
    /// [`PagerError::Refused`], [`PagerError::Gone`].
    pub async fn settle(&self, machine: &str) -> Result<(), PagerError> {
        let machine = machine.to_owned();
        self.ask(Request::Settle { machine }).await.map(|_| ())
    }

    /// Asks it to fill all of a machine's memory and let it go, without waiting for that: an event tells.
    ///
    /// # Errors
    /// [`PagerError::Refused`], [`PagerError::Gone`].
    pub async fn graduate(&self, machine: &str) -> Result<(), PagerError> {
        let machine = machine.to_owned();
        self.ask(Request::Graduate { machine }).await.map(|_| ())
    }

    /// Its numbers.
    ///
    /// # Errors
    /// [`PagerError::Gone`].
    pub async fn stats(&self) -> Result<Stats, PagerError> {
        match self.ask(Request::Stats).await? {
            Reply::Stats(stats) => Ok(*stats),
            _ => Err(PagerError::Protocol("it answers with something else")),
        }
    }

    /// How it feels.
    ///
    /// # Errors
    /// [`PagerError::Gone`].
    pub async fn health(&self) -> Result<Health, PagerError> {
        ask_health(&self.shared).await
    }

    /// Tells it to take no more machines and to end with the last one. One that has ended has done so.
    ///
    /// # Errors
    /// What it says instead of ending.
    pub async fn drain(&self) -> Result<(), PagerError> {
        match self.ask(Request::Drain).await {
            // It may end before it answers.
            Ok(_) | Err(PagerError::Gone(_)) => {
                self.draining.store(true, Ordering::SeqCst);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn ask(&self, request: Request) -> Result<Reply, PagerError> {
        ask(&self.shared, request).await
    }
}

async fn ask_health(shared: &Shared) -> Result<Health, PagerError> {
    match ask(shared, Request::Health).await? {
        Reply::Health(health) => Ok(health),
        _ => Err(PagerError::Protocol("it answers with something else")),
    }
}

/// A question that waits for its answer, until this is dropped: who gives up leaves nothing behind.
struct Waiting<'a>(&'a Shared, u64);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(pending) = &mut *self.0.pending() {
            pending.0.remove(&self.1);
        }
    }
}

async fn ask(shared: &Shared, request: Request) -> Result<Reply, PagerError> {
    let id = shared.next.fetch_add(1, Ordering::Relaxed);
    let (sender, answer) = oneshot::channel();
    match &mut *shared.pending() {
        Some(pending) => pending.0.insert(id, sender),
        None => return Err(shared.gone()),
    };
    let _waiting = Waiting(shared, id);
    let mut line =
        serde_json::to_string(&Call { id, request }).map_err(|_| PagerError::Protocol("not a question"))?;
    line.push('\n');
    if line.len() > MAX_LINE {
        return Err(PagerError::Protocol("the question is too long"));
    }
    // A failed write shows as the end of the stream, which the reader reports.
    let mut writer = shared.writer.lock().await;
    let _ = writer.write_all(line.as_bytes()).await;
    drop(writer);
    match answer.await {
        Ok(answer) => answer.map_err(PagerError::Refused),
        Err(_) => Err(shared.gone()),
    }
}

async fn read(shared: Arc<Shared>, input: OwnedReadHalf) {
    let reason = match read_lines(&shared, input).await {
        Ok(()) => "it closed the connection".to_owned(),
        Err(error) => error.to_string(),
    };
    shared.end(reason);
}

async fn read_lines(shared: &Shared, input: OwnedReadHalf) -> Result<(), PagerError> {
    let mut input = BufReader::new(input);
    loop {
        let mut line = String::new();
        let length = (&mut input).take(MAX_LINE as u64).read_line(&mut line).await;
        if length.map_err(PagerError::Io)? == 0 {
            return Ok(());
        }
        let line: Line =
            serde_json::from_str(&line).map_err(|_| PagerError::Protocol("it says what nobody knows"))?;
        let (id, answer) = match line {
            Line::Event { event } => {
                if event.state == MachineState::Gone {
                    shared.machines().remove(&event.machine);
                } else {
                    shared
                        .machines()
                        .insert(event.machine.clone(), event.state.clone());
                }
                // Nobody listens: fine.
                let _ = shared.events.send(event);
                continue;
            }
            Line::Ok { id, ok } => (id, Ok(ok)),
            Line::Refused { id, refused } => (id, Err(refused)),
        };
        let waiting = shared
            .pending()
            .as_mut()
            .and_then(|pending| pending.0.remove(&id));
        if let Some(waiting) = waiting {
            // Who asked may have stopped waiting.
            let _ = waiting.send(answer);
        }
    }
}

async fn watch_health(shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(HEALTH_INTERVAL).await;
        let answered = tokio::time::timeout(HEALTH_PATIENCE, ask_health(&shared)).await;
        let now = match answered {
            Ok(Ok(_)) => Condition::Well,
            Ok(Err(PagerError::Gone(_))) => return,
            Ok(Err(_)) | Err(_) => Condition::Silent,
        };
        shared.condition.send_if_modified(|condition| {
            let changes = *condition != now && !matches!(condition, Condition::Gone { .. });
            if changes {
                *condition = now;
            }
            changes
        });
    }
}

/// Connects, and makes sure that it is this user who listens.
async fn connect(socket: &Path) -> Result<UnixStream, PagerError> {
    let failed = |source| PagerError::Connect {
        socket: socket.to_owned(),
        source,
    };
    let stream = UnixStream::connect(socket).await.map_err(failed)?;
    let peer = stream.peer_cred().map_err(failed)?.uid();
    if peer != rustix::process::geteuid().as_raw() {
        return Err(PagerError::Protocol("somebody else listens in its place"));
    }
    Ok(stream)
}

/// Tells a pager of any release to take no more machines.
///
/// # Errors
/// [`PagerError::Connect`] when nobody listens there.
pub async fn drain(socket: &Path) -> Result<(), PagerError> {
    let mut stream = connect(socket).await?;
    let line = "{\"id\":1,\"do\":\"drain\"}\n";
    stream.write_all(line.as_bytes()).await.map_err(PagerError::Io)?;
    let mut answer = String::new();
    let mut input = BufReader::new(&mut stream).take(MAX_LINE as u64);
    input.read_line(&mut answer).await.map_err(PagerError::Io)?;
    Ok(())
}
