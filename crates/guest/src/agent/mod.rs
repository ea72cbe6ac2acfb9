//! Serves the host: one connection is a handshake and then requests, one stream each.
//!
//! ```text
//!            Configure                 Shutdown or the program's end
//! Waiting ──────────────► Configuring ─► Running ──────────────► Ending
//!                              └────────► Failed (stays up, so that the host can ask why)
//! ```
//!
//! Invariants: everything runs on one thread; a request never holds up another; what a session started does
//! not outlive it unless its command ended by itself.

mod copy_from;
mod copy_to;
mod events;
mod exec;
mod fd_stream;
mod lookup;
pub(crate) mod pty;
mod reaper;
mod session;
mod stat;
mod stream;

pub use events::EventLog;
pub use fd_stream::{FdStream, asynchronous};
pub use lookup::{DEFAULT_PATH, Lookup, find_program};
pub use reaper::{Ending, Reaper};

use std::{
    cell::{Cell, RefCell},
    future::Future,
    os::fd::BorrowedFd,
    pin::Pin,
    rc::Rc,
    sync::{Arc, Mutex},
    time::Duration,
};

use hypeman_guest_api::{
    AgentKey, GuestConfig, Reconfiguration, Refusal, RefusalCode, Reply, Request, frame,
    handshake::{self, BeaconCell, BeaconReader},
    mux::GuestMux,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::watch,
};

use stream::SharedStream;

/// What the agent asks of the machine that it runs in.
pub trait Machine {
    /// Become the instance: disks, network, identity, program. The text of an error goes to the host.
    fn configure<'a>(
        &'a self,
        agent: &'a Rc<Agent>,
        config: &'a GuestConfig,
    ) -> Pin<Box<dyn Future<Output = Result<(), String>> + 'a>>;

    /// Take over another identity.
    ///
    /// # Errors
    /// What failed, for people.
    fn reconfigure(&self, identity: &Reconfiguration) -> Result<(), String>;

    /// Set the wall clock.
    ///
    /// # Errors
    /// What failed, for people.
    fn set_time(&self, time_unix_nanos: i128) -> Result<(), String>;

    /// Hold everything but the agent still, until it is thawed or ended. On an error all of it goes on.
    ///
    /// # Errors
    /// What does not stand still, for people.
    fn freeze(&self) -> Pin<Box<dyn Future<Output = Result<(), String>> + '_>>;

    /// Let go on what stands still.
    fn thaw(&self);

    /// The control group of what the agent starts; `None` leaves it in the agent's.
    fn session_group(&self) -> Option<BorrowedFd<'_>>;

    /// End the program, then the machine. Returns at once.
    fn shutdown(&self, agent: &Rc<Agent>, grace: Duration);
}

/// How far the guest is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Waiting,
    Configuring,
    Running,
    Failed,
    Ending,
}

/// The last change of the key: connections made before it end, but for the one that brought it.
#[derive(Debug, Default)]
struct Succession {
    heir: u64,
    /// Number of the first connection that was made after it.
    below: u64,
}

impl Succession {
    fn ends(&self, connection: u64) -> bool {
        connection < self.below && connection != self.heir
    }
}

/// The state that all connections share.
pub struct Agent {
    machine: Box<dyn Machine>,
    /// Waits for children.
    pub reaper: Rc<Reaper>,
    /// What happened, for the host.
    pub events: EventLog,
    key: RefCell<Option<AgentKey>>,
    beacon: BeaconCell,
    /// Number of the next connection.
    connections: Cell<u64>,
    succession: watch::Sender<Succession>,
    phase: Cell<Phase>,
    serves: Cell<bool>,
    /// What is started now would stand still before it is what it is to be, and the agent would wait for it.
    frozen: watch::Sender<bool>,
    environment: RefCell<Vec<(String, String)>>,
}

impl Agent {
    /// An agent that waits for its configuration.
    pub fn new(machine: Box<dyn Machine>, reaper: Rc<Reaper>) -> Rc<Agent> {
        Rc::new(Agent {
            machine,
            reaper,
            events: EventLog::new(),
            key: RefCell::new(None),
            beacon: Arc::new(Mutex::new(None)),
            connections: Cell::new(0),
            succession: watch::Sender::default(),
            phase: Cell::new(Phase::Waiting),
            serves: Cell::new(false),
            frozen: watch::Sender::default(),
            environment: RefCell::new(Vec::new()),
        })
    }

    /// The machine is about to power off: nothing new is started.
    pub fn begin_ending(&self) {
        self.phase.set(Phase::Ending);
    }

    /// Whether the machine is about to power off.
    pub fn is_ending(&self) -> bool {
        self.phase.get() == Phase::Ending
    }

    /// Serves one byte stream until it fails: finds a host on it, then answers its requests.
    pub async fn serve<S: AsyncRead + AsyncWrite + Unpin + 'static>(self: &Rc<Self>, mut stream: S) {
        let key = self.key.borrow().clone();
        if handshake::guest(&mut stream, key.as_ref()).await.is_err() {
            return;
        }
        let mut mux = GuestMux::new(BeaconReader::new(stream, Arc::clone(&self.beacon)));
        let connection = self.connections.get();
        self.connections.set(connection + 1);
        let mut succession = self.succession.subscribe();
        loop {
            let stream = tokio::select! {
                stream = mux.next() => stream,
                // Another connection changed the key, and this one was made with the old one.
                _ = succession.wait_for(|succession| succession.ends(connection)) => None,
            };
            let Some(stream) = stream else { return };
            let agent = Rc::clone(self);
            tokio::task::spawn_local(
                async move { agent.answer(connection, SharedStream::new(stream)).await },
            );
        }
    }

    async fn answer(self: Rc<Self>, connection: u64, mut stream: SharedStream) {
        let request = match frame::read_frame(&mut stream).await {
            Ok(Some(frame)) => frame.header::<Request>(),
            _ => return,
        };
        let request = match request {
            Ok(request) => request,
            Err(error) => {
                let reply = Reply::Refused(refuse(RefusalCode::Unsupported, error.to_string()));
                let _ = frame::write_header(&mut stream, &reply).await;
                return hypeman_guest_api::mux::finish(&mut stream).await;
            }
        };
        let reply = match request {
            Request::Exec(request) => match self.admit() {
                Ok(()) => return exec::serve(&self, request, stream).await,
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::CopyTo(request) => match self.admit() {
                Ok(()) => return copy_to::serve(request, stream).await,
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::CopyFrom(request) => match self.admit() {
                Ok(()) => return copy_from::serve(request, stream).await,
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::Events => return self.events.serve(stream).await,
            Request::Stat { path, follow_links } => match self.admit() {
                Ok(()) => stat::describe(path, follow_links).await,
                Err(refusal) => Reply::Refused(refusal),
            },
            Request::Configure(config) => outcome(self.configure(&config).await),
            Request::Reconfigure(identity) => outcome(self.reconfigure(connection, &identity)),
            Request::SetTime { time_unix_nanos } => outcome(
                self.machine
                    .set_time(time_unix_nanos)
                    .map_err(|error| refuse(RefusalCode::Failed, error)),
            ),
            Request::Freeze => outcome(self.freeze().await),
            Request::Thaw => {
                self.thaw();
                Reply::Done
            }
            Request::Shutdown { grace_milliseconds } => {
                self.machine
                    .shutdown(&self, Duration::from_millis(grace_milliseconds));
                self.frozen.send_replace(false);
                Reply::Done
            }
            Request::Ping => Reply::Done,
        };
        if frame::write_header(&mut stream, &reply).await.is_ok() {
            hypeman_guest_api::mux::finish(&mut stream).await;
        }
    }

    async fn configure(self: &Rc<Self>, config: &GuestConfig) -> Result<(), Refusal> {
        if self.phase.get() != Phase::Waiting {
            return Err(refuse(
                RefusalCode::AlreadyConfigured,
                "the guest has its configuration",
            ));
        }
        self.phase.set(Phase::Configuring);
        self.set_key(&config.key);
        self.serves.set(!config.skip_agent);
        *self.environment.borrow_mut() = config.program.environment.clone();
        let outcome = self.machine.configure(self, config).await;
        if let Err(message) = outcome {
            self.phase.set(Phase::Failed);
            self.events.push(hypeman_guest_api::GuestEvent::SetupFailed {
                message: message.clone(),
            });
            return Err(refuse(RefusalCode::SetupFailed, message));
        }
        if self.phase.get() == Phase::Configuring {
            self.phase.set(Phase::Running);
            if self.serves.get() {
                self.events.push(hypeman_guest_api::GuestEvent::AgentReady);
            }
        }
        Ok(())
    }

    fn reconfigure(&self, connection: u64, identity: &Reconfiguration) -> Result<(), Refusal> {
        if self.phase.get() != Phase::Running {
            return Err(refuse(
                RefusalCode::NotConfigured,
                "the guest does not run an instance",
            ));
        }
        // Whatever comes of the rest: who knows the old key has no business here any more.
        self.set_key(&identity.key);
        self.succession.send_replace(Succession {
            heir: connection,
            below: self.connections.get(),
        });
        self.machine
            .reconfigure(identity)
            .map_err(|message| refuse(RefusalCode::SetupFailed, message))
    }

    async fn freeze(&self) -> Result<(), Refusal> {
        if self.phase.get() != Phase::Running {
            return Err(refuse(
                RefusalCode::NotConfigured,
                "the guest does not run an instance",
            ));
        }
        self.frozen.send_replace(true);
        let outcome = self.machine.freeze().await;
        if outcome.is_err() {
            self.frozen.send_replace(false);
        }
        outcome.map_err(|message| refuse(RefusalCode::Failed, message))
    }

    fn thaw(&self) {
        self.machine.thaw();
        self.frozen.send_replace(false);
    }

    /// Resolves when the workload may run.
    async fn moving(&self) {
        // The sender lives as long as the agent.
        let _ = self.frozen.subscribe().wait_for(|frozen| !frozen).await;
    }

    fn set_key(&self, key: &AgentKey) {
        *self.key.borrow_mut() = Some(key.clone());
        if let Ok(mut beacon) = self.beacon.lock() {
            *beacon = Some(handshake::beacon(key));
        }
    }

    fn admit(&self) -> Result<(), Refusal> {
        match self.phase.get() {
            Phase::Running if self.serves.get() => Ok(()),
            Phase::Running => Err(refuse(
                RefusalCode::AgentDisabled,
                "the instance was created without an agent",
            )),
            Phase::Waiting | Phase::Configuring => Err(refuse(
                RefusalCode::NotConfigured,
                "the guest waits for its configuration",
            )),
            Phase::Failed => Err(refuse(
                RefusalCode::SetupFailed,
                "the guest could not become the instance",
            )),
            Phase::Ending => Err(refuse(
                RefusalCode::ShuttingDown,
                "the machine is about to power off",
            )),
        }
    }
}

fn outcome(result: Result<(), Refusal>) -> Reply {
    match result {
        Ok(()) => Reply::Done,
        Err(refusal) => Reply::Refused(refusal),
    }
}

fn refuse(code: RefusalCode, message: impl Into<String>) -> Refusal {
    Refusal {
        code,
        message: message.into(),
    }
}

/// A refusal that says what the operating system said about a path.
fn refuse_io(path: &str, error: &std::io::Error) -> Refusal {
    use std::io::ErrorKind;
    let code = match error.kind() {
        ErrorKind::NotFound => RefusalCode::NotFound,
        ErrorKind::IsADirectory => RefusalCode::IsDirectory,
        ErrorKind::NotADirectory => RefusalCode::NotDirectory,
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => RefusalCode::NoSpace,
        _ => RefusalCode::Failed,
    };
    refuse(code, format!("{path}: {error}"))
}
