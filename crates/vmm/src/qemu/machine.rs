//! A machine in a QEMU process.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};

use super::agent_port::AgentPort;
use super::arguments::{CONSOLE_CHARDEV, LOG_CHARDEV, PID_FILE};
use super::console::Console;
use super::qmp::{QmpClient, QmpError, QmpEvent};
use crate::process::{Ended, ProcessHandle, resident_and_cpu};
use crate::{
    AgentChannel, ExitCause, ExitKind, Machine, MachineSpec, MachineStats, ProcessIdentity, RunState,
    VmmError,
};

/// How long a command may take that does its work at once.
const COMMAND_DEADLINE: Duration = Duration::from_secs(10);
/// Time between the end of the control connection and the end of the process that held it.
const END_GRACE: Duration = Duration::from_secs(1);

/// Pause between two attempts of a machine that waits for room on the host's disk.
const STALL_RETRY: Duration = Duration::from_secs(1);

/// What events told about the end.
#[derive(Debug, Default, Clone)]
struct Told {
    panicked: bool,
    /// `reason` of the first SHUTDOWN event.
    shutdown: Option<String>,
}

/// A live (or just ended) QEMU process and our connection to it.
#[derive(Debug)]
pub(crate) struct QemuMachine {
    id: String,
    process: Arc<ProcessHandle>,
    qmp_path: PathBuf,
    agent_path: PathBuf,
    workload_log: PathBuf,
    console: Console,
    connection: tokio::sync::Mutex<Option<Arc<QmpClient>>>,
    told: Arc<Mutex<Told>>,
    agent_port: Arc<AgentPort>,
    killed: AtomicBool,
}

impl QemuMachine {
    pub(crate) fn new(
        process: Arc<ProcessHandle>,
        qmp_path: PathBuf,
        agent_path: PathBuf,
        console: Console,
        spec: &MachineSpec,
    ) -> Self {
        Self {
            id: spec.id.clone(),
            process,
            qmp_path,
            agent_path,
            workload_log: spec.workload_log.clone(),
            console,
            connection: tokio::sync::Mutex::new(None),
            told: Arc::default(),
            agent_port: Arc::new(AgentPort::new()),
            killed: AtomicBool::new(false),
        }
    }

    /// Makes sure that there is a connection.
    pub(crate) async fn connect(&self, deadline: Duration) -> Result<(), VmmError> {
        match tokio::time::timeout(deadline, self.client(deadline)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(self.translate("connect", deadline, error).await),
            Err(_) => Err(unresponsive("connect", deadline)),
        }
    }

    /// Asks what the events before our connection would have told.
    pub(crate) async fn learn_agent_port(&self) {
        if let Ok(answer) = self.command("query-chardev", Value::Null, COMMAND_DEADLINE).await {
            self.agent_port.learn(&answer);
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
        let port = Arc::clone(&self.agent_port);
        let events = Arc::new(move |event| {
            port.note(&event);
            note(&told, &stall, &id, event);
        });
        let client = Arc::new(QmpClient::connect(&self.qmp_path, deadline, events).await?);
        tokio::spawn(go_on_after_stalls(Arc::downgrade(&client), stalled));
        *connection = Some(Arc::clone(&client));
        Ok(client)
    }

    async fn command(&self, command: &str, arguments: Value, deadline: Duration) -> Result<Value, VmmError> {
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
            Err(_) => Err(unresponsive(command, deadline)),
        }
    }

    async fn translate(&self, command: &str, deadline: Duration, error: QmpError) -> VmmError {
        match error {
            QmpError::Timeout => unresponsive(command, deadline),
            QmpError::Refused(message) => VmmError::Refused {
                command: command.to_owned(),
                message,
            },
            QmpError::Closed(message) => match self.ends_soon().await {
                true => VmmError::Gone,
                false => VmmError::Refused {
                    command: command.to_owned(),
                    message,
                },
            },
            QmpError::Connect(source) => match self.ends_soon().await {
                true => VmmError::Gone,
                false => VmmError::Io {
                    context: format!("cannot connect to {}", self.qmp_path.display()),
                    source,
                },
            },
        }
    }

    async fn ends_soon(&self) -> bool {
        tokio::time::timeout(END_GRACE, self.process.ended())
            .await
            .is_ok()
    }

    /// Points an output of QEMU at a fresh file. It writes and takes commands on one thread, so every byte goes
    /// either to the old file or to the new one. The new one gets its name only after QEMU has turned to it:
    /// a reader that sees the name knows that the old file is complete.
    async fn reopen(&self, chardev: &str, path: &Path) -> Result<(), VmmError> {
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        super::append_only(&fresh)?;
        let out = super::arguments::text(&fresh)?;
        let backend = json!({ "type": "file", "data": { "out": out, "append": true } });
        self.command(
            "chardev-change",
            json!({ "id": chardev, "backend": backend }),
            COMMAND_DEADLINE,
        )
        .await?;
        std::fs::rename(&fresh, path).map_err(|source| VmmError::Io {
            context: format!("cannot rename {}", fresh.display()),
            source,
        })
    }

    fn remove_sockets(&self) {
        for path in [
            &self.qmp_path,
            &self.agent_path,
            &self.qmp_path.with_file_name(PID_FILE),
        ] {
            let _ = std::fs::remove_file(path);
        }
    }

    /// Why it ended, from what events, the kernel and, last, the console said.
    fn exit_kind(&self, ended: Ended) -> ExitKind {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let killed = self.killed.load(Ordering::Acquire);
        if told.panicked {
            return ExitKind::Panic {
                message: self.console.panic_message(),
            };
        }
        match (told.shutdown.as_deref(), ended) {
            (Some("guest-shutdown"), _) => ExitKind::PowerOff,
            (Some("guest-panic"), _) => ExitKind::Panic {
                message: self.console.panic_message(),
            },
            (Some("guest-reset"), _) => match self.console.panic_message() {
                Some(message) => ExitKind::Panic {
                    message: Some(message),
                },
                None => ExitKind::Reset,
            },
            _ if killed => ExitKind::Stopped,
            (_, Ended::Signal(number)) => ExitKind::Signal { number },
            // QEMU turns the polite signals into an orderly end.
            (Some("host-signal"), _) => ExitKind::Signal {
                number: libc::SIGTERM,
            },
            (_, Ended::Code(code)) if code != 0 => ExitKind::Code { code },
            // Nobody listened when it ended: the console is the only witness left.
            _ => match self.console.panic_message() {
                Some(message) => ExitKind::Panic {
                    message: Some(message),
                },
                None if self.console.shows_power_off() => ExitKind::PowerOff,
                None => match ended {
                    Ended::Code(code) => ExitKind::Code { code },
                    _ => ExitKind::Unknown,
                },
            },
        }
    }
}

fn unresponsive(command: &str, after: Duration) -> VmmError {
    VmmError::Unresponsive {
        command: command.to_owned(),
        after,
    }
}

/// Lets a machine go on that QEMU stopped for want of disk space: its write is tried again and nothing is lost.
async fn go_on_after_stalls(client: Weak<QmpClient>, stalled: Arc<Notify>) {
    let Some(drained) = client.upgrade().map(|client| client.drained()) else {
        return;
    };
    let retry = async {
        loop {
            tokio::time::sleep(STALL_RETRY).await;
            let Some(client) = client.upgrade() else { return };
            match client
                .execute("query-status", Value::Null, COMMAND_DEADLINE)
                .await
            {
                Ok(status) if status["status"] == "io-error" => {
                    let _ = client.execute("cont", Value::Null, COMMAND_DEADLINE).await;
                }
                Ok(_) => {
                    drop(client);
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

fn note(told: &Mutex<Told>, stalled: &Notify, id: &str, event: QmpEvent) {
    match event.name.as_str() {
        "GUEST_PANICKED" => told.lock().unwrap_or_else(PoisonError::into_inner).panicked = true,
        "SHUTDOWN" => {
            let reason = event.data["reason"]
                .as_str()
                .unwrap_or("unknown")
                .chars()
                .take(64)
                .collect();
            told.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .shutdown
                .get_or_insert(reason);
        }
        "BLOCK_IO_ERROR" => {
            tracing::warn!(machine = id, data = %event.data, "the machine's disk reports an error");
            stalled.notify_one();
        }
        _ => {}
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn process(&self) -> &ProcessIdentity {
        self.process.identity()
    }

    fn agent_channel(&self) -> AgentChannel {
        AgentChannel::SerialSocket(self.agent_path.clone())
    }

    fn agent_port(&self) -> Option<watch::Receiver<Option<bool>>> {
        Some(self.agent_port.subscribe())
    }

    async fn run_state(&self, deadline: Duration) -> Result<RunState, VmmError> {
        let status = self.command("query-status", Value::Null, deadline).await?;
        match status["status"].as_str().unwrap_or_default() {
            "prelaunch" | "inmigrate" => Ok(RunState::Created),
            "running" => Ok(RunState::Running),
            "shutdown" | "guest-panicked" => Ok(RunState::Shutdown),
            "io-error" => Ok(RunState::Stalled),
            "internal-error" => Err(VmmError::Refused {
                command: "query-status".to_owned(),
                message: "the host's virtualisation cannot go on with this guest".to_owned(),
            }),
            _ => Ok(RunState::Paused),
        }
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.command("stop", Value::Null, COMMAND_DEADLINE)
            .await
            .map(drop)
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.command("cont", Value::Null, COMMAND_DEADLINE)
            .await
            .map(drop)
    }

    async fn power_button(&self) -> Result<(), VmmError> {
        self.command("system_powerdown", Value::Null, COMMAND_DEADLINE)
            .await
            .map(drop)
    }

    async fn kill(&self) -> Result<(), VmmError> {
        if self.process.ended_now().is_none() {
            self.killed.store(true, Ordering::Release);
            self.process.kill().map_err(|source| VmmError::Io {
                context: format!("cannot kill process {}", self.process.identity().pid),
                source,
            })?;
            self.process.ended().await;
        }
        self.remove_sockets();
        Ok(())
    }

    async fn exited(&self) {
        self.process.ended().await;
    }

    async fn exit_cause(&self) -> ExitCause {
        let Some(ended) = self.process.ended_now() else {
            return ExitCause {
                kind: ExitKind::Running,
                console_tail: String::new(),
            };
        };
        // The last events may still be on their way through the socket; the reader ends when it is empty.
        if let Some(client) = self.connection.lock().await.clone() {
            let _ = tokio::time::timeout(END_GRACE, client.drained()).await;
        }
        ExitCause {
            kind: self.exit_kind(ended),
            console_tail: self.console.tail(),
        }
    }

    async fn reopen_workload_log(&self) -> Result<(), VmmError> {
        self.reopen(LOG_CHARDEV, &self.workload_log).await
    }

    async fn reopen_vmm_log(&self) -> Result<(), VmmError> {
        self.reopen(CONSOLE_CHARDEV, self.console.path()).await
    }

    fn stats(&self) -> Result<MachineStats, VmmError> {
        let identity = self.process.identity();
        if self.process.ended_now().is_some() || !identity.is_alive() {
            return Err(VmmError::Gone);
        }
        resident_and_cpu(identity.pid).map_err(|_| VmmError::Gone)
    }
}
