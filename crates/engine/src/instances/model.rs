//! What an instance is: its stored record and the view that queries get.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use hypeman_core::instance::{Exit, InstanceState, PhaseClock};
use hypeman_vmm::{JailReport, ProcessIdentity, StateIdentity, VmmKind};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::snapshots::{MemoryRecord, SnapshotPolicy};

/// A request for a new instance, checked for grammar but not against limits or the host.
#[derive(Debug, Clone)]
pub struct CreateInstance {
    /// Unique name.
    pub name: String,
    /// Image reference as given.
    pub image: String,
    /// `linux/amd64` or alike; the host's when absent.
    pub platform: Option<String>,
    /// Base memory in bytes.
    pub memory_bytes: u64,
    /// Hot-pluggable memory in bytes.
    pub hotplug_bytes: u64,
    /// Writable root layer in bytes.
    pub overlay_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Disk bandwidth in bytes per second; `None` means the host's share.
    pub disk_io_bytes_per_second: Option<u64>,
    /// Merged over the image's environment.
    pub environment: BTreeMap<String, String>,
    /// Network wanted.
    pub network: NetworkRequest,
    /// Which VMM; the server's default when absent.
    pub hypervisor: Option<VmmKind>,
    /// Replaces the image's entrypoint.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    pub command: Option<Vec<String>>,
    /// User-defined tags.
    pub tags: BTreeMap<String, String>,
    /// No kernel headers in the guest.
    pub skip_kernel_headers: bool,
    /// No agent in the guest.
    pub skip_guest_agent: bool,
    /// How its memory is kept; the server's choice when absent.
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// When it deletes itself: counted from the commit of the creation.
    pub expiry: Option<Expiry>,
}

/// When an instance deletes itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// This long after the commit.
    After(Duration),
    /// At this instant.
    At(Timestamp),
    /// Never.
    Never,
}

/// The network of a new instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetworkRequest {
    /// Attach to the bridge.
    pub enabled: bool,
    /// Bytes per second towards the guest, if given.
    pub bandwidth_download: Option<u64>,
    /// Bytes per second from the guest, if given.
    pub bandwidth_upload: Option<u64>,
}

/// What `PATCH` can change.
#[derive(Debug, Clone, Copy, Default)]
pub struct InstanceUpdate {
    /// New expiry.
    pub expiry: Option<Expiry>,
}

/// New entrypoint and command for `start`; absent keeps the stored ones.
#[derive(Debug, Clone, Default)]
pub struct StartOverrides {
    /// Replaces the entrypoint.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the command.
    pub command: Option<Vec<String>>,
}

/// What is stored of an instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InstanceRecord {
    /// Id, 24 characters.
    pub id: String,
    /// Unique name.
    pub name: String,
    /// Canonical image reference.
    pub image: String,
    /// Digest of the image's manifest: what the root disk was made of.
    pub image_digest: String,
    /// Platform of the image.
    pub platform: String,
    /// Base memory in bytes.
    pub memory_bytes: u64,
    /// Hot-pluggable memory in bytes.
    pub hotplug_bytes: u64,
    /// Writable root layer in bytes.
    pub overlay_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Disk bandwidth in bytes per second; `None`: unlimited.
    pub disk_io_bytes_per_second: Option<u64>,
    /// The request's environment, not the image's.
    pub environment: BTreeMap<String, String>,
    /// Network, when enabled.
    pub network: Option<NetworkRecord>,
    /// Which VMM.
    pub hypervisor: VmmKind,
    /// Replaces the image's entrypoint.
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's command.
    pub command: Option<Vec<String>>,
    /// User-defined tags.
    pub tags: BTreeMap<String, String>,
    /// No kernel headers in the guest.
    pub skip_kernel_headers: bool,
    /// No agent in the guest.
    pub skip_guest_agent: bool,
    /// How its memory is kept; the server's choice when absent.
    #[serde(default)]
    pub snapshot_policy: Option<SnapshotPolicy>,
    /// Commit of the creation.
    pub created_at: Timestamp,
    /// When it deletes itself.
    pub expires_at: Option<Timestamp>,
    /// Last start.
    pub started_at: Option<Timestamp>,
    /// End of the last run.
    pub stopped_at: Option<Timestamp>,
    /// How the last run ended; cleared by a start.
    pub exit: Option<Exit>,
    /// Time spent in each state.
    pub phases: PhaseClock,
    /// Kernel and initramfs that it started with first and keeps.
    pub boot_artifacts: String,
    /// The VMM, while there is one.
    pub run: Option<RunRecord>,
    /// Memory and devices, while there is no VMM but the guest is to go on.
    #[serde(default)]
    pub standby: Option<StandbyRecord>,
    /// Which file is the writable layer: a restored snapshot brings its own, so that the old one stays whole
    /// until the new one is committed.
    #[serde(default)]
    pub disk_generation: u32,
    /// Snapshot that it was last restored or forked from.
    #[serde(default)]
    pub origin: Option<String>,
}

impl InstanceRecord {
    /// Memory image that it stands on: of its standby, or of what its machine maps.
    pub(crate) fn memory_image(&self) -> Option<&str> {
        let standby = self.standby.as_ref().map(|standby| standby.memory.image.as_str());
        standby.or_else(|| self.run.as_ref().and_then(|run| run.base.as_deref()))
    }
}

/// A guest that stands still: everything of it but its disk, which lies with the instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StandbyRecord {
    /// Name of the directory with device state and manifest, below the instance's.
    pub directory: String,
    /// BLAKE3 of the manifest, hex.
    pub manifest: String,
    /// Guest memory.
    pub memory: MemoryRecord,
    /// The guest is a copy of another and must be told who it is before it counts as running.
    pub foreign: bool,
    /// Compression waits until then.
    pub compress_after: Option<Timestamp>,
}

/// Address of an instance on the bridge.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Address in the guest.
    pub ip: Ipv4Addr,
    /// MAC address.
    pub mac: String,
    /// TAP device on the host.
    pub tap: String,
    /// Bytes per second towards the guest.
    pub bandwidth_download: Option<u64>,
    /// Bytes per second from the guest.
    pub bandwidth_upload: Option<u64>,
}

/// What is needed to find a running VMM again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The process.
    pub process: ProcessIdentity,
    /// Secret of this boot, hex.
    pub agent_key: String,
    /// Memory image that the machine maps and counts its changes against.
    #[serde(default)]
    pub base: Option<String>,
    /// Secret that the guest still has, hex, until it has confirmed who it is now.
    #[serde(default)]
    pub former_key: Option<String>,
    /// What a device state of this machine needs to be loaded again.
    #[serde(default)]
    pub identity: Option<StateIdentity>,
    /// What confines the process.
    #[serde(default)]
    pub jail: Option<JailReport>,
    /// Its name at the pager that serves its memory.
    #[serde(default)]
    pub served: Option<String>,
}

/// An instance as published by its driver: immutable, shared, cheap to read.
#[derive(Debug, Clone)]
pub struct Instance {
    /// What is stored.
    pub record: Arc<InstanceRecord>,
    /// Where it is now.
    pub state: InstanceState,
    /// Why the state is `Unknown`, or why the guest does not get on in it.
    pub state_error: Option<String>,
}

/// Which instances a list shows. Everything is ANDed.
#[derive(Debug, Clone, Default)]
pub struct InstanceFilter {
    /// Only this state.
    pub state: Option<InstanceState>,
    /// Only with these tags, exactly.
    pub tags: BTreeMap<String, String>,
}

/// Answer of `wait`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WaitOutcome {
    /// State at the end of the wait.
    pub state: InstanceState,
    /// Why it is `Unknown`, or why the guest does not get on in it.
    pub state_error: Option<String>,
    /// The time ran out first.
    pub timed_out: bool,
}

/// Usage of an instance. Zeros when no VMM runs.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct InstanceStats {
    /// CPU time of the VMM process in seconds.
    pub cpu_seconds: f64,
    /// Resident memory of the VMM process in bytes.
    pub memory_rss_bytes: u64,
    /// Virtual memory of the VMM process in bytes.
    pub memory_vms_bytes: u64,
    /// Bytes that the guest received.
    pub network_rx_bytes: u64,
    /// Bytes that the guest sent.
    pub network_tx_bytes: u64,
    /// Virtual CPUs.
    pub allocated_vcpus: u32,
    /// `size` + `hotplug_size` in bytes.
    pub allocated_memory_bytes: u64,
}

/// Which log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogSource {
    /// What the workload printed.
    App,
    /// Kernel console and VMM.
    Vmm,
    /// What the server did with the instance.
    Hypeman,
}

impl LogSource {
    pub(crate) fn file_name(self) -> &'static str {
        match self {
            Self::App => "app.log",
            Self::Vmm => "vmm.log",
            Self::Hypeman => "hypeman.log",
        }
    }
}
