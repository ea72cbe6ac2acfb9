//! A machine in a QEMU process.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::arguments::{AGENT_SOCKET, CONSOLE_CHARDEV, LOG_CHARDEV, MEBIBYTE};
use super::control::{COMMAND_DEADLINE, Control};
use super::{capture, copies, remove_files, restore};
use crate::console::Console;
use crate::files::{append_only, beside, io_error};
use crate::process::Ended;
use crate::{
    AgentChannel, Disk, DiskCopies, DiskCopy, ExitCause, ExitKind, GuestMemory, JailReport, Machine,
    MachineSpec, MachineStats, ProcessIdentity, Restore, RunState, StateIdentity, VmmError,
};

/// A live (or just ended) QEMU process and our connection to it.
#[derive(Debug)]
pub(crate) struct QemuMachine {
    control: Arc<Control>,
    runtime_directory: PathBuf,
    memory_bytes: u64,
    disks: Vec<Disk>,
    workload_log: PathBuf,
    console: Console,
    identity: Option<StateIdentity>,
    jail: Option<JailReport>,
}

impl QemuMachine {
    pub(super) fn new(
        control: Control,
        console: Console,
        spec: &MachineSpec,
        identity: Option<StateIdentity>,
    ) -> Self {
        Self {
            control: Arc::new(control),
            runtime_directory: spec.runtime_directory.clone(),
            memory_bytes: spec.memory_bytes.next_multiple_of(MEBIBYTE),
            disks: spec.disks.clone(),
            workload_log: spec.workload_log.clone(),
            console,
            identity,
            jail: None,
        }
    }

    /// What of a jail its process bears.
    pub(super) fn in_jail(self, jail: Option<JailReport>) -> Self {
        Self { jail, ..self }
    }

    pub(super) fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// See [`restore::load`].
    pub(super) async fn load(&self, restore: Restore, pipe: OwnedFd) -> Result<(), VmmError> {
        restore::load(&self.control, self.memory_bytes, restore, pipe).await
    }

    async fn command(&self, command: &str, arguments: Value, deadline: Duration) -> Result<Value, VmmError> {
        self.control.command(command, arguments, deadline).await
    }

    /// Points an output of QEMU at a fresh file. It writes and takes commands on one thread, so every byte goes
    /// either to the old file or to the new one. The new one gets its name only after QEMU has turned to it:
    /// a reader that sees the name knows that the old file is complete.
    async fn reopen(&self, chardev: &str, path: &Path) -> Result<(), VmmError> {
        let fresh = beside(path, ".new");
        let lent = self.control.lend(append_only(&fresh)?).await?;
        let backend = json!({ "type": "file", "data": { "out": lent.path(), "append": true } });
        let arguments = json!({ "id": chardev, "backend": backend });
        let changed = self.command("chardev-change", arguments, COMMAND_DEADLINE).await;
        self.control.take_back(lent).await?;
        changed?;
        std::fs::rename(&fresh, path).map_err(io_error("cannot rename", &fresh))
    }

    /// Why it ended, from what events, the kernel and, last, the console said.
    fn exit_kind(&self, ended: Ended) -> ExitKind {
        let told = self.control.ending();
        let message = self.console.panic_message();
        match (told.shutdown.as_deref(), ended) {
            _ if told.panicked => ExitKind::Panic { message },
            (Some("guest-shutdown"), _) => ExitKind::PowerOff,
            (Some("guest-panic"), _) => ExitKind::Panic { message },
            (Some("guest-reset"), _) if message.is_some() => ExitKind::Panic { message },
            (Some("guest-reset"), _) => ExitKind::Reset,
            _ if self.control.process().was_stopped() => ExitKind::Stopped,
            (_, Ended::Signal(number)) => ExitKind::Signal { number },
            // QEMU turns the polite signals into an orderly end.
            (Some("host-signal"), _) => ExitKind::Signal {
                number: libc::SIGTERM,
            },
            (_, Ended::Code(code)) if code != 0 => ExitKind::Code { code },
            // Nobody listened when it ended: the console is the only witness left.
            _ if message.is_some() => ExitKind::Panic { message },
            _ if self.console.shows_power_off() => ExitKind::PowerOff,
            (_, Ended::Code(code)) => ExitKind::Code { code },
            (_, Ended::Unseen) => ExitKind::Unknown,
        }
    }
}

#[async_trait]
impl Machine for QemuMachine {
    fn process(&self) -> &ProcessIdentity {
        self.control.process().identity()
    }

    fn state_identity(&self) -> Option<&StateIdentity> {
        self.identity.as_ref()
    }

    fn jail(&self) -> Option<&JailReport> {
        self.jail.as_ref()
    }

    fn agent_channel(&self) -> AgentChannel {
        AgentChannel::SerialSocket(self.runtime_directory.join(AGENT_SOCKET))
    }

    fn agent_port(&self) -> Option<watch::Receiver<Option<bool>>> {
        Some(self.control.agent_port())
    }

    async fn run_state(&self, deadline: Duration) -> Result<RunState, VmmError> {
        let status = self.command("query-status", Value::Null, deadline).await?;
        match status["status"].as_str().unwrap_or_default() {
            "prelaunch" | "inmigrate" => Ok(RunState::Created),
            "running" => Ok(RunState::Running),
            "shutdown" | "guest-panicked" => Ok(RunState::Shutdown),
            "io-error" => Ok(RunState::Stalled),
            "suspended" => Ok(RunState::Suspended),
            "internal-error" => Err(VmmError::refused(
                "query-status",
                "the host's virtualisation cannot go on with this guest",
            )),
            _ => Ok(RunState::Paused),
        }
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.control.hold().await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.control.let_go().await
    }

    async fn guest_memory(&self) -> Result<GuestMemory, VmmError> {
        capture::guest_memory(&self.control, self.memory_bytes).await
    }

    async fn save_devices(&self) -> Result<Vec<u8>, VmmError> {
        capture::save_devices(&self.control).await
    }

    async fn prepare_disk_copies(&self, copies: &[DiskCopy]) -> Result<Box<dyn DiskCopies>, VmmError> {
        Ok(Box::new(
            copies::prepare(&self.control, &self.disks, copies).await?,
        ))
    }

    async fn power_button(&self) -> Result<(), VmmError> {
        self.command("system_powerdown", Value::Null, COMMAND_DEADLINE)
            .await
            .map(drop)
    }

    async fn kill(&self) -> Result<(), VmmError> {
        self.control.process().stop().await?;
        remove_files(&self.runtime_directory);
        Ok(())
    }

    async fn exited(&self) {
        self.control.process().ended().await;
    }

    async fn exit_cause(&self) -> ExitCause {
        let Some(ended) = self.control.process().ended_now() else {
            return ExitCause::running();
        };
        // The last events may still be on their way through the socket; the reader ends when it is empty.
        self.control.drained().await;
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
        self.control.process().usage()
    }
}
