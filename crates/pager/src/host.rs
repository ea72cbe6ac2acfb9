//! The pagers of one data directory, as a server sees them: one that takes machines, and older ones that end.
//!
//! ```text
//!  <directory>/pager-<release>-<random>.sock
//!
//!  adopt   connect to all that listen; the newest of our release takes machines, others are told to drain;
//!          sockets where nobody listens are removed
//!  ensure  what takes machines, started when there is none
//! ```
//! A pager is started with its listening socket as standard input: whoever connects waits in the kernel until it
//! answers, and sees the end of the connection when it ends before. Nothing polls.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::broadcast;

use crate::client::{PagerClient, drain};
use crate::error::PagerError;
use crate::protocol::{MachineState, Registration};

/// Events that may wait for one listener.
const EVENTS: usize = 4096;
/// A pager that was started may end at once, or be met while it ends.
const ATTEMPTS: u32 = 3;
/// How long one that was started may take to say who it is. It takes milliseconds on an idle machine.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// How pagers are started.
#[derive(Debug, Clone)]
pub struct PagerOptions {
    /// The `hypeman` program.
    pub program: PathBuf,
    /// Where sockets lie; private to the server's user, and short enough for a socket address.
    pub directory: PathBuf,
    /// Receives what a pager says.
    pub log: PathBuf,
    /// The release of the server: pagers of others are told to drain.
    pub release: String,
    /// Bytes of images that a pager keeps in RAM.
    pub cache_bytes: u64,
    /// How long a machine is served before all of its memory is filled.
    pub graduate_after: Option<Duration>,
}

/// Something that a server must know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PagerEvent {
    /// Something became of a machine.
    Machine {
        /// Its name.
        machine: String,
        /// What became of it.
        state: MachineState,
    },
    /// A pager has ended. These machines hang at their next fault: kill them.
    Gone {
        /// Machines that it served.
        machines: Vec<String>,
        /// How that showed.
        reason: String,
    },
}

/// The pagers of one data directory.
#[derive(Debug)]
pub struct Pager {
    options: PagerOptions,
    /// The one that takes machines. Locked while one is started, so that there is one.
    current: tokio::sync::Mutex<Option<Arc<PagerClient>>>,
    /// All that live.
    all: Arc<Mutex<Vec<Arc<PagerClient>>>>,
    events: broadcast::Sender<PagerEvent>,
}

/// A machine that a pager serves.
#[derive(Debug, Clone)]
pub struct Served {
    /// Its name.
    pub machine: String,
    /// Where its VMM connects.
    pub socket: PathBuf,
    client: Arc<PagerClient>,
}

impl Served {
    /// The pager that serves it.
    #[must_use]
    pub fn pager(&self) -> &Arc<PagerClient> {
        &self.client
    }

    /// Completes with the reason when the machine cannot be served any more and must be killed; never for one that
    /// ends well. Cancel safe.
    pub async fn failed(&self) -> String {
        let mut events = self.client.events();
        loop {
            match self.client.machine(&self.machine) {
                Some(MachineState::Failed { reason, .. }) => return reason,
                Some(MachineState::Graduated) | None => return std::future::pending().await,
                Some(MachineState::Waiting | MachineState::Serving | MachineState::Gone) => {}
            }
            tokio::select! {
                reason = self.client.gone() => return format!("the pager is gone: {reason}"),
                // One that was missed shows in the state.
                _ = events.recv() => {}
            }
        }
    }
}

impl Pager {
    /// No pager is started or looked for yet.
    #[must_use]
    pub fn new(options: PagerOptions) -> Self {
        Self {
            options,
            current: tokio::sync::Mutex::new(None),
            all: Arc::default(),
            events: broadcast::Sender::new(EVENTS),
        }
    }

    /// What a server must know, from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<PagerEvent> {
        self.events.subscribe()
    }

    fn all(&self) -> MutexGuard<'_, Vec<Arc<PagerClient>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All that live: the one that takes machines, and those that end in their time.
    #[must_use]
    pub fn clients(&self) -> Vec<Arc<PagerClient>> {
        self.all().clone()
    }

    /// What became of a machine, as far as any living pager knows.
    #[must_use]
    pub fn machine(&self, machine: &str) -> Option<MachineState> {
        self.all().iter().find_map(|client| client.machine(machine))
    }

    /// The pager that serves a machine.
    #[must_use]
    pub fn pager_of(&self, machine: &str) -> Option<Arc<PagerClient>> {
        self.all()
            .iter()
            .find(|client| client.machine(machine).is_some())
            .cloned()
    }

    /// Has all pagers forget the machines that `wanted` does not name: those of a server that died before it noted them.
    pub async fn forget_others(&self, wanted: impl Fn(&str) -> bool) {
        let clients = self.all().clone();
        for client in clients {
            for machine in client.known().into_iter().filter(|machine| !wanted(machine)) {
                match client.forget(&machine).await {
                    // It went by itself meanwhile.
                    Ok(()) | Err(PagerError::Refused(_) | PagerError::Gone(_)) => {}
                    Err(error) => tracing::warn!(machine, %error, "a pager does not forget a machine"),
                }
            }
        }
    }

    /// Connects to the pagers that earlier servers left, before any is started. Says what became of their machines
    /// from then on.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub async fn adopt(&self) -> Result<(), PagerError> {
        let mut current = self.current.lock().await;
        for socket in sockets(&self.options.directory).map_err(PagerError::Io)? {
            match PagerClient::connect(&socket, &self.options.release).await {
                Ok(client) => {
                    let client = self.keep(client);
                    let ours = client.hello().release == self.options.release && !client.hello().draining;
                    if ours && current.is_none() {
                        *current = Some(client);
                    } else if let Err(error) = client.drain().await {
                        tracing::warn!(%error, "an older pager does not drain");
                    }
                }
                // Another protocol: it can still be told to end in its time.
                Err(PagerError::Refused(refused)) => {
                    tracing::info!(%refused, "an older pager is told to drain");
                    if let Err(error) = drain(&socket).await {
                        tracing::warn!(%error, "an older pager does not drain");
                    }
                }
                // It ended before, or is ending just now.
                Err(PagerError::Connect { source, .. })
                    if source.kind() == io::ErrorKind::ConnectionRefused =>
                {
                    let _ = std::fs::remove_file(&socket);
                }
                Err(PagerError::Gone(_)) => {
                    let _ = std::fs::remove_file(&socket);
                }
                Err(error) => {
                    tracing::warn!(%error, socket = %socket.display(), "a pager cannot be taken back")
                }
            }
        }
        Ok(())
    }

    /// The pager that takes machines; started when there is none.
    ///
    /// # Errors
    /// [`PagerError::Start`], and what the pager says.
    pub async fn ensure(&self) -> Result<Arc<PagerClient>, PagerError> {
        let mut current = self.current.lock().await;
        if let Some(client) = current.as_ref().filter(|client| !client.is_gone()) {
            return Ok(Arc::clone(client));
        }
        let client = self.keep(self.start().await?);
        *current = Some(Arc::clone(&client));
        Ok(client)
    }

    /// Has a machine served. When this returns, its VMM can connect to the socket.
    ///
    /// # Errors
    /// Those of [`Self::ensure`], and [`PagerError::Refused`].
    pub async fn register(&self, registration: Registration) -> Result<Served, PagerError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let client = self.ensure().await?;
            match client.register(registration.clone()).await {
                // It was about to end; there is another one now.
                Err(PagerError::Gone(_)) if attempt < ATTEMPTS => {}
                Err(error) => return Err(error),
                Ok(()) => {
                    return Ok(Served {
                        machine: registration.machine,
                        socket: registration.socket,
                        client,
                    });
                }
            }
        }
    }

    /// Follows a pager for as long as it lives.
    fn keep(&self, client: PagerClient) -> Arc<PagerClient> {
        let client = Arc::new(client);
        self.all().push(Arc::clone(&client));
        let (all, sender) = (Arc::clone(&self.all), self.events.clone());
        let (mut events, followed) = (client.events(), Arc::clone(&client));
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    biased;
                    event = events.recv() => {
                        if let Ok(event) = event {
                            let _ = sender.send(PagerEvent::Machine { machine: event.machine, state: event.state });
                        } else if followed.is_gone() {
                            break;
                        }
                    }
                    _ = followed.gone() => break,
                }
            }
            let (machines, reason) = (followed.machines(), followed.gone().await);
            all.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|client| !Arc::ptr_eq(client, &followed));
            match machines.is_empty() {
                true => tracing::debug!(reason, "a pager has ended"),
                false => tracing::error!(reason, ?machines, "a pager is gone, and machines depended on it"),
            }
            let _ = sender.send(PagerEvent::Gone { machines, reason });
        });
        client
    }

    async fn start(&self) -> Result<PagerClient, PagerError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let socket = self.spawn().map_err(PagerError::Start)?;
            let connected = PagerClient::connect(&socket, &self.options.release);
            let reason = match tokio::time::timeout(START_DEADLINE, connected).await {
                Ok(Err(PagerError::Gone(reason))) => reason,
                Ok(Err(PagerError::Connect { source, .. })) => source.to_string(),
                Ok(other) => return other,
                // Should it ever come to itself, it ends when nobody has asked for it.
                Err(_) => {
                    let _ = std::fs::remove_file(&socket);
                    return Err(PagerError::Start(io::ErrorKind::TimedOut.into()));
                }
            };
            let _ = std::fs::remove_file(&socket);
            if attempt == ATTEMPTS {
                let log = self.options.log.display();
                let said = format!("{reason}, as soon as it was started; {log} says why");
                return Err(PagerError::Start(io::Error::other(said)));
            }
        }
    }

    /// Starts a pager; its socket takes connections when this returns.
    fn spawn(&self) -> io::Result<PathBuf> {
        let options = &self.options;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&options.directory)?;
        let socket = options
            .directory
            .join(format!("pager-{}-{}.sock", options.release, random()?));
        let listener = listen(&socket)?;
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(&options.log)?;
        let mut command = tokio::process::Command::new(&options.program);
        command
            .arg0("hypeman")
            .arg("pager")
            .arg("--socket")
            .arg(&socket)
            .arg("--inherited")
            .arg("--release")
            .arg(&options.release)
            .arg("--cache-bytes")
            .arg(options.cache_bytes.to_string())
            .arg("--graduate-after")
            .arg(format!(
                "{}s",
                options.graduate_after.map_or(0, |after| after.as_secs())
            ))
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(Stdio::null())
            .stderr(log);
        let spawned = command.spawn().inspect_err(|_| {
            let _ = std::fs::remove_file(&socket);
        });
        let mut child = spawned?;
        // It outlives us; while we are here, it must not stay a zombie.
        tokio::spawn(async move {
            match child.wait().await {
                Ok(status) if status.success() => {}
                Ok(status) => tracing::error!(%status, "a pager has ended"),
                Err(error) => tracing::warn!(%error, "the end of a pager was not seen"),
            }
        });
        Ok(socket)
    }
}

/// Where pagers of a directory listen, or have listened, in the order of their names.
pub(crate) fn sockets(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut sockets = Vec::new();
    for entry in entries {
        let entry = entry?;
        if release_of(&entry.path()).is_some() {
            sockets.push(entry.path());
        }
    }
    sockets.sort();
    Ok(sockets)
}

/// The release in a socket's name; `None` of what is no pager's socket.
pub(crate) fn release_of(socket: &Path) -> Option<&str> {
    let name = socket.file_name()?.to_str()?;
    let (release, _random) = name
        .strip_prefix("pager-")?
        .strip_suffix(".sock")?
        .rsplit_once('-')?;
    Some(release)
}

fn listen(socket: &Path) -> io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let listener = UnixListener::bind(socket)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

fn random() -> io::Result<String> {
    let mut bytes = [0; 4];
    io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
