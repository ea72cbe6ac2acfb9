//! The one task that owns an instance.
//!
//! ```text
//!   requests ──►┐                             ┌──► journal + record (durable)
//!   VMM exit ──►├─ one at a time ─ decide ─ act┤
//!   agent    ──►│   (hypeman_core::instance)   └──► published view (watch) ──► queries, wait
//!   expiry   ──►┘
//! ```
//!
//! Two requests that race are carried out in turn: the second is judged by the state that the first left, so one
//! succeeds and the other gets a clear refusal.

use std::sync::Arc;
use std::time::Duration;

use hypeman_core::instance::{Command, InstanceState, Lifecycle, Observation, permit};
use hypeman_guest_api::{ExitReason, GuestEvent};
use hypeman_store::{StoreError, journal};
use hypeman_vmm::{Machine, VmmError};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use super::action_log::ActionLog;
use super::boot::kill;
use super::capture::{CapturePlan, Captured};
use super::link::{Link, LinkEvent};
use super::model::{Expiry, Instance, InstanceRecord, InstanceUpdate, StartOverrides};
use super::rewind::Target;
use super::stall::Stall;
use super::table::Slot;
use crate::events::EventKind;
use crate::shared::Shared;
use crate::snapshots::leases::Lease;
use crate::snapshots::vault::Hold;
use crate::snapshots::{Snapshot, StandbyRequest};
use crate::{EngineError, faults};

/// How long a guest that reported the end of its program may take to power off.
const POWER_OFF_GRACE: Duration = Duration::from_secs(10);
/// How long a VMM may outlive the connection to its guest's agent before the agent alone counts as lost.
const VMM_END_GRACE: Duration = Duration::from_millis(400);
/// How often a hung VMM is noticed.
const VMM_CHECK_INTERVAL: Duration = Duration::from_secs(2);
const VMM_CHECK_DEADLINE: Duration = Duration::from_millis(800);
/// A record that could not be written is tried again this much later.
const SAVE_RETRY: Duration = Duration::from_secs(1);
/// Requests that may wait for one instance.
const QUEUE: usize = 256;

/// An operation in the journal. What recovery does with it stands in `recovery`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Operation {
    /// Undone: the client was never told of the instance.
    Create,
    /// Undone: the instance is stopped.
    Start,
    /// Finished.
    Stop,
    /// Finished.
    Delete,
    /// Undone before the state is committed: the guest goes on. Finished after.
    Standby,
    /// Undone before the machine is committed: still in standby. Finished after.
    Restore,
    /// Undone: the guest goes on.
    Capture,
}

impl Operation {
    /// Whether a machine that was running when it was cut goes on.
    pub(crate) fn spares_machine(self) -> bool {
        matches!(self, Self::Standby | Self::Restore | Self::Capture)
    }

    /// As it stands in the journal.
    pub(crate) fn encode(self) -> String {
        serde_json::to_string(&self).unwrap_or_default()
    }
}

type Reply<T> = oneshot::Sender<Result<T, EngineError>>;

/// What can be asked of a driver.
#[derive(Debug)]
pub(crate) enum Request {
    /// First boot, asked by the creation; a failure removes the instance.
    Boot(Reply<Arc<Instance>>),
    /// Boot again.
    Start(StartOverrides, Reply<Arc<Instance>>),
    /// Power off.
    Stop(Reply<Arc<Instance>>),
    /// Change what may change.
    Update(InstanceUpdate, Reply<Arc<Instance>>),
    /// Remove for good.
    Delete {
        /// Give the guest time to end.
        graceful: bool,
        /// Answer.
        reply: Reply<()>,
    },
    /// Keep memory and devices on disk and let the machine go.
    Standby(StandbyRequest, Reply<Arc<Instance>>),
    /// Go on from standby.
    Restore(Reply<Arc<Instance>>),
    /// Take the parts of a snapshot, when `permit` allows it.
    Capture {
        /// For the decision.
        command: Command,
        /// What they become.
        plan: Box<CapturePlan>,
        /// Answer.
        reply: Reply<Captured>,
    },
    /// Become what a snapshot holds.
    Rewind {
        /// Snapshot.
        snapshot: Snapshot,
        /// Keeps its parts, whatever becomes of the client.
        lease: Lease,
        /// In which state, on what.
        target: Target,
        /// Answer.
        reply: Reply<Arc<Instance>>,
    },
    /// First life of a fork, asked by its creation; a failure removes the instance.
    Hatch {
        /// What it is a copy of.
        parts: Snapshot,
        /// In which state it begins.
        target: InstanceState,
        /// Answer.
        reply: Reply<Arc<Instance>>,
    },
    /// Look at the sizes of the logs.
    RotateLogs,
}

/// A running machine.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) machine: Arc<dyn Machine>,
    pub(super) link: Link,
    /// What the guest said about the end of its program.
    pub(super) program_exit: Option<ExitReason>,
    /// Why the server ends this run itself, for people.
    pub(super) failure: Option<String>,
}

/// What a driver still does after an answer, before it takes the next request.
#[derive(Debug)]
pub(super) enum Owed {
    /// Record and journal do not say yet what was done.
    Books,
    /// An instance went to standby, and its machine is still to be ended.
    End(Arc<dyn Machine>),
}

/// The task's state. Its methods are spread over `boot`, `shutdown` and this file.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) shared: Arc<Shared>,
    pub(super) slot: Arc<Slot>,
    publish: watch::Sender<Arc<Instance>>,
    pub(super) record: InstanceRecord,
    pub(super) lifecycle: Lifecycle,
    pub(super) run: Option<Run>,
    pub(super) log: ActionLog,
    /// Keeps the memory image that the instance stands on: of its standby, or of what its machine maps.
    pub(super) memory: Option<Hold>,
    /// What was captured of this run last. It may be gone.
    pub(super) last_image: Option<String>,
    /// Whether the machine waits for space.
    stall: Stall,
    unsaved: bool,
    /// What is left to do of a command that was answered.
    pub(super) owed: Option<Owed>,
}

enum Wake {
    Request(Option<Request>),
    Link(LinkEvent),
    MachineGone,
    Expired,
    Check,
    SaveAgain,
    Closing,
}

/// Makes slot and driver of an instance; the driver starts with [`Driver::spawn`].
pub(super) fn prepare(
    shared: &Arc<Shared>,
    record: InstanceRecord,
    lifecycle: Lifecycle,
) -> (Driver, mpsc::Receiver<Request>) {
    let (requests, receiver) = mpsc::channel(QUEUE);
    let (publish, published) = watch::channel(view(&record, &lifecycle, Stall::No));
    let slot = Arc::new(Slot {
        id: record.id.clone(),
        name: record.name.clone(),
        requests,
        published,
        live: super::table::Live::default(),
        hurry: tokio::sync::Notify::new(),
    });
    let log = ActionLog::new(&shared.layout.logs(&record.id).join("hypeman.log"));
    let shared = Arc::clone(shared);
    let memory = record.memory_image().map(|image| shared.vault.hold(image));
    (
        Driver {
            shared,
            slot,
            publish,
            record,
            lifecycle,
            run: None,
            log,
            memory,
            last_image: None,
            stall: Stall::No,
            unsaved: false,
            owed: None,
        },
        receiver,
    )
}

fn view(record: &InstanceRecord, lifecycle: &Lifecycle, stall: Stall) -> Arc<Instance> {
    Arc::new(Instance {
        record: Arc::new(record.clone()),
        state: lifecycle.state(),
        // An agent that is silent because its machine stands still is no reason of its own.
        state_error: stall.reason().or_else(|| lifecycle.error()).map(str::to_owned),
    })
}

impl Driver {
    /// Lets the driver work until the instance is deleted or the server closes.
    pub(super) fn spawn(self, requests: mpsc::Receiver<Request>) {
        let tracker = self.shared.tasks.clone();
        tracker.spawn(self.work(requests));
    }

    async fn work(mut self, mut requests: mpsc::Receiver<Request>) {
        loop {
            let expiry = self.record.expires_at;
            let closing = self.shared.closing.clone();
            let unsaved = self.unsaved;
            // Not biased: a guest that floods with events must not keep requests from their turn.
            let wake = tokio::select! {
                () = closing.cancelled() => Wake::Closing,
                wake = next_of_run(self.run.as_mut()) => wake,
                request = requests.recv() => Wake::Request(request),
                () = until(expiry) => Wake::Expired,
                () = tokio::time::sleep(SAVE_RETRY), if unsaved => Wake::SaveAgain,
            };
            match wake {
                Wake::Closing | Wake::Request(None) => return,
                Wake::Request(Some(request)) => {
                    let gone = self.handle(request).await;
                    if gone {
                        return;
                    }
                    self.give_what_is_owed().await;
                }
                Wake::Link(event) => self.on_link(event).await,
                Wake::MachineGone => self.finish_run(None).await,
                Wake::Check => self.check_machine().await,
                Wake::SaveAgain => self.save().await,
                Wake::Expired => {
                    self.log.line("time to live is over: deleting");
                    match self.delete(true).await {
                        Ok(()) => return,
                        Err(error) => {
                            tracing::error!(instance = %self.record.id, %error, "expiry failed; trying again");
                            tokio::time::sleep(SAVE_RETRY).await;
                        }
                    }
                }
            }
        }
    }

    /// Carries a request out. `true` when the instance is gone.
    async fn handle(&mut self, request: Request) -> bool {
        match request {
            Request::Boot(reply) => {
                let outcome = self.boot(Operation::Create).await;
                // What could not be undone stays listed, and can be deleted again.
                let gone = outcome.is_err() && self.shared.table.get(&self.record.id).is_err();
                let _ = reply.send(outcome.map(|()| self.view()));
                return gone;
            }
            Request::Start(overrides, reply) => {
                let outcome = self.start(overrides).await.map(|()| self.view());
                let _ = reply.send(outcome);
            }
            Request::Stop(reply) => {
                let outcome = self.stop().await.map(|()| self.view());
                let _ = reply.send(outcome);
            }
            Request::Update(update, reply) => {
                let outcome = self.update(update).await.map(|()| self.view());
                let _ = reply.send(outcome);
            }
            Request::Delete { graceful, reply } => {
                let outcome = self.delete(graceful).await;
                let gone = outcome.is_ok();
                let _ = reply.send(outcome);
                return gone;
            }
            Request::Standby(request, reply) => {
                let outcome = self.standby(request).await.map(|()| self.view());
                let _ = reply.send(outcome);
            }
            Request::Restore(reply) => {
                let outcome = self.restore(None).await.map(|()| self.view());
                let _ = reply.send(outcome);
            }
            Request::Capture { command, plan, reply } => {
                let outcome = match permit(&self.lifecycle, command) {
                    Ok(()) => self.capture(*plan).await,
                    Err(refusal) => Err(refusal.into()),
                };
                let _ = reply.send(outcome);
            }
            Request::Rewind {
                snapshot,
                lease,
                target,
                reply,
            } => {
                let outcome = self.rewind(&snapshot, target).await.map(|()| self.view());
                drop(lease);
                let _ = reply.send(outcome);
            }
            Request::Hatch { parts, target, reply } => {
                let outcome = self.hatch(&parts, target).await;
                let gone = outcome.is_err() && self.shared.table.get(&self.record.id).is_err();
                let _ = reply.send(outcome.map(|()| self.view()));
                return gone;
            }
            Request::RotateLogs => self.rotate_logs().await,
        }
        false
    }

    async fn start(&mut self, overrides: StartOverrides) -> Result<(), EngineError> {
        permit(&self.lifecycle, Command::Start)?;
        if let Some(entrypoint) = overrides.entrypoint {
            self.record.entrypoint = Some(entrypoint);
        }
        if let Some(command) = overrides.command {
            self.record.command = Some(command);
        }
        self.boot(Operation::Start).await
    }

    async fn stop(&mut self) -> Result<(), EngineError> {
        permit(&self.lifecycle, Command::Stop)?;
        let entry = self.begin(Operation::Stop).await?;
        faults::point("stop.recorded");
        self.log.line("stop requested");
        self.take_down(Some(super::shutdown::STOP_GRACE)).await?;
        faults::point("stop.guest_down");
        self.finish_run(Some(entry)).await;
        faults::point("stop.committed");
        Ok(())
    }

    async fn update(&mut self, update: InstanceUpdate) -> Result<(), EngineError> {
        let now = Timestamp::now();
        if let Some(expiry) = update.expiry {
            if self.record.expires_at.is_some_and(|deadline| deadline <= now) {
                return Err(EngineError::Expired);
            }
            let mut changed = self.record.clone();
            changed.expires_at = expiry.deadline(now)?;
            self.commit(changed).await?;
        }
        Ok(())
    }

    /// Stores `changed` and publishes it; on failure nothing has changed.
    pub(super) async fn commit(&mut self, changed: InstanceRecord) -> Result<(), EngineError> {
        let document = changed.clone();
        self.shared
            .store
            .write(move |connection| hypeman_store::instances::update(connection, &document.id, &document))
            .await?;
        self.record = changed;
        self.publish();
        Ok(())
    }

    /// Records an intent before its first effect.
    pub(super) async fn begin(&self, operation: Operation) -> Result<i64, StoreError> {
        let id = self.record.id.clone();
        self.shared
            .store
            .write(move |connection| journal::begin(connection, &id, &operation.encode()))
            .await
    }

    async fn on_link(&mut self, event: LinkEvent) {
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
                    self.log.line(&format!("agent lost: {reason}"));
                    self.observe(&Observation::Unresponsive { reason });
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

    async fn on_report(&mut self, report: GuestEvent) {
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
                Ok(_) => self.check_machine().await,
                Err(_) => return,
            }
        }
    }

    /// Asks the VMM for a sign of life.
    async fn check_machine(&mut self) {
        let Some(run) = &self.run else { return };
        let answer = run.machine.run_state(VMM_CHECK_DEADLINE).await;
        let silent_vmm =
            matches!(&self.lifecycle, Lifecycle::Unknown { reason, .. } if reason.starts_with("the VMM"));
        match answer {
            Ok(state) => {
                self.note_stall(self.stall.seen(state));
                let served = self.record.run.as_ref().and_then(|run| run.served.as_deref());
                if served.is_some_and(|name| self.shared.paging.is_silent(name)) {
                    self.observe(&Observation::Unresponsive {
                        reason: "the VMM waits for memory: the pager that serves it does not answer"
                            .to_owned(),
                    });
                } else if silent_vmm {
                    self.observe(&Observation::Responsive);
                }
            }
            Err(error @ VmmError::Unresponsive { .. }) => {
                self.stall = Stall::No;
                self.observe(&Observation::Unresponsive {
                    reason: error.to_string(),
                });
            }
            // It lives, and nobody listens at its socket.
            Err(error @ VmmError::Io { .. }) => {
                self.stall = Stall::No;
                self.observe(&Observation::Unresponsive {
                    reason: format!("the VMM cannot be asked: {error}"),
                });
            }
            // Its end is reported by the process itself.
            Err(_) => {}
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

    /// Applies what was seen and publishes it when it matters; `false` when it was no news.
    pub(super) fn observe(&mut self, seen: &Observation) -> bool {
        let before = self.lifecycle.clone();
        self.lifecycle = before.clone().observe(seen);
        if !self.lifecycle.has_vmm() {
            self.stall = Stall::No;
        }
        let news = self.lifecycle != before;
        if news {
            self.record.phases.enter(self.lifecycle.state(), Timestamp::now());
            if self.lifecycle.state() != before.state() {
                self.log
                    .line(&format!("state {} -> {}", before.state(), self.lifecycle.state()));
            }
            self.publish();
        }
        news
    }

    pub(super) fn publish(&self) {
        let before = self.publish.send_replace(self.view());
        self.shared.table.changed();
        let state = self.lifecycle.state();
        if before.state != state {
            self.shared
                .events
                .publish(EventKind::Instance, &self.record.id, state.as_str());
        }
    }

    fn view(&self) -> Arc<Instance> {
        view(&self.record, &self.lifecycle, self.stall)
    }

    /// Stores the record; what can't be stored now is stored later.
    pub(super) async fn save(&mut self) {
        let document = self.record.clone();
        let saved = self
            .shared
            .store
            .write(move |connection| hypeman_store::instances::update(connection, &document.id, &document))
            .await;
        self.note_saved(saved);
    }

    /// Stores the record as the outcome of what was intended.
    pub(super) async fn settle(&mut self) {
        let saved = self.store_outcome().await;
        self.note_saved(saved);
    }

    /// Stores record and outcome in one commit.
    pub(super) async fn store_outcome(&self) -> Result<(), StoreError> {
        let document = self.record.clone();
        self.shared
            .store
            .write(move |connection| {
                hypeman_store::instances::update(connection, &document.id, &document)?;
                journal::clear(connection, &document.id)
            })
            .await
    }

    /// Finishes an operation whose answer need not wait for that: a crash before leaves its intent, which recovery
    /// finishes to the same end.
    async fn give_what_is_owed(&mut self) {
        match self.owed.take() {
            Some(Owed::Books) => self.settle().await,
            Some(Owed::End(machine)) => self.end_left(&machine).await,
            None => {}
        }
    }

    /// Removes the intent of an operation that has left no trace.
    pub(super) async fn clear_journal(&mut self) {
        let id = self.record.id.clone();
        let cleared = self
            .shared
            .store
            .write(move |connection| journal::clear(connection, &id))
            .await;
        self.note_saved(cleared);
    }

    pub(super) fn note_saved(&mut self, saved: Result<(), StoreError>) {
        self.unsaved = saved.is_err();
        if let Err(error) = saved {
            tracing::warn!(instance = %self.record.id, %error, "record not saved yet");
        }
    }
}

async fn next_of_run(run: Option<&mut Run>) -> Wake {
    let Some(run) = run else {
        return std::future::pending().await;
    };
    tokio::select! {
        biased;
        event = run.link.next() => Wake::Link(event),
        () = run.machine.exited() => Wake::MachineGone,
        () = tokio::time::sleep(VMM_CHECK_INTERVAL) => Wake::Check,
    }
}

/// Longest sleep of the runtime's timer wheel that is of use here; longer ones start again.
const LONGEST_SLEEP: Duration = Duration::from_secs(24 * 3600);

async fn until(deadline: Option<Timestamp>) {
    let Some(deadline) = deadline else {
        return std::future::pending().await;
    };
    loop {
        let left = deadline.as_millisecond() - Timestamp::now().as_millisecond();
        let Some(left) = u64::try_from(left).ok().filter(|&left| left > 0) else {
            return;
        };
        tokio::time::sleep(Duration::from_millis(left).min(LONGEST_SLEEP)).await;
    }
}

impl Expiry {
    /// The instant that this means, counted from `now`.
    pub(super) fn deadline(self, now: Timestamp) -> Result<Option<Timestamp>, EngineError> {
        match self {
            Self::Never => Ok(None),
            Self::At(instant) if instant > now => Ok(Some(instant)),
            Self::At(_) => Err(EngineError::invalid(
                "invalid_expires_at",
                "expires_at must lie in the future",
            )),
            Self::After(span) if span.is_zero() => Ok(None),
            Self::After(span) => now
                .checked_add(span)
                .map(Some)
                .map_err(|_| EngineError::invalid("invalid_ttl", "ttl is too long")),
        }
    }
}
