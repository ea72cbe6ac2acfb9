//! What the pagers of this server do: for people, and never in the way of a machine.
//!
//! A pager that is known to be silent is not asked. Of it, and of one that does not answer in time, what was heard last
//! is told.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hypeman_pager::{
    CacheStats, Condition, Health, Latency, MachineReport, MachineState, PagerClient, Stats,
};

use crate::layout;
use crate::paging::DIRECTORY;
use crate::shared::Shared;

/// How long a pager may take to tell its numbers.
const PATIENCE: Duration = Duration::from_secs(2);

/// A pager that this server knows: its own, or an older one that ends with its last machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagerReport {
    /// The release that started it.
    pub version: String,
    /// Its process.
    pub pid: i32,
    /// Whether it takes no more machines.
    pub draining: bool,
    /// Its numbers; absent when it did not answer.
    pub numbers: Option<PagerNumbers>,
    /// The machines that it knows.
    pub machines: Vec<PagedMachine>,
}

/// Numbers of a pager.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PagerNumbers {
    /// How long the oldest unanswered fault has waited.
    pub oldest_fault: Duration,
    /// The pieces of memory images that it keeps in RAM.
    pub cache: CacheStats,
}

/// A machine whose memory comes from a pager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PagedMachine {
    /// The instance that it is the machine of.
    pub instance_id: String,
    /// Its name, when it is there still.
    pub instance_name: Option<String>,
    /// What became of it.
    pub state: MachineState,
    /// Its numbers; absent when the pager did not answer.
    pub numbers: Option<MachineNumbers>,
}

/// Numbers of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineNumbers {
    /// The size of its memory, bytes, if its pager is new enough to say so.
    pub memory_bytes: Option<u64>,
    /// How much of it is there, bytes, likewise.
    pub populated_bytes: Option<u64>,
    /// Faults that were answered.
    pub faults: u64,
    /// Pages that came with those answers.
    pub faulted_pages: u64,
    /// Pages that were there before anybody asked.
    pub fetched_pages: u64,
    /// How long answers took; absent before the first, and likewise.
    pub latency: Option<Latency>,
}

impl From<&MachineReport> for MachineNumbers {
    fn from(report: &MachineReport) -> Self {
        Self {
            memory_bytes: report.memory_bytes,
            populated_bytes: report.populated_bytes,
            faults: report.faults,
            faulted_pages: report.faulted_pages,
            fetched_pages: report.fetched_pages,
            latency: report.latency,
        }
    }
}

/// Where the sockets of pagers lie that serve this data directory.
#[must_use]
pub fn pager_directory(data_directory: &Path) -> PathBuf {
    layout::runtime_of(data_directory).join(DIRECTORY)
}

/// All pagers, those that take machines first.
pub(crate) async fn report(shared: &Shared) -> Vec<PagerReport> {
    let asked = shared
        .paging
        .clients()
        .into_iter()
        .map(|client: Arc<PagerClient>| async move {
            let answer = ask(&client).await;
            (client, answer)
        });
    let mut reports: Vec<PagerReport> = futures::future::join_all(asked)
        .await
        .into_iter()
        .map(|(client, answer)| told(shared, &client, answer))
        .collect();
    reports.sort_by_key(|report| (report.draining, report.pid));
    reports
}

async fn ask(client: &PagerClient) -> Option<(Stats, Health)> {
    if *client.condition().borrow() != Condition::Well {
        return None;
    }
    let asked = async { Ok::<_, hypeman_pager::PagerError>((client.stats().await?, client.health().await?)) };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(answer)) => Some(answer),
        Ok(Err(error)) => {
            tracing::warn!(pid = client.pid(), %error, "a pager does not tell its numbers");
            None
        }
        Err(_) => None,
    }
}

fn told(shared: &Shared, client: &PagerClient, answer: Option<(Stats, Health)>) -> PagerReport {
    let (numbers, mut machines) = match answer {
        Some((stats, health)) => {
            let machines = stats.machines.iter().map(|report| {
                let numbers = Some(MachineNumbers::from(report));
                machine(shared, &report.machine, report.state.clone(), numbers)
            });
            let numbers = PagerNumbers {
                oldest_fault: Duration::from_millis(health.oldest_fault_ms),
                cache: stats.cache,
            };
            (Some(numbers), machines.collect::<Vec<_>>())
        }
        None => {
            let last_heard = |name: &String| Some(machine(shared, name, client.machine(name)?, None));
            (None, client.known().iter().filter_map(last_heard).collect())
        }
    };
    machines.sort_by(|one, other| one.instance_id.cmp(&other.instance_id));
    PagerReport {
        version: client.hello().release.clone(),
        pid: client.pid(),
        draining: client.is_draining(),
        numbers,
        machines,
    }
}

/// A machine by its name at a pager, which is the instance's with something random.
fn machine(
    shared: &Shared,
    name: &str,
    state: MachineState,
    numbers: Option<MachineNumbers>,
) -> PagedMachine {
    let instance_id = name.rsplit_once('-').map_or(name, |(instance, _)| instance);
    let slot = shared.table.get(instance_id).ok();
    PagedMachine {
        instance_id: instance_id.to_owned(),
        instance_name: slot.map(|slot| slot.published.borrow().record.name.clone()),
        state,
        numbers,
    }
}
