//! Standby and back: the guest's memory and devices go to disk, its machine goes away; later both return.
//!
//! ```text
//!  standby:  journal, beside it ─┬─► pause ─► devices, memory image ─► manifest ─► COMMIT ─► answer ─► kill,
//!            hold the workload ──┘                                        │                  detach, journal cleared
//!               └──────── failure or crash: the guest goes on ────────────┘      └── crash: finished at the next start
//!
//!  wake:     journal, beside it ─────┬─► TAP ─► VMM, paused ─► COMMIT ─► resume ─► agent ─► answer ─► cleared
//!            manifest, memory checked ┘                            │
//!               └──────── failure or crash: still in standby ──────┘      └── crash: adopted and resumed
//! ```
//!
//! Invariant: from its commit on, a wake never goes back to standby. The guest may have run, its disk may have
//! changed, and memory and disk would no longer belong to one instant.
//!
//! A fork wakes without a commit of its own: until it has confirmed who it is, a crash undoes its creation as a whole.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hypeman_core::Undo;
use hypeman_core::instance::{Command, Observation, permit};
use hypeman_core::snapshot::choose_delay;
use hypeman_guest_api::AgentKey;
use hypeman_vmm::{Machine, Restore};
use jiff::Timestamp;

use super::added_memory::Added;
use super::boot::{guest_config, kill, machine_spec};
use super::driver::{Driver, Owed, Run};
use super::instant::{Moment, Order};
use super::link::{Link, Welcome};
use super::loadable::{Diligence, Loadable, Parts};
use super::model::{InstanceRecord, RunRecord, StandbyRecord};
use super::request::Operation;
use crate::blocking::{blocking, blocking_io};
use crate::layout::make_private;
use crate::snapshots::state;
use crate::snapshots::vault::{Frozen, Hold, Kept};
use crate::snapshots::{CompressionChoice, CompressionState, MemoryRecord, StandbyRequest};
use crate::{EngineError, durable, faults};

/// How long a restore waits for the guest's agent before it answers with what is so far.
pub(super) const AGENT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a copy may take to confirm who it is now.
const IDENTITY_PATIENCE: Duration = Duration::from_secs(60);
/// How long a restored guest has a processor for itself. One that has not answered by then waits among the others.
const WELCOME_TURN: Duration = Duration::from_secs(5);

/// What the journal holds of a wake before it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Intent {
    /// Nothing yet.
    Unrecorded,
    /// The creation of the fork that wakes.
    Creation,
}

impl Driver {
    /// Puts a running instance to standby.
    pub(super) async fn standby(&mut self, request: StandbyRequest) -> Result<(), EngineError> {
        permit(&self.lifecycle, Command::Standby)?;
        self.log.line("standby requested");
        let machine = match &self.run {
            Some(run) => Arc::clone(&run.machine),
            None => return Err(EngineError::InvalidState("the instance has no machine".into())),
        };
        let compression = self.shared.compression(&self.record, request.compression);
        let policy = self.record.snapshot_policy.as_ref();
        let delay = policy.and_then(|policy| policy.standby_compression_delay);
        let delay = Some(choose_delay(request.compression_delay, delay)).filter(|delay| !delay.is_zero());
        let held = self.begin_held(Operation::Standby, "standby.recorded").await?;
        faults::point("standby.held");
        match self.suspend(&machine, compression, delay).await {
            Ok((changed, hold)) => {
                self.leave(machine, changed, hold);
                Ok(())
            }
            Err(error) => {
                self.log.line(&format!("standby failed: {error}"));
                let held = self.note_cut(&machine, held);
                match machine.resume().await {
                    Ok(()) => {
                        self.observe(&Observation::Resumed);
                        self.give_memory().await;
                        self.let_go(held).await;
                    }
                    // Its end, or its silence, is noticed by itself.
                    Err(resume) => {
                        tracing::error!(instance = %self.record.id, %resume, "not resumed");
                        self.leave_still(held);
                    }
                }
                self.clear_journal().await;
                Err(error)
            }
        }
    }

    /// Takes back what memory was added, pauses the guest, makes its state durable, and commits it.
    async fn suspend(
        &mut self,
        machine: &Arc<dyn Machine>,
        compression: CompressionChoice,
        delay: Option<Duration>,
    ) -> Result<(InstanceRecord, Hold), EngineError> {
        let identity = self.state_identity(machine).await?;
        self.take_memory_back(machine).await?;
        faults::point("standby.given_back");
        machine.pause().await?;
        self.observe(&Observation::Paused);
        faults::point("standby.paused");
        let name = format!(
            "standby-{}",
            crate::random::hex::<8>().map_err(|error| EngineError::io("random name", error))?
        );
        let directory = self.shared.layout.standby(&self.record.id, &name);
        let made = directory.clone();
        let made = Undo::by(move || durable::discard(&made));
        let agent_key = self.record.run.as_ref().map(|run| run.agent_key.clone());
        let (devices, kept) = self.keep_all(machine, directory.clone()).await?;
        let facts = self.facts(identity, &kept);
        let manifest = blocking(move || state::seal(&directory, facts, devices)).await?;
        faults::point("standby.devices");
        let mut changed = self.record.clone();
        changed.standby = Some(StandbyRecord {
            directory: name,
            manifest,
            memory: MemoryRecord {
                image: kept.image,
                bytes: kept.content_bytes,
                compression,
                state: CompressionState::None,
                agent_key: agent_key.unwrap_or_default(),
            },
            foreign: false,
            compress_after: delay.and_then(|delay| Timestamp::now().checked_add(delay).ok()),
        });
        let document = changed.clone();
        self.shared
            .store
            .write(move |connection| hypeman_store::instances::update(connection, &document.id, &document))
            .await?;
        made.forget();
        faults::point("standby.committed");
        Ok((changed, kept.hold))
    }

    /// Devices and memory of a paused machine, at the same time where the VMM leaves memory alone meanwhile. What is being
    /// written is done when this returns, also where it fails: the guest goes on then.
    async fn keep_all(
        &self,
        machine: &Arc<dyn Machine>,
        directory: PathBuf,
    ) -> Result<(state::Devices, Kept), EngineError> {
        let served = self.record.run.as_ref().and_then(|run| run.served.as_deref());
        let moment = Moment {
            save: async { machine.save_devices().await.map_err(EngineError::from) },
            keep: move |devices: Vec<u8>| {
                blocking(move || {
                    make_private(&directory)?;
                    state::write_devices(&directory, &devices)
                })
            },
            settle: self.shared.paging.settle(served),
            // What is served is seen in the memory itself, which is opened only now.
            memory: move |_served: bool| self.keep_memory(machine),
            // It stays the instance's.
            disk: std::future::ready(Ok(())),
        };
        moment.take(Order::of(&**machine)).await
    }

    /// Makes the memory of a machine that stands still an image.
    async fn keep_memory(&self, machine: &Arc<dyn Machine>) -> Result<Kept, EngineError> {
        let memory = machine.guest_memory().await?;
        let frozen = blocking_io("look at guest memory", move || Frozen::live(memory)).await?;
        let kept = self
            .shared
            .vault
            .keep(self.record.memory_bytes, self.lineage(), frozen)
            .await;
        faults::point("standby.memory");
        kept
    }

    /// The state is safe: the machine may go. Paused as it is it does nothing any more, so nobody waits for its end but
    /// whoever wants something of the instance next.
    fn leave(&mut self, machine: Arc<dyn Machine>, changed: InstanceRecord, hold: Hold) {
        self.record = changed;
        self.memory = Some(hold);
        self.reach_standby();
        self.owed = Some(Owed::End(machine));
    }

    /// Ends the machine that an instance in standby has left.
    pub(super) async fn end_left(&mut self, machine: &Arc<dyn Machine>) {
        while let Err(error) = kill(machine).await {
            // Its disk is not the instance's before that. A server that closes leaves it to the next one.
            tracing::error!(instance = %self.record.id, %error, "the machine that was left does not end");
            if self.shared.closing.is_cancelled() {
                return;
            }
        }
        self.finish_standby().await;
    }

    /// Cleans up behind a machine that has ended and whose state is committed. Also what recovery does after a crash.
    pub(super) async fn finish_standby(&mut self) {
        self.detach().await;
        faults::point("standby.detached");
        self.reach_standby();
        self.settle().await;
        self.log.line("in standby");
        if let Some(standby) = &self.record.standby {
            self.shared
                .vault
                .want(&standby.memory, standby.compress_after, None);
        }
        self.publish();
    }

    fn reach_standby(&mut self) {
        self.run = None;
        self.last_image = None;
        self.slot.live.set_client(None);
        self.slot.live.set_machine(None);
        self.record.run = None;
        self.record.stopped_at.get_or_insert_with(Timestamp::now);
        self.observe(&Observation::StandbyReached);
    }

    /// Brings an instance back from standby. Its journal entry is owed: see [`Driver::give_what_is_owed`].
    /// `ready`: its state was examined already.
    pub(super) async fn restore(&mut self, ready: Option<Loadable>) -> Result<(), EngineError> {
        permit(&self.lifecycle, Command::Restore)?;
        self.log.line("restore requested");
        let outcome = self.wake(Intent::Unrecorded, ready).await;
        if outcome.is_err() && self.run.is_none() {
            self.clear_journal().await;
            self.publish();
        }
        outcome
    }

    /// From standby to a guest that runs, and knows who it is. On an error before the commit the instance is in standby
    /// as before.
    pub(super) async fn wake(&mut self, intent: Intent, ready: Option<Loadable>) -> Result<(), EngineError> {
        if let Err(error) = self.load(intent, ready).await {
            self.log.line(&format!("restore failed: {error}"));
            if self.record.standby.is_some()
                && let Err(alive) = self.undo_launch().await
            {
                tracing::error!(instance = %self.record.id, %alive, "left for recovery");
            }
            return Err(error);
        }
        self.go_on().await?;
        // Of a fork its creation stores the outcome: nobody is told of what a crash could still undo.
        self.owed = (intent == Intent::Unrecorded).then_some(Owed::Books);
        Ok(())
    }

    /// Up to a paused machine with the captured state in it, committed as this instance's. `ready`: it was examined
    /// already.
    async fn load(&mut self, intent: Intent, ready: Option<Loadable>) -> Result<(), EngineError> {
        let shared = Arc::clone(&self.shared);
        let standby = self
            .record
            .standby
            .clone()
            .ok_or_else(|| EngineError::InvalidState("the instance has no kept memory".into()))?;
        let vmm = shared.vmm(self.record.hypervisor)?;
        let parts = Parts::of_standby(&shared.layout, &self.record.id, &standby);
        let recorded = async {
            if intent == Intent::Unrecorded {
                self.begin(Operation::Restore).await?;
                faults::point("restore.recorded");
            }
            Ok(())
        };
        let examined = async {
            match ready {
                Some(ready) => Ok(ready),
                None => self.examine(&self.record, &parts, Diligence::AsItComes).await,
            }
        };
        // Neither has an effect; together they take as long as the longer one.
        let ((), loadable) = tokio::try_join!(recorded, examined)?;
        let Loadable {
            identity,
            devices,
            artifacts,
            memory,
        } = loadable;
        let image = shared.images.bootable(&self.record.image_digest)?;
        make_private(&shared.layout.instance_runtime(&self.record.id))?;
        make_private(&shared.layout.logs(&self.record.id))?;
        faults::point("restore.memory");
        self.attach().await?;
        faults::point("restore.network");
        let mut spec = machine_spec(&shared, &self.record, artifacts.kernel, artifacts.initramfs);
        spec.memory = memory.backing();
        let turn = shared
            .launches
            .acquire()
            .await
            .map_err(|_| EngineError::ShuttingDown)?;
        let restore = Restore {
            identity,
            device_state: devices,
            patch: memory.patch(),
        };
        let machine: Arc<dyn Machine> = tokio::select! {
            machine = vmm.restore(&spec, restore) => Arc::from(machine?),
            // It would wait for its memory in vain.
            reason = memory.failed() => return Err(EngineError::RestoreFailed(reason)),
        };
        drop(turn);
        self.slot.live.set_machine(Some(Arc::clone(&machine)));
        faults::point("restore.launched");

        let former = standby.memory.agent_key.clone();
        let agent_key = if standby.foreign {
            crate::random::hex::<32>().map_err(|error| EngineError::io("random key", error))?
        } else {
            former.clone()
        };
        let mut started = self.record.clone();
        started.standby = None;
        started.run = Some(RunRecord {
            process: machine.process().clone(),
            agent_key,
            base: Some(standby.memory.image.clone()),
            former_key: standby.foreign.then_some(former),
            identity: machine.state_identity().cloned(),
            jail: machine.jail().cloned(),
            served: memory.name(),
        });
        started.started_at = Some(Timestamp::now());
        started.stopped_at = None;
        started.exit = None;
        if intent == Intent::Unrecorded {
            let document = started.clone();
            shared
                .store
                .write(move |connection| {
                    hypeman_store::instances::update(connection, &document.id, &document)
                })
                .await?;
        }
        faults::point("restore.committed");
        memory.keep();
        self.record = started;
        let link = self.link_to(&machine, &image, true, false);
        self.run = Some(Run {
            machine,
            link,
            program_exit: None,
            failure: None,
            added: Added::Withheld,
        });
        // Its workload stands still until its guest was welcomed, also where nobody else may use the agent.
        self.observe(&Observation::Restored { without_agent: false });
        // The guest need not wait for this.
        let consumed = shared.layout.standby(&self.record.id, &standby.directory);
        shared.tasks.spawn_blocking(move || durable::discard(&consumed));
        Ok(())
    }

    /// The connection to the agent of a machine that goes on from a captured state.
    pub(super) fn link_to(
        &self,
        machine: &Arc<dyn Machine>,
        image: &crate::images::RuntimeConfig,
        stood_still: bool,
        was_reached: bool,
    ) -> Link {
        let key_of = |text: &str| AgentKey(crate::random::key_from_hex(text).unwrap_or_default());
        let run = self.record.run.as_ref();
        let key = run.map_or_else(|| key_of(""), |run| key_of(&run.agent_key));
        let former = run.and_then(|run| run.former_key.as_deref()).map(key_of);
        let welcome = match former {
            Some(former_key) => Welcome::Identity { former_key },
            None if stood_still => Welcome::Time,
            None => Welcome::Nothing,
        };
        let config = guest_config(&self.shared, &self.record, image, key.clone());
        Link::resume(machine, key, config, welcome, was_reached)
    }

    /// Lets the vCPUs run and waits until the guest has answered.
    async fn go_on(&mut self) -> Result<(), EngineError> {
        let Some(run) = &self.run else {
            return Err(EngineError::InvalidState("the instance has no machine".into()));
        };
        let machine = Arc::clone(&run.machine);
        let shared = Arc::clone(&self.shared);
        let turn = shared
            .welcomes
            .acquire()
            .await
            .map_err(|_| EngineError::ShuttingDown)?;
        if let Err(error) = machine.resume().await {
            self.end_run(format!("the restored machine could not go on: {error}"))
                .await;
            return Err(error.into());
        }
        faults::point("restore.resumed");
        self.give_memory().await;
        let foreign = self
            .record
            .run
            .as_ref()
            .is_some_and(|run| run.former_key.is_some());
        let patience = if foreign {
            IDENTITY_PATIENCE
        } else {
            AGENT_PATIENCE
        };
        self.await_agent(WELCOME_TURN).await;
        drop(turn);
        self.await_agent(patience).await;
        if self.run.is_none() {
            let message = self.record.exit.as_ref().map(|exit| exit.message.clone());
            return Err(EngineError::RestoreFailed(message.unwrap_or_default()));
        }
        if foreign && self.slot.live.client().is_none() {
            let reason = "the guest did not confirm its new identity".to_owned();
            self.end_run(reason.clone()).await;
            return Err(EngineError::RestoreFailed(reason));
        }
        faults::point("restore.confirmed");
        self.log.line("restored");
        self.publish();
        Ok(())
    }
}
