//! Who serves page faults of machines, what those machines have of their memory, and how fast they got it.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A process that serves page faults of machines from stored memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pager {
    /// The release that started it.
    pub version: String,
    /// Its process.
    pub pid: i32,
    /// Whether it takes no more machines and ends with its last one.
    pub draining: bool,
    /// Whether it answered now. If not, its machines stand still at their next fault, and its numbers are absent.
    pub answering: bool,
    /// How long the oldest unanswered fault has waited, milliseconds; 0 when there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub oldest_fault_ms: Option<i64>,
    /// The parts of memory images that it keeps in RAM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub cache: Option<PagerCache>,
    /// The machines that it knows, by the ids of their instances.
    pub machines: Vec<PagerMachine>,
}

/// Parts of memory images that are kept in RAM for all machines.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PagerCache {
    /// What they take now, bytes.
    pub bytes: i64,
    /// What they may take, bytes.
    pub bound_bytes: i64,
    /// How often a part was there.
    pub hits: i64,
    /// How often one had to be read.
    pub misses: i64,
    /// What was read from stored memory, bytes, compressed where it is.
    pub read_bytes: i64,
}

/// A machine whose memory comes from a pager. Numbers that its pager does not tell are absent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PagerMachine {
    /// Id of its instance.
    pub instance_id: String,
    /// Name of its instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub instance_name: Option<String>,
    /// How far it is.
    pub state: PagerMachineState,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reason: Option<String>,
    /// The size of its memory, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub memory_bytes: Option<i64>,
    /// How much of its memory is there, bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub populated_bytes: Option<i64>,
    /// Faults that were answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub faults: Option<i64>,
    /// Pages that came with those answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub faulted_pages: Option<i64>,
    /// Pages that were there before the guest asked for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub fetched_pages: Option<i64>,
    /// How long faults waited; absent before the first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub fault_latency: Option<PagerFaultLatency>,
}

/// How far a machine is whose memory comes from a pager.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PagerMachineState {
    /// Its hypervisor has not connected yet.
    Waiting,
    /// Its faults are answered.
    Serving,
    /// All of its memory is there; it needs no pager any more.
    Graduated,
    /// A fault stays unanswered for ever; the machine is killed.
    Failed,
}

/// How long faults waited, from when the pager heard of each to its answer, microseconds, a quarter too much at most.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PagerFaultLatency {
    /// Half of them no longer.
    pub p50_us: i64,
    /// All but one in a hundred no longer.
    pub p99_us: i64,
    /// The longest.
    pub max_us: i64,
}
