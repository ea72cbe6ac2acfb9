//! What the engine is told at its start.

use std::borrow::Cow;
use std::path::PathBuf;
use std::time::Duration;

use hypeman_core::snapshot::CompressionChoice;
use hypeman_kernel::KernelOptions;
use hypeman_network::NetworkOptions;
use hypeman_vmm::{VmmKind, VmmOptions};

use crate::PagingOptions;

/// Everything configurable. The server fills it from its configuration.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Where everything lives. Created if missing, mode 0700, locked by one server at a time.
    pub data_directory: PathBuf,
    /// The static guest program.
    pub guest_program: Cow<'static, [u8]>,
    /// Which VMM an instance gets when it does not say.
    pub default_hypervisor: VmmKind,
    /// Bounds of a single instance and of the host.
    pub limits: Limits,
    /// Where VMM binaries are and what accelerates them.
    pub vmm: VmmOptions,
    /// Where the guest kernel comes from.
    pub kernel: KernelOptions,
    /// The bridge.
    pub network: NetworkOptions,
    /// Pulls and conversions.
    pub images: ImageOptions,
    /// Log rotation.
    pub logs: LogOptions,
    /// How snapshots are kept.
    pub snapshots: SnapshotOptions,
    /// How the memory of restored machines is served.
    pub paging: PagingOptions,
}

/// Bounds, with the contract's defaults.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Virtual CPUs of one instance.
    pub max_vcpus_per_instance: u32,
    /// `size` + `hotplug_size` of one instance, bytes.
    pub max_memory_per_instance: u64,
    /// Writable root layer of one instance, bytes.
    pub max_overlay_size: u64,
    /// Image conversions at once.
    pub max_concurrent_builds: usize,
    /// Share of the data disk that images may take, 0 to 1.
    pub max_image_storage: f64,
    /// Pulls, pushes and conversions leave this much free on the data disk, bytes.
    pub min_free_disk: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_vcpus_per_instance: 16,
            max_memory_per_instance: 32 << 30,
            max_overlay_size: 100 << 30,
            max_concurrent_builds: 1,
            max_image_storage: 0.2,
            min_free_disk: 5 << 30,
        }
    }
}

/// How images are fetched and stored.
#[derive(Debug, Clone, Default)]
pub struct ImageOptions {
    /// Root disks are lz4-compressed instead of plain.
    pub compress: bool,
    /// Registries spoken to without TLS, `host[:port]`.
    pub insecure_registries: Vec<String>,
    /// Docker's credential file, read afresh for each pull; one that is absent has nothing.
    pub docker_config: Option<PathBuf>,
    /// Pairs of a registry and the host of a token service that may get its credentials.
    pub trusted_realms: Vec<(String, String)>,
    /// Certificate authorities besides the system's, PEM.
    pub extra_roots: Vec<Vec<u8>>,
    /// Proxy for registries over TLS, `http://host:port`.
    pub proxy: Option<String>,
}

/// How snapshots are kept.
#[derive(Debug, Clone, Copy)]
pub struct SnapshotOptions {
    /// Compression of memory when neither the request nor the instance says anything.
    pub compression_default: CompressionChoice,
}

impl Default for SnapshotOptions {
    fn default() -> Self {
        Self {
            compression_default: CompressionChoice::Off,
        }
    }
}

/// How logs are kept.
#[derive(Debug, Clone, Copy)]
pub struct LogOptions {
    /// A log larger than this is rotated, bytes.
    pub max_size: u64,
    /// Rotated files kept beside the current one.
    pub max_files: u32,
    /// How often sizes are looked at.
    pub rotate_interval: Duration,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self {
            max_size: 50 << 20,
            max_files: 1,
            rotate_interval: Duration::from_secs(300),
        }
    }
}
