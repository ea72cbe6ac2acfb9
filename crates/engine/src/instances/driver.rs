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

use hypeman_core::instance::{Command, Lifecycle, Observation, permit};
use hypeman_guest_api::ExitReason;
use hypeman_vmm::Machine;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};

use super::action_log::ActionLog;
use super::added_memory::Added;
use super::link::{Link, LinkEvent};
use super::model::{Expiry, Instance, InstanceRecord, InstanceUpdate, StartOverrides};
use super::request::{Operation, Request};
use super::silence::Silence;
use super::stall::Stall;
use super::table::Slot;
use crate::events::EventKind;
use crate::shared::Shared;
use crate::snapshots::vault::Hold;
use crate::{EngineError, faults};

/// How often a VMM is asked for a sign of life while nothing else happens.
const VMM_CHECK_INTERVAL: Duration = Duration::from_secs(2);
/// A record that could not be written is tried again this much later.
const SAVE_RETRY: Duration = Duration::from_secs(1);
/// Requests that may wait for one instance.
const QUEUE: usize = 256;

/// A running machine.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) machine: Arc<dyn Machine>,
    pub(super) link: Link,
    /// What the guest said about the end of its program.
    pub(super) program_exit: Option<ExitReason>,
    /// Why the server ends this run itself, for people.
    pub(super) failure: Option<String>,
    /// The memory beside what it began with.
    pub(super) added: Added,
}

/// What a driver still does after an answer, before it takes the next request.
#[derive(Debug)]
pub(super) enum Owed {
    /// Record and journal do not say yet what was done.
    Books,
    /// An instance went to standby, and its machine is still to be ended.
    End(Arc<dyn Machine>),
}

/// The task's state. Its methods are spread over the files of the operations; `books` stores, `reports` hears what
/// a run tells.
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
    pub(super) stall: Stall,
    /// Whether the VMM answers its checks.
    pub(super) silence: Silence,
    pub(super) unsaved: bool,
    /// What is left to do of a command that was answered.
    pub(super) owed: Option<Owed>,
}

pub(super) enum Wake {
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
            silence: Silence::default(),
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
                Wake::Check => {
                    if let Some(seen) = self.check_machine().await {
                        self.free_stranded(seen).await;
                    }
                }
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
            if self.silence.may_be_asked() {
                self.give_memory().await;
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

    /// Applies what was seen and publishes it when it matters; `false` when it was no news.
    pub(super) fn observe(&mut self, seen: &Observation) -> bool {
        let before = self.lifecycle.clone();
        self.lifecycle = before.clone().observe(seen);
        if !self.lifecycle.has_vmm() {
            self.stall = Stall::No;
            self.silence = Silence::default();
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

    /// Finishes an operation whose answer need not wait for that: a crash before leaves its intent, which recovery
    /// finishes to the same end.
    async fn give_what_is_owed(&mut self) {
        match self.owed.take() {
            Some(Owed::Books) => self.settle().await,
            Some(Owed::End(machine)) => self.end_left(&machine).await,
            None => {}
        }
    }
}

pub(super) async fn next_of_run(run: Option<&mut Run>) -> Wake {
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
