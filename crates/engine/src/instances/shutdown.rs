//! Taking a machine down, and what remains to be done when it is gone.

use std::sync::Arc;
use std::time::Duration;

use hypeman_core::instance::{Exit, Observation};
use hypeman_guest_api::{ExitReason, GuestEvent};
use hypeman_store::{StoreError, journal};
use hypeman_vmm::{ExitCause, ExitKind};
use jiff::Timestamp;

use super::boot::{kill, kill_leftovers};
use super::driver::{Driver, Run};
use super::link::LinkEvent;
use super::request::Operation;
use crate::durable;
use crate::events::EventKind;
use crate::snapshots::schedules;
use crate::{EngineError, faults};

/// How long a guest may take to stop.
pub(super) const STOP_GRACE: Duration = Duration::from_secs(5);
/// How long a guest may take before it is deleted.
const DELETE_GRACE: Duration = Duration::from_secs(2);
/// Between the end of the program and the end of the VMM: sync and power-off.
const POWER_OFF: Duration = Duration::from_secs(3);

impl Driver {
    /// Ends the machine: by the guest's own shutdown within `grace`, or at once without one.
    ///
    /// # Errors
    /// The process could not be ended: it may still run, and nothing of it may be removed.
    pub(super) async fn take_down(&mut self, grace: Option<Duration>) -> Result<(), EngineError> {
        self.observe(&Observation::ShutdownBegun);
        let slot = Arc::clone(&self.slot);
        let Some(run) = self.run.as_mut() else {
            // Nothing runs, unless a recovery failed to find out.
            return kill_leftovers(&self.shared, &self.record).await;
        };
        if let Some(grace) = grace {
            let polite = shut_down_guest(run, slot.live.client(), grace);
            tokio::select! {
                () = polite => {}
                () = slot.hurry.notified() => {}
            }
        }
        kill(&run.machine).await
    }

    /// Ends a run that the server itself gives up, and records why.
    pub(super) async fn end_run(&mut self, reason: String) {
        if let Some(run) = self.run.as_mut() {
            run.failure = Some(reason);
        }
        match self.take_down(None).await {
            Ok(()) => self.finish_run(None).await,
            Err(error) => tracing::error!(instance = %self.record.id, %error, "VMM not killed"),
        }
    }

    /// Records the end of a run whose process is gone, and cleans up behind it.
    pub(super) async fn finish_run(&mut self, entry: Option<i64>) {
        let exit = match self.run.take() {
            Some(mut run) => {
                while let Some(event) = run.link.try_next() {
                    note_exit(&mut run, &event);
                }
                let cause = run.machine.exit_cause().await;
                let failure = run.failure.take().or_else(|| self.slot.live.condemned());
                exit_of(run.program_exit.take(), failure, &cause)
            }
            None => exit_unseen(false),
        };
        self.slot.live.set_client(None);
        self.slot.live.set_machine(None);
        self.detach().await;
        if entry.is_some() {
            faults::point("stop.detached");
        }
        self.log.line(&format!("stopped: {}", exit.message));
        self.record.run = None;
        self.memory = None;
        self.last_image = None;
        self.record.exit = Some(exit);
        self.record.stopped_at = Some(Timestamp::now());
        self.observe(&Observation::VmmGone);
        self.settle().await;
        self.publish();
    }

    /// Removes the instance for good.
    pub(super) async fn delete(&mut self, graceful: bool) -> Result<(), EngineError> {
        match self.begin(Operation::Delete).await {
            Ok(_) => faults::point("delete.recorded"),
            // Deleting is how space comes back: it must not need any.
            Err(StoreError::NoSpace | StoreError::NotCommitted) => {}
            Err(error) => return Err(error.into()),
        }
        self.log.line("delete requested");
        self.take_down(graceful.then_some(DELETE_GRACE)).await?;
        faults::point("delete.guest_down");
        self.run = None;
        self.slot.live.set_client(None);
        self.slot.live.set_machine(None);
        self.detach().await;
        faults::point("delete.detached");
        self.forget().await
    }

    /// Removes files and record; the machine is gone already.
    pub(super) async fn forget(&mut self) -> Result<(), EngineError> {
        let directory = self.shared.layout.instance(&self.record.id);
        tokio::task::spawn_blocking(move || durable::remove_tree(&directory))
            .await
            .map_err(|error| EngineError::io("remove files", error.into()))?
            .map_err(|error| EngineError::io("remove the instance's files", error))?;
        faults::point("delete.files");
        let id = self.record.id.clone();
        self.shared
            .store
            .write(move |connection| {
                hypeman_store::instances::delete(connection, &id)?;
                journal::clear(connection, &id)
            })
            .await?;
        faults::point("delete.committed");
        self.shared.table.remove(&self.record.id);
        self.shared
            .events
            .publish(EventKind::Instance, &self.record.id, "Deleted");
        self.shared.release(&self.record).await;
        schedules::forget_orphan(&self.shared, &self.record.id).await;
        self.memory = None;
        Ok(())
    }
}

/// Asks the guest to end and waits until the VMM is gone, or the time is up.
async fn shut_down_guest(
    run: &mut Run,
    client: Option<hypeman_guest_api::host::GuestClient>,
    grace: Duration,
) {
    let machine = Arc::clone(&run.machine);
    let asked = match client {
        Some(client) => client.shutdown(grace).await.is_ok(),
        None => machine.power_button().await.is_ok(),
    };
    if !asked {
        return;
    }
    let gone = async {
        loop {
            tokio::select! {
                biased;
                event = run.link.next() => note_exit(run, &event),
                () = machine.exited() => return,
            }
        }
    };
    let _ = tokio::time::timeout(grace + POWER_OFF, gone).await;
}

fn note_exit(run: &mut Run, event: &LinkEvent) {
    if let LinkEvent::Guest(GuestEvent::Exited(reason)) = event {
        run.program_exit = Some(reason.clone());
    }
}

/// What is recorded of the end of a run: the guest's word first, then the server's, then what the host saw.
fn exit_of(program: Option<ExitReason>, failure: Option<String>, cause: &ExitCause) -> Exit {
    if let Some(reason) = program {
        return Exit {
            code: Some(reason.code),
            message: reason.message,
        };
    }
    if let Some(message) = failure {
        return Exit { code: None, message };
    }
    let message = match &cause.kind {
        ExitKind::PowerOff => "the guest powered off".to_owned(),
        ExitKind::Reset => "the guest asked for a reboot".to_owned(),
        ExitKind::Panic { message } => match message {
            Some(message) => format!("the guest kernel panicked: {message}"),
            None => "the guest kernel panicked".to_owned(),
        },
        ExitKind::Stopped => "killed by the server".to_owned(),
        ExitKind::Signal { number } => format!("the VMM was killed by signal {number}"),
        ExitKind::Code { code: 0 } => "the VMM exited".to_owned(),
        ExitKind::Code { code } => format!("the VMM failed with exit code {code}"),
        ExitKind::Running | ExitKind::Unknown => "the VMM ended while nobody watched it".to_owned(),
    };
    Exit { code: None, message }
}

/// The end of a run that nobody saw: the process was gone when the server came back.
pub(super) fn exit_unseen(rebooted: bool) -> Exit {
    let message = if rebooted {
        "the host was rebooted".to_owned()
    } else {
        "the VMM ended while the server was down".to_owned()
    };
    Exit { code: None, message }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cause(kind: ExitKind) -> ExitCause {
        ExitCause {
            kind,
            console_tail: String::new(),
        }
    }

    #[test]
    fn the_guests_own_word_counts_most() {
        let program = ExitReason {
            code: 137,
            signal: Some(9),
            out_of_memory: true,
            message: "out of memory".into(),
        };
        let exit = exit_of(
            Some(program),
            Some("gave up".into()),
            &cause(ExitKind::Signal { number: 9 }),
        );
        assert_eq!(
            exit,
            Exit {
                code: Some(137),
                message: "out of memory".into()
            }
        );
    }

    #[test]
    fn without_it_the_host_says_what_it_saw() {
        let exit = exit_of(
            None,
            None,
            &cause(ExitKind::Panic {
                message: Some("not syncing".into()),
            }),
        );
        assert_eq!(exit.message, "the guest kernel panicked: not syncing");
        assert_eq!(exit.code, None);
        let exit = exit_of(None, Some("could not mount".into()), &cause(ExitKind::Stopped));
        assert_eq!(exit.message, "could not mount");
    }
}
