//! What a run tells by itself: its guest, the connection to its agent, and the VMM when it is asked for a sign of life.
//!
//! All of it becomes observations of the state machine; what is no news is neither published nor written.

use std::sync::Arc;
use std::time::Duration;

use hypeman_core::instance::{Lifecycle, Observation, UnknownCause};
use hypeman_guest_api::{ExitReason, GuestEvent};
use hypeman_vmm::{RunState, VmmError};

use super::boot::kill;
use super::driver::{Driver, Wake, next_of_run};
use super::link::LinkEvent;
use super::stall::Stall;

/// How long a guest that reported the end of its program may take to power off.
const POWER_OFF_GRACE: Duration = Duration::from_secs(10);
/// How long a VMM may outlive the connection to its guest's agent before the agent alone counts as lost.
const VMM_END_GRACE: Duration = Duration::from_millis(400);
/// How long a VMM may take to answer a check; the second one in a row that it misses is told.
const VMM_CHECK_DEADLINE: Duration = Duration::from_millis(800);

impl Driver {
    pub(super) async fn on_link(&mut self, event: LinkEvent) {
        match event {
            LinkEvent::Connected(client) => {
                self.slot.live.set_client(Some(client));
                // A guest is shown to us only after it has taken on who it is.
                if let Some(run) = self.record.run.as_mut() {
                    run.former_key = None;
                }
                self.observe(&Observation::Responsive);
                if self.record.run.as_ref().is_some_and(|run| run.base.is_some()) {
                    self.observe(&Observation::AgentReady);
                }
            }
            LinkEvent::Lost(reason) => {
                self.slot.live.set_client(None);
                // A VMM that ends takes its sockets along just before the process is seen to be gone.
                let machine = self.run.as_ref().map(|run| Arc::clone(&run.machine));
                if let Some(machine) = machine
                    && tokio::time::timeout(VMM_END_GRACE, machine.exited())
                        .await
                        .is_ok()
                {
                    self.finish_run(None).await;
                    return;
                }
                // A guest that powers off takes its agent down first.
                if self.lifecycle != Lifecycle::ShuttingDown {
                    let line = format!("agent lost: {reason}");
                    // Each attempt that fails says so.
                    let cause = UnknownCause::Agent;
                    if self.observe(&Observation::Unresponsive { cause, reason }) {
                        self.log.line(&line);
                    }
                }
            }
            LinkEvent::Failed(reason) => {
                self.log.line(&format!("the guest could not be set up: {reason}"));
                self.end_run(format!("the guest could not be set up: {reason}"))
                    .await;
            }
            LinkEvent::Guest(report) => self.on_report(report).await,
        }
    }

    pub(super) async fn on_report(&mut self, report: GuestEvent) {
        match report {
            // A guest may repeat itself as often as it likes; only news is written to disk.
            GuestEvent::ProgramStarted => {
                if self.observe(&Observation::ProgramStarted) {
                    self.log.line("program started");
                    self.save().await;
                }
            }
            GuestEvent::AgentReady => {
                if self.observe(&Observation::AgentReady) {
                    self.log.line("agent ready");
                    self.save().await;
                }
            }
            // Told by the link only when the agent is gone: the machine is about to follow.
            GuestEvent::AskedToEnd => drop(self.observe(&Observation::ShutdownBegun)),
            GuestEvent::Exited(reason) => self.on_program_exit(reason).await,
            GuestEvent::SetupFailed { message } => {
                self.log
                    .line(&format!("the guest could not be set up: {message}"));
                self.end_run(format!("the guest could not be set up: {message}"))
                    .await;
            }
        }
    }

    /// The program is over: the guest powers off by itself, or is made to.
    async fn on_program_exit(&mut self, reason: ExitReason) {
        self.log.line(&format!(
            "program ended: {} (code {})",
            reason.message, reason.code
        ));
        self.observe(&Observation::ShutdownBegun);
        let Some(run) = self.run.as_mut() else { return };
        run.program_exit = Some(reason);
        let machine = Arc::clone(&run.machine);
        let slot = Arc::clone(&self.slot);
        tokio::select! {
            () = machine.exited() => {}
            () = slot.hurry.notified() => {}
            () = tokio::time::sleep(POWER_OFF_GRACE) => {
                self.log.line("the guest did not power off: killing the VMM");
            }
        }
        match kill(&machine).await {
            Ok(()) => self.finish_run(None).await,
            // It still has disk and network: it stays this run's, to be stopped or deleted.
            Err(error) => tracing::error!(instance = %self.record.id, %error, "VMM not killed"),
        }
    }

    /// Handles what the run reports until the guest's agent is there, the run is over, or `patience` is.
    pub(super) async fn await_agent(&mut self, patience: Duration) {
        let deadline = tokio::time::Instant::now() + patience;
        while self.slot.live.client().is_none() && self.run.is_some() {
            match tokio::time::timeout_at(deadline, next_of_run(self.run.as_mut())).await {
                Ok(Wake::Link(event)) => self.on_link(event).await,
                Ok(Wake::MachineGone) => self.finish_run(None).await,
                Ok(_) => {
                    self.check_machine().await;
                }
                Err(_) => return,
            }
        }
    }

    /// Asks the VMM for a sign of life. What it says of its machine, where it does.
    pub(super) async fn check_machine(&mut self) -> Option<RunState> {
        let run = self.run.as_ref()?;
        let check = run.machine.run_state(VMM_CHECK_DEADLINE).await;
        self.silence = self.silence.after(&check);
        match check {
            Ok(state) => {
                self.note_stall(self.stall.seen(state));
                self.note_answer();
                return Some(state);
            }
            // Who says no lives.
            Err(VmmError::Refused { .. }) => self.note_answer(),
            Err(error @ VmmError::Unresponsive { .. }) => self.note_silence(error.to_string()),
            // It lives, and nobody listens at its socket, or who does gives no answer.
            Err(error @ (VmmError::Io { .. } | VmmError::Unanswered { .. })) => {
                self.note_silence(format!("the VMM cannot be asked: {error}"));
            }
            // Its end is reported by the process itself.
            Err(_) => {}
        }
        None
    }

    /// A check was answered: the VMM is not silent, though it may wait for a pager that is.
    fn note_answer(&mut self) {
        let served = self.record.run.as_ref().and_then(|run| run.served.as_deref());
        let seen = if served.is_some_and(|name| self.shared.paging.is_silent(name)) {
            Observation::Unresponsive {
                cause: UnknownCause::Vmm,
                reason: "the VMM waits for memory: the pager that serves it does not answer".to_owned(),
            }
        } else {
            Observation::VmmResponsive
        };
        self.observe(&seen);
    }

    /// A check was not answered: the second one in a row is told.
    fn note_silence(&mut self, reason: String) {
        if self.silence.is_told() {
            self.stall = Stall::No;
            let cause = UnknownCause::Vmm;
            self.observe(&Observation::Unresponsive { cause, reason });
        }
    }

    /// Tells when the machine begins to stand still for want of space, and when it goes on.
    fn note_stall(&mut self, stall: Stall) {
        let (before, now) = (self.stall.reason(), stall.reason());
        self.stall = stall;
        if before == now {
            return;
        }
        match now {
            Some(reason) => self.log.line(&format!("the guest stands still: {reason}")),
            None => self.log.line("the guest goes on"),
        }
        self.publish();
    }
}
