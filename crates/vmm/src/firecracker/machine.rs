//! A machine in a Firecracker process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use hypeman_guest_api::AGENT_VSOCK_PORT;
use hyper::Method;
use serde_json::json;
use tokio::sync::Mutex;

use super::files::Files;
use super::hold::{self, Hold};
use crate::console::Console;
use crate::memory::Segment;
use crate::process::Ended;
use crate::rest::{CALL_DEADLINE, RestClient};
use crate::workload_log::WorkloadLog;
use crate::{
    Adjust, AgentChannel, Disk, DiskCopies, DiskCopy, ExitCause, ExitKind, GuestMemory, JailReport, Machine,
    MachineSpec, MachineStats, ProcessIdentity, RunState, StateIdentity, VmmError, VmmKind, disk_copies,
    turn,
};

/// Time between the end of the process and the last line in the workload's log. A full disk takes longer.
const LOG_GRACE: Duration = Duration::from_secs(2);
/// Versions after whose bare pause a guest is deaf (firecracker#6100).
const DEAFENING: &str = "1.16.";

/// A live (or just ended) Firecracker process and our way to it.
#[derive(Debug)]
pub(super) struct FirecrackerMachine {
    client: RestClient,
    files: Files,
    console: Console,
    /// Where guest memory lies; `None` where that was not written down.
    segments: Option<Vec<Segment>>,
    identity: Option<StateIdentity>,
    disks: Vec<Disk>,
    workload_log: WorkloadLog,
    /// There while the machine waits for us with everything.
    hold: Mutex<Option<Hold>>,
    /// It stands still and its guest does not know: no device state was taken since.
    paused_unnoticed: AtomicBool,
    /// The guest was told that its connections end, and nobody here.
    disconnected: AtomicBool,
    jail: Option<JailReport>,
}

impl FirecrackerMachine {
    pub(super) fn new(
        client: RestClient,
        files: Files,
        console: Console,
        segments: Option<Vec<Segment>>,
        identity: Option<StateIdentity>,
        spec: &MachineSpec,
        workload_log: WorkloadLog,
    ) -> Self {
        Self {
            client,
            files,
            console,
            segments,
            identity,
            disks: spec.disks.clone(),
            workload_log,
            hold: Mutex::new(None),
            paused_unnoticed: AtomicBool::new(false),
            disconnected: AtomicBool::new(false),
            jail: None,
        }
    }

    /// What of a jail its process bears.
    pub(super) fn in_jail(self, jail: Option<JailReport>) -> Self {
        Self { jail, ..self }
    }

    /// Another server started it, and may have paused it.
    pub(super) fn taken_back(self) -> Self {
        self.paused_unnoticed.store(true, Ordering::Release);
        self
    }

    /// The way to the process.
    pub(super) fn client(&self) -> &RestClient {
        &self.client
    }

    async fn change_state(&self, state: &str) -> Result<(), VmmError> {
        let body = json!({ "state": state });
        self.client
            .call(Method::PATCH, "/vm", Some(&body), CALL_DEADLINE)
            .await
            .map(drop)
    }

    /// Why it ended, from what the kernel and, last, the console said.
    fn exit_kind(&self, ended: Ended) -> ExitKind {
        let message = self.console.panic_message();
        match ended {
            _ if self.client.process().was_stopped() => ExitKind::Stopped,
            Ended::Signal(number) => ExitKind::Signal { number },
            Ended::Code(code) if code != 0 => ExitKind::Code { code },
            _ if message.is_some() => ExitKind::Panic { message },
            // A guest ends its machine by a reboot, whatever its reason.
            Ended::Code(_) => ExitKind::PowerOff,
            Ended::Unseen if self.console.shows_restart() => ExitKind::PowerOff,
            Ended::Unseen => ExitKind::Unknown,
        }
    }
}

/// Whether a guest hears nothing on vsock any more after a pause that it did not notice: these versions then wait until
/// the guest has taken note of a reset of its connections, which they send with a device state only.
fn deafens_its_guest(version: Option<&str>) -> bool {
    version.is_none_or(|version| version.starts_with(DEAFENING))
}

#[async_trait]
impl Machine for FirecrackerMachine {
    fn process(&self) -> &ProcessIdentity {
        self.client.process().identity()
    }

    fn state_identity(&self) -> Option<&StateIdentity> {
        self.identity.as_ref()
    }

    fn jail(&self) -> Option<&JailReport> {
        self.jail.as_ref()
    }

    fn agent_channel(&self) -> AgentChannel {
        AgentChannel::VsockSocket {
            path: self.files.guest_socket(),
            port: AGENT_VSOCK_PORT,
        }
    }

    async fn run_state(&self, deadline: Duration) -> Result<RunState, VmmError> {
        if self.hold.lock().await.is_some() {
            return Ok(RunState::Paused);
        }
        let about = self.client.call(Method::GET, "/", None, deadline).await?;
        match about["state"].as_str() {
            Some("Running") => Ok(RunState::Running),
            Some("Paused") => Ok(RunState::Paused),
            _ => Ok(RunState::Created),
        }
    }

    async fn pause(&self) -> Result<(), VmmError> {
        self.change_state("Paused").await?;
        self.paused_unnoticed.store(true, Ordering::Release);
        Ok(())
    }

    async fn resume(&self) -> Result<(), VmmError> {
        let unnoticed = self.paused_unnoticed.load(Ordering::Acquire);
        let version = self.identity.as_ref().map(|identity| identity.version.as_str());
        if unnoticed && deafens_its_guest(version) {
            // It goes on all the same: a guest that is deaf is better than one that stands still.
            if let Err(error) = self.save_devices().await {
                tracing::warn!(%error, "the guest may not hear its host any more");
            }
        }
        if let Some(hold) = self.hold.lock().await.take() {
            hold.release().await;
        }
        self.change_state("Resumed").await?;
        self.paused_unnoticed.store(false, Ordering::Release);
        Ok(())
    }

    async fn guest_memory(&self) -> Result<GuestMemory, VmmError> {
        let segments = self.segments.clone().ok_or(VmmError::Unsupported {
            kind: VmmKind::Firecracker,
            feature: "the capture of a machine whose memory was not found when it started",
        })?;
        GuestMemory::open_maybe_served(Arc::clone(self.client.process()), segments).map_err(VmmError::io(
            format!("cannot look at the memory of process {}", self.process().pid),
        ))
    }

    /// Firecracker tells the guest, in its memory, that its connections end here.
    fn memory_rests_while_saving(&self) -> bool {
        false
    }

    fn connections_have_ended(&self) -> bool {
        self.disconnected.swap(false, Ordering::AcqRel)
    }

    async fn save_devices(&self) -> Result<Vec<u8>, VmmError> {
        let mut held = self.hold.lock().await;
        if let Some(hold) = held.take() {
            hold.release().await;
        }
        self.disconnected.store(true, Ordering::Release);
        let (state, hold) = hold::save(&self.client, &self.files).await?;
        *held = Some(hold);
        self.paused_unnoticed.store(false, Ordering::Release);
        Ok(state)
    }

    async fn prepare_disk_copies(&self, copies: &[DiskCopy]) -> Result<Box<dyn DiskCopies>, VmmError> {
        Ok(Box::new(disk_copies::prepare(&self.disks, copies).await?))
    }

    async fn power_button(&self) -> Result<(), VmmError> {
        let body = json!({ "action_type": "SendCtrlAltDel" });
        self.client
            .call(Method::PUT, "/actions", Some(&body), CALL_DEADLINE)
            .await
            .map(drop)
    }

    async fn kill(&self) -> Result<(), VmmError> {
        self.client.process().stop().await?;
        self.files.remove();
        Ok(())
    }

    async fn exited(&self) {
        self.client.process().ended().await;
        // The last lines are with us already, and on their way to the file.
        let _ = tokio::time::timeout(LOG_GRACE, self.workload_log.settled()).await;
    }

    async fn exit_cause(&self) -> ExitCause {
        let Some(ended) = self.client.process().ended_now() else {
            return ExitCause::running();
        };
        ExitCause {
            kind: self.exit_kind(ended),
            console_tail: self.console.tail(),
        }
    }

    async fn reopen_workload_log(&self) -> Result<(), VmmError> {
        self.workload_log.reopen().await
    }

    /// Firecracker keeps its standard output, so the file gets its name back and its content goes to the other.
    async fn reopen_vmm_log(&self) -> Result<(), VmmError> {
        let Some(turn) = turn::begin(self.process().pid, self.console.path()).await? else {
            return Ok(());
        };
        self.pause().await?;
        let finished = turn::finish(turn, self.console.path()).await;
        self.resume().await?;
        finished
    }

    fn adjust(&self) -> Option<&dyn Adjust> {
        Some(self)
    }

    fn stats(&self) -> Result<MachineStats, VmmError> {
        self.client.process().usage()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_versions_that_deafen_their_guests_reset_its_connections_after_a_bare_pause() {
        assert!(!deafens_its_guest(Some("1.15.1")) && !deafens_its_guest(Some("1.17.0")));
        assert!(deafens_its_guest(Some("1.16.0")) && deafens_its_guest(Some("1.16.1")));
        assert!(deafens_its_guest(None), "whose version nobody knows");
    }
}
