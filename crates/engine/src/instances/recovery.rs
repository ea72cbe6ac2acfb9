//! After a crash, an upgrade or a reboot: every instance is either running under our control or cleanly gone.
//!
//! | journal says | found            | what is done                                    |
//! |--------------|------------------|-------------------------------------------------|
//! | create       | anything         | undone: processes, TAP, files and record go      |
//! | start        | anything         | undone: processes and TAP go, it is stopped      |
//! | stop         | anything         | finished: processes and TAP go, it is stopped    |
//! | delete       | anything         | finished: all of it goes                         |
//! | standby      | state committed  | finished: processes and TAP go, it is in standby |
//! | standby      | not committed    | undone: the machine goes on                      |
//! | restore      | machine committed| finished: the machine goes on                    |
//! | restore      | not committed    | undone: processes and TAP go, it is in standby   |
//! | capture      | anything         | undone: the machine goes on                      |
//! | nothing      | VMM lives        | adopted, whatever the server's version           |
//! | nothing      | VMM recorded, gone | it is stopped, and says why                    |
//! | nothing      | no record, files | files go, as do templates of layers nobody has   |

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use hypeman_core::instance::{InstanceState, Lifecycle, Observation, UnknownCause};
use hypeman_store::journal;
use hypeman_vmm::{Machine, VmmError};
use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::added_memory::Added;
use super::boot::{adoption_spec, kill_leftovers};
use super::disks::sweep_templates;
use super::driver::{self, Driver, Run};
use super::model::InstanceRecord;
use super::request::{Operation, Request};
use super::shutdown::exit_unseen;
use crate::shared::Shared;
use crate::{EngineError, durable};

/// How long the start waits for agents of adopted machines, so that the first request finds them running.
const AGENT_PATIENCE: Duration = Duration::from_secs(2);

/// Brings all stored instances back. Returns when the API may answer.
pub(crate) async fn recover(shared: &Arc<Shared>) -> Result<(), EngineError> {
    let records: Vec<InstanceRecord> = shared.store.read(hypeman_store::instances::all)?;
    // Pagers before machines: what became of those is known then.
    let runs = records.iter().filter_map(|record| record.run.as_ref());
    shared
        .paging
        .adopt(&runs.filter_map(|run| run.served.as_deref()).collect())
        .await;
    let mut intents: HashMap<String, Operation> = HashMap::new();
    for entry in shared.store.read(journal::all)? {
        match serde_json::from_str(&entry.operation) {
            // A later intent, such as a delete during a stop, overrules the earlier.
            Ok(operation) => drop(intents.insert(entry.subject, operation)),
            Err(error) => tracing::error!(subject = entry.subject, %error, "unreadable journal entry"),
        }
    }
    let known: HashSet<String> = records.iter().map(|record| record.id.clone()).collect();
    let sizes: HashSet<u64> = records.iter().map(|record| record.overlay_bytes).collect();
    let taps = keep_taps(&records, &intents);
    let networked = records.iter().any(|record| record.network.is_some());
    for record in &records {
        shared.images.retain(&record.image_digest);
        shared.hold_address(record);
        if let Some(standby) = &record.standby {
            shared.vault.learn(&standby.memory.image);
            shared.vault.want(&standby.memory, standby.compress_after, None);
        }
        if let Err(error) = sweep_instance(shared, record)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(instance = record.id, %error, "former files not removed");
        }
    }

    let mut adopted = Vec::new();
    let mut work = JoinSet::new();
    for record in records {
        let (shared, intent) = (Arc::clone(shared), intents.get(&record.id).copied());
        work.spawn(async move {
            match recover_one(&shared, record.clone(), intent).await {
                Ok(recovered) => recovered,
                Err(error) => Some(unclear(&shared, record, &error)),
            }
        });
    }
    while let Some(done) = work.join_next().await {
        let recovered = done.map_err(|error| EngineError::io("recovery", error.into()))?;
        if let Some((driver, requests)) = recovered {
            shared.table.insert(Arc::clone(&driver.slot))?;
            if driver.run.is_some() {
                adopted.push(driver.slot.published.clone());
            }
            driver.spawn(requests);
        }
    }
    if networked && let Ok(network) = shared.network().await {
        match network.reconcile(&taps).await {
            Ok(removed) if removed.is_empty() => {}
            Ok(removed) => tracing::info!(?removed, "removed TAPs of machines that are gone"),
            Err(error) => tracing::error!(%error, "TAPs of machines that are gone were not removed"),
        }
    }
    if let Err(error) = sweep(shared, &known, &sizes) {
        tracing::error!(%error, "leftovers of instances that are gone were not removed");
    }
    let ready = adopted.into_iter().map(|mut published| async move {
        let _ = published
            .wait_for(|instance| instance.state != InstanceState::Initializing)
            .await;
    });
    let _ = tokio::time::timeout(AGENT_PATIENCE, futures::future::join_all(ready)).await;
    Ok(())
}

/// Removes the layers and states in an instance's directory that its record does not name.
fn sweep_instance(shared: &Shared, record: &InstanceRecord) -> std::io::Result<()> {
    let overlay = shared.layout.overlay(&record.id, record.disk_generation);
    let standby = record.standby.as_ref().map(|standby| standby.directory.as_str());
    for entry in std::fs::read_dir(shared.layout.instance(&record.id))? {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        let stale_layer = name.starts_with("overlay.") && entry.path() != overlay;
        let stale_state = name.starts_with("standby-") && standby != Some(&*name);
        if stale_layer || stale_state {
            durable::remove_tree(&entry.path())?;
        }
    }
    Ok(())
}

fn keep_taps(records: &[InstanceRecord], intents: &HashMap<String, Operation>) -> BTreeSet<String> {
    records
        .iter()
        .filter(|record| {
            record.run.is_some()
                && intents
                    .get(&record.id)
                    .is_none_or(|intent| intent.spares_machine())
        })
        .filter_map(|record| record.network.as_ref().map(|network| network.tap.clone()))
        .collect()
}

/// An instance whose recovery failed must not keep the others from theirs. Its journal entry stays; stopping or
/// deleting it tries again, as does the next start.
fn unclear(
    shared: &Arc<Shared>,
    record: InstanceRecord,
    error: &EngineError,
) -> (Driver, mpsc::Receiver<Request>) {
    tracing::error!(instance = record.id, %error, "recovery failed");
    let reason = format!("it could not be recovered after a restart of the server: {error}");
    let lifecycle = Lifecycle::Unknown {
        cause: UnknownCause::Leftover,
        reason,
        before: Box::new(Lifecycle::ShuttingDown),
    };
    driver::prepare(shared, record, lifecycle)
}

type Recovered = Option<(Driver, mpsc::Receiver<Request>)>;

async fn recover_one(
    shared: &Arc<Shared>,
    record: InstanceRecord,
    intent: Option<Operation>,
) -> Result<Recovered, EngineError> {
    match intent {
        Some(operation @ (Operation::Create | Operation::Delete)) => {
            tracing::info!(
                instance = record.id,
                ?operation,
                "finishing what was cut: removing"
            );
            kill_leftovers(shared, &record).await?;
            let (mut driver, _) = driver::prepare(shared, record, Lifecycle::Stopped);
            driver.detach().await;
            driver.forget().await?;
            Ok(None)
        }
        Some(operation @ (Operation::Start | Operation::Stop)) => {
            tracing::info!(
                instance = record.id,
                ?operation,
                "finishing what was cut: stopping"
            );
            kill_leftovers(shared, &record).await?;
            stopped(shared, record).await.map(Some)
        }
        Some(Operation::Standby) if record.standby.is_some() => {
            tracing::info!(instance = record.id, "finishing what was cut: standby");
            kill_leftovers(shared, &record).await?;
            let (mut driver, requests) = driver::prepare(shared, record, Lifecycle::ShuttingDown);
            driver.finish_standby().await;
            Ok(Some((driver, requests)))
        }
        Some(Operation::Restore) if record.run.is_none() => {
            tracing::info!(instance = record.id, "undoing what was cut: restore");
            kill_leftovers(shared, &record).await?;
            stopped(shared, record).await.map(Some)
        }
        Some(operation @ (Operation::Standby | Operation::Restore | Operation::Capture)) => {
            tracing::info!(instance = record.id, ?operation, "going on after what was cut");
            match adopt(shared, &record).await? {
                Some(machine) => {
                    machine.resume().await?;
                    let (mut driver, requests) = running(shared, record, machine, true);
                    driver.clear_journal().await;
                    Ok(Some((driver, requests)))
                }
                None => stopped(shared, record).await.map(Some),
            }
        }
        None => match adopt(shared, &record).await? {
            Some(machine) => Ok(Some(running(shared, record, machine, false))),
            None => stopped(shared, record).await.map(Some),
        },
    }
}

async fn adopt(
    shared: &Arc<Shared>,
    record: &InstanceRecord,
) -> Result<Option<Arc<dyn Machine>>, EngineError> {
    let Some(run) = &record.run else { return Ok(None) };
    let vmm = shared.vmm(record.hypervisor)?;
    let spec = adoption_spec(shared, record);
    match vmm.adopt(&spec, &run.process, run.identity.as_ref()).await {
        Ok(machine) => {
            let machine: Arc<dyn Machine> = Arc::from(machine);
            if let Some(name) = &run.served
                && let Some(reason) = shared.paging.abandoned(name, &machine).await
            {
                tracing::error!(
                    instance = record.id,
                    reason,
                    "a machine without its memory is killed"
                );
                machine.kill().await?;
                return Ok(None);
            }
            Ok(Some(machine))
        }
        Err(VmmError::Gone) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A driver for a machine that runs. `stood_still`: it did not all the time.
fn running(
    shared: &Arc<Shared>,
    record: InstanceRecord,
    machine: Arc<dyn Machine>,
    stood_still: bool,
) -> (Driver, mpsc::Receiver<Request>) {
    let image = shared.images.bootable(&record.image_digest).unwrap_or_default();
    let without_agent = record.skip_guest_agent;
    let was_reached = matches!(
        record.phases.current(),
        InstanceState::Running | InstanceState::Unknown
    );
    let (mut driver, requests) = driver::prepare(shared, record, Lifecycle::Stopped);
    let link = driver.link_to(&machine, &image, stood_still, was_reached);
    driver.slot.live.set_machine(Some(Arc::clone(&machine)));
    driver.run = Some(Run {
        machine,
        link,
        program_exit: None,
        failure: None,
        added: Added::Withheld,
    });
    driver.log.line("the server is back: adopted");
    driver.lifecycle = Lifecycle::Stopped.observe(&Observation::Launched { without_agent });
    driver.publish();
    (driver, requests)
}

/// A driver for an instance without a machine, and the record of how that came to be.
async fn stopped(
    shared: &Arc<Shared>,
    mut record: InstanceRecord,
) -> Result<(Driver, mpsc::Receiver<Request>), EngineError> {
    let id = record.id.clone();
    if let Some(run) = record.run.take() {
        let rebooted = hypeman_vmm::boot_id().is_ok_and(|boot| boot != run.process.boot_id);
        record.exit = Some(exit_unseen(rebooted));
        record.stopped_at = Some(Timestamp::now());
    }
    let lifecycle = match record.standby {
        Some(_) => Lifecycle::Standby,
        None => Lifecycle::Stopped,
    };
    record.phases.enter(lifecycle.state(), Timestamp::now());
    let document = record.clone();
    shared
        .store
        .write(move |connection| {
            hypeman_store::instances::update(connection, &id, &document)?;
            journal::clear(connection, &id)
        })
        .await?;
    let (mut driver, requests) = driver::prepare(shared, record, lifecycle);
    driver.detach().await;
    Ok((driver, requests))
}

/// Removes files and sockets that belong to no instance.
fn sweep(shared: &Shared, known: &HashSet<String>, sizes: &HashSet<u64>) -> std::io::Result<()> {
    for directory in [shared.layout.instances(), shared.layout.runtime().to_owned()] {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            if !entry
                .file_name()
                .to_str()
                .is_some_and(|name| known.contains(name) || name == crate::paging::DIRECTORY)
            {
                durable::remove_tree(&entry.path())?;
            }
        }
    }
    sweep_templates(&shared.layout.overlay_templates(), sizes)
}
