//! Our connection to a QEMU process, and what its events told.
//!
//! ```text
//! command ─► connection (made anew when the last one ended) ─► QEMU
//! Told ◄──── events ◄──────────────────────────────────────────┘
//! ```
//!
//! Invariant: a command to a process that has ended is [`VmmError::Gone`], whatever the socket said first.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

use super::agent_port::AgentPort;
use super::qmp::{QmpClient, QmpError, QmpEvent};
use crate::VmmError;
use crate::files::io_error;
use crate::process::ProcessHandle;

/// How long a command may take that does its work at once.
pub(super) const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// Time between the end of the process and the last event that it told.
const END_GRACE: Duration = Duration::from_secs(1);
/// Pause between two attempts of a machine that waits for room on the host's disk.
const STALL_RETRY: Duration = Duration::from_secs(1);

/// A file that QEMU opens by a name that we gave it: it may see no other file of ours.
#[derive(Debug)]
pub(super) struct Lent {
    set: u64,
}

impl Lent {
    /// What QEMU opens.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/dev/fdset/{}", self.set))
    }
}

/// What events told about the end.
#[derive(Debug, Default, Clone)]
pub(super) struct Ending {
    pub(super) panicked: bool,
    /// `reason` of the first SHUTDOWN event.
    pub(super) shutdown: Option<String>,
}

/// How far the loading of a device state is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    #[default]
    Pending,
    Completed,
    Failed,
}

/// What events told.
#[derive(Debug, Default)]
struct Told {
    ending: Mutex<Ending>,
    load: watch::Sender<Load>,
    /// Counts changes of jobs.
    jobs: watch::Sender<u64>,
    agent_port: AgentPort,
}

/// A QEMU process and our connection to it.
#[derive(Debug)]
pub(super) struct Control {
    id: String,
    process: Arc<ProcessHandle>,
    socket: PathBuf,
    connection: tokio::sync::Mutex<Option<Arc<QmpClient>>>,
    told: Arc<Told>,
    /// True while we want the machine to stand still, so that nothing else lets it go on.
    held: Arc<tokio::sync::Mutex<bool>>,
    /// Taken while disks are being copied.
    copying: Arc<tokio::sync::Mutex<()>>,
}

impl Control {
    pub(super) fn new(id: String, process: Arc<ProcessHandle>, socket: PathBuf) -> Self {
        Self {
            id,
            process,
            socket,
            connection: tokio::sync::Mutex::new(None),
            told: Arc::default(),
            held: Arc::default(),
            copying: Arc::default(),
        }
    }

    /// Name of the machine, for messages.
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    pub(super) fn process(&self) -> &Arc<ProcessHandle> {
        &self.process
    }

    /// To be locked by who copies disks.
    pub(super) fn copying(&self) -> Arc<tokio::sync::Mutex<()>> {
        Arc::clone(&self.copying)
    }

    /// What is known of the end.
    pub(super) fn ending(&self) -> Ending {
        self.told
            .ending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Follows the loading of a device state.
    pub(super) fn load(&self) -> watch::Receiver<Load> {
        self.told.load.subscribe()
    }

    /// Changes whenever a job does, from now on.
    pub(super) fn jobs(&self) -> watch::Receiver<u64> {
        self.told.jobs.subscribe()
    }

    /// Whether the guest has the agent's port open.
    pub(super) fn agent_port(&self) -> watch::Receiver<Option<bool>> {
        self.told.agent_port.subscribe()
    }

    /// Asks what the events before our connection would have told of the agent's port.
    pub(super) async fn learn_agent_port(&self) {
        if let Ok(answer) = self.command("query-chardev", Value::Null, COMMAND_DEADLINE).await {
            self.told.agent_port.learn(&answer);
        }
    }

    /// Waits until the events of a process that has ended are all known.
    pub(super) async fn drained(&self) {
        if let Some(client) = self.connection.lock().await.clone() {
            let _ = tokio::time::timeout(END_GRACE, client.drained()).await;
        }
    }

    /// Makes sure that there is a connection.
    pub(super) async fn connect(&self, deadline: Duration) -> Result<(), VmmError> {
        match tokio::time::timeout(deadline, self.client(deadline)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(self.translate("connect", deadline, error).await),
            Err(_) => Err(VmmError::unresponsive("connect", deadline)),
        }
    }

    /// The connection, made anew when the last one ended.
    async fn client(&self, deadline: Duration) -> Result<Arc<QmpClient>, QmpError> {
        let mut connection = self.connection.lock().await;
        if let Some(client) = connection.as_ref().filter(|client| !client.is_closed()) {
            return Ok(Arc::clone(client));
        }
        let told = Arc::clone(&self.told);
        let id = self.id.clone();
        let stalled = Arc::new(Notify::new());
        let stall = Arc::clone(&stalled);
        let events = Arc::new(move |event| told.note(&stall, &id, event));
        let client = Arc::new(QmpClient::connect(&self.socket, deadline, events).await?);
        tokio::spawn(go_on_after_stalls(
            Arc::downgrade(&client),
            stalled,
            Arc::clone(&self.held),
        ));
        *connection = Some(Arc::clone(&client));
        Ok(client)
    }

    /// Stops the processors, also those of a machine that stalls and would else go on once there is room.
    pub(super) async fn hold(&self) -> Result<(), VmmError> {
        let mut held = self.held.lock().await;
        self.command("stop", Value::Null, COMMAND_DEADLINE).await?;
        *held = true;
        Ok(())
    }

    /// Lets the processors go on.
    pub(super) async fn let_go(&self) -> Result<(), VmmError> {
        let mut held = self.held.lock().await;
        self.command("cont", Value::Null, COMMAND_DEADLINE).await?;
        *held = false;
        Ok(())
    }

    /// Sends one command and waits for its answer, at most `deadline`.
    pub(super) async fn command(
        &self,
        command: &str,
        arguments: Value,
        deadline: Duration,
    ) -> Result<Value, VmmError> {
        if self.process.ended_now().is_some() {
            return Err(VmmError::Gone);
        }
        let work = async {
            let client = self.client(deadline).await?;
            client.execute(command, arguments, deadline).await
        };
        match tokio::time::timeout(deadline, work).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.translate(command, deadline, error).await),
            Err(_) => Err(VmmError::unresponsive(command, deadline)),
        }
    }

    /// Lends QEMU a file. It opens it as often as it likes until it is taken back, and only in the way in which it is
    /// open here.
    pub(super) async fn lend(&self, file: File) -> Result<Lent, VmmError> {
        let command = "add-fd";
        if self.process.ended_now().is_some() {
            return Err(VmmError::Gone);
        }
        let work = async {
            let client = self.client(COMMAND_DEADLINE).await?;
            client
                .execute_with(command, Value::Null, file.into(), COMMAND_DEADLINE)
                .await
        };
        let answer = match tokio::time::timeout(COMMAND_DEADLINE, work).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(self.translate(command, COMMAND_DEADLINE, error).await),
            Err(_) => return Err(VmmError::unresponsive(command, COMMAND_DEADLINE)),
        };
        match answer["fdset-id"].as_u64() {
            Some(set) => Ok(Lent { set }),
            None => Err(VmmError::refused(command, "it named no set")),
        }
    }

    /// Takes back what was lent; what QEMU has open of it stays open.
    pub(super) async fn take_back(&self, lent: Lent) -> Result<(), VmmError> {
        let arguments = json!({ "fdset-id": lent.set });
        self.command("remove-fd", arguments, COMMAND_DEADLINE)
            .await
            .map(drop)
    }

    async fn translate(&self, command: &str, deadline: Duration, error: QmpError) -> VmmError {
        match error {
            QmpError::Timeout => VmmError::unresponsive(command, deadline),
            QmpError::Refused(message) => VmmError::refused(command, message),
            QmpError::Closed(_) | QmpError::Connect(_) if self.process.ends_soon().await => VmmError::Gone,
            QmpError::Closed(message) => VmmError::unanswered(command, message),
            QmpError::Connect(source) => io_error("cannot connect to", &self.socket)(source),
        }
    }
}

impl Told {
    fn note(&self, stalled: &Notify, id: &str, event: QmpEvent) {
        self.agent_port.note(&event);
        let ending = || self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        match event.name.as_str() {
            "GUEST_PANICKED" => ending().panicked = true,
            "SHUTDOWN" => {
                let reason = event.data["reason"]
                    .as_str()
                    .unwrap_or("unknown")
                    .chars()
                    .take(64)
                    .collect();
                ending().shutdown.get_or_insert(reason);
            }
            "BLOCK_IO_ERROR" => {
                tracing::warn!(machine = id, data = %event.data, "the machine's disk reports an error");
                stalled.notify_one();
            }
            "MIGRATION" => {
                let load = match event.data["status"].as_str() {
                    Some("completed") => Load::Completed,
                    Some("failed") => Load::Failed,
                    _ => Load::Pending,
                };
                self.load.send_replace(load);
            }
            "JOB_STATUS_CHANGE" => self.jobs.send_modify(|count| *count += 1),
            _ => {}
        }
    }
}

/// Lets a machine go on that QEMU stopped for want of disk space: its write is tried again and nothing is lost.
/// Not one that we hold: it would run in the middle of its own capture.
async fn go_on_after_stalls(
    client: Weak<QmpClient>,
    stalled: Arc<Notify>,
    held: Arc<tokio::sync::Mutex<bool>>,
) {
    let Some(drained) = client.upgrade().map(|client| client.drained()) else {
        return;
    };
    let retry = async {
        loop {
            tokio::time::sleep(STALL_RETRY).await;
            let held = held.lock().await;
            if *held {
                // Letting it go tries the write again, and tells of it when that fails.
                drop(held);
                stalled.notified().await;
                continue;
            }
            let Some(client) = client.upgrade() else { return };
            match client
                .execute("query-status", Value::Null, COMMAND_DEADLINE)
                .await
            {
                Ok(status) if status["status"] == "io-error" => {
                    let _ = client.execute("cont", Value::Null, COMMAND_DEADLINE).await;
                }
                Ok(_) => {
                    drop((client, held));
                    stalled.notified().await;
                }
                Err(QmpError::Closed(_)) => return,
                Err(_) => {}
            }
        }
    };
    tokio::select! {
        () = retry => {}
        () = drained => {}
    }
}
