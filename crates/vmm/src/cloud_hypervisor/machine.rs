//! A machine in a Cloud Hypervisor process.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use hypeman_guest_api::AGENT_VSOCK_PORT;
use tokio::sync::OnceCell;

use super::config::VSOCK_SOCKET;
use super::control::Control;
use super::{CannotSave, capture, remove_files};
use crate::blocking::blocking;
use crate::console::Console;
use crate::own_directory::OwnDirectory;
use crate::process::Ended;
use crate::{
    Adjust, AgentChannel, DiskCopies, DiskCopy, ExitCause, ExitKind, GuestMemory, JailReport, Machine,
    MachineSpec, MachineStats, ProcessIdentity, RunState, StateIdentity, VmmError, WorkloadLog,
};
use crate::{disk_copies, turn};

/// Time between the end of the process and the last line in the workload's log. A full disk takes longer.
const LOG_GRACE: Duration = Duration::from_secs(1);
/// What it says where KVM keeps no state of guests within guests, and so none of its own either.
const NESTED_STATE: &str = "nested guest state";

/// A live (or just ended) Cloud Hypervisor process.
#[derive(Debug)]
pub(super) struct CloudHypervisorMachine {
    control: Arc<Control>,
    spec: MachineSpec,
    console: Console,
    workload_log: WorkloadLog,
    identity: Option<StateIdentity>,
    memory: OnceCell<GuestMemory>,
    jail: Option<JailReport>,
    cannot_save: CannotSave,
}

impl CloudHypervisorMachine {
    pub(super) fn new(
        control: Arc<Control>,
        spec: &MachineSpec,
        console: Console,
        workload_log: WorkloadLog,
        identity: Option<StateIdentity>,
        memory: Option<GuestMemory>,
        cannot_save: CannotSave,
    ) -> Self {
        Self {
            control,
            spec: spec.clone(),
            console,
            workload_log,
            identity,
            memory: OnceCell::new_with(memory),
            jail: None,
            cannot_save,
        }
    }

    /// What of a jail its process bears.
    pub(super) fn in_jail(self, jail: Option<JailReport>) -> Self {
        Self { jail, ..self }
    }

    /// The way to the process.
    pub(super) fn control(&self) -> &Control {
        &self.control
    }

    /// What it was made of.
    pub(super) fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    fn own(&self) -> OwnDirectory {
        OwnDirectory::of(&self.spec.runtime_directory)
    }

    /// Why it ended, from what events, the kernel and, last, the console said.
    fn exit_kind(&self, ended: Ended) -> ExitKind {
        let told = self.control.told().ending();
        let message = self.console.panic_message();
        match ended {
            _ if told.panicked => ExitKind::Panic { message },
            // A kernel without a driver for the panic device says so on the console, and resets.
            _ if told.reset && message.is_some() => ExitKind::Panic { message },
            _ if told.reset => ExitKind::Reset,
            _ if self.control.process().was_stopped() => ExitKind::Stopped,
            Ended::Signal(number) => ExitKind::Signal { number },
            Ended::Code(0) if told.shut_down => ExitKind::PowerOff,
            Ended::Code(code) if code != 0 && message.is_none() => ExitKind::Code { code },
            // Nobody listened when it ended: the console is the only witness left.
            _ if message.is_some() => ExitKind::Panic { message },
            _ if self.console.shows_power_off() => ExitKind::PowerOff,
            Ended::Code(code) => ExitKind::Code { code },
            Ended::Unseen => ExitKind::Unknown,
        }
    }
}

#[async_trait]
impl Machine for CloudHypervisorMachine {
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
        AgentChannel::VsockSocket {
            path: self.own().join(VSOCK_SOCKET),
            port: AGENT_VSOCK_PORT,
        }
    }

    async fn run_state(&self, deadline: Duration) -> Result<RunState, VmmError> {
        self.control.run_state(deadline).await
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.control.pause().await
    }

    async fn resume(&self) -> Result<(), VmmError> {
        self.control.resume().await
    }

    async fn guest_memory(&self) -> Result<GuestMemory, VmmError> {
        let find = || async {
            let (spec, process) = (self.spec.clone(), Arc::clone(self.control.process()));
            blocking(move || capture::known_memory(&spec, &process))
                .await
                .map_err(VmmError::io(format!(
                    "cannot look at the memory of process {}",
                    self.process().pid
                )))
        };
        self.memory.get_or_try_init(find).await.cloned()
    }

    async fn save_devices(&self) -> Result<Vec<u8>, VmmError> {
        let memory = self.guest_memory().await?;
        let saved = capture::save_devices(&self.control, &self.own(), memory).await;
        if let Err(VmmError::Refused { message, .. }) = &saved
            && message.contains(NESTED_STATE)
        {
            self.cannot_save.store(true, Ordering::Relaxed);
        }
        saved
    }

    async fn prepare_disk_copies(&self, copies: &[DiskCopy]) -> Result<Box<dyn DiskCopies>, VmmError> {
        Ok(Box::new(disk_copies::prepare(&self.spec.disks, copies).await?))
    }

    async fn power_button(&self) -> Result<(), VmmError> {
        self.control.power_button().await
    }

    async fn kill(&self) -> Result<(), VmmError> {
        self.control.process().stop().await?;
        remove_files(&self.spec.runtime_directory);
        Ok(())
    }

    async fn exited(&self) {
        self.control.process().ended().await;
        // The last lines are with us already, and on their way to the file.
        let _ = tokio::time::timeout(LOG_GRACE, self.workload_log.settled()).await;
    }

    async fn exit_cause(&self) -> ExitCause {
        let Some(ended) = self.control.process().ended_now() else {
            return ExitCause::running();
        };
        // The last events may still be on their way through the pipe; the reader ends when it is empty.
        self.control.drained().await;
        ExitCause {
            kind: self.exit_kind(ended),
            console_tail: self.console.tail(),
        }
    }

    async fn reopen_workload_log(&self) -> Result<(), VmmError> {
        self.workload_log.reopen().await
    }

    /// Cloud Hypervisor keeps its standard output, so the file gets its name back and its content goes to the other.
    async fn reopen_vmm_log(&self) -> Result<(), VmmError> {
        let path = self.console.path();
        let Some(turn) = turn::begin(self.process().pid, path).await? else {
            return Ok(());
        };
        self.control.while_paused(turn::finish(turn, path)).await
    }

    fn adjust(&self) -> Option<&dyn Adjust> {
        Some(self)
    }

    fn stats(&self) -> Result<MachineStats, VmmError> {
        self.control.process().usage()
    }
}
