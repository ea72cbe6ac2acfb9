//! What the host has and what instances take of it.
//!
//! Admission by these numbers is not in force yet: they inform. Running instances count with processors, memory
//! and disk, stopped ones with disk alone.

use std::sync::Arc;

use crate::shared::Shared;
use crate::{EngineError, Instance, InstanceFilter};

/// Capacity and use of one resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// What the host has: processors or bytes.
    pub capacity: u64,
    /// What instances were promised, or what is taken.
    pub allocated: u64,
}

/// Where the bytes on the data disk went, by what was promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskUse {
    /// Root disks.
    pub images_bytes: u64,
    /// Blobs kept for the registry and for pulls to come.
    pub oci_cache_bytes: u64,
    /// Writable layers, at their full size.
    pub overlays_bytes: u64,
}

/// The answer to "how full is this host".
#[derive(Debug, Clone)]
pub struct ResourceReport {
    /// Logical processors.
    pub cpu: Usage,
    /// Main memory in bytes.
    pub memory: Usage,
    /// Data disk in bytes.
    pub disk: Usage,
    /// What `disk.allocated` is made of.
    pub disk_use: DiskUse,
    /// All instances, by id.
    pub instances: Vec<Arc<Instance>>,
}

impl Instance {
    /// Whether it takes processors and memory now.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.record.run.is_some()
    }
}

pub(crate) async fn report(shared: &Shared) -> Result<ResourceReport, EngineError> {
    let instances = shared.table.list(&InstanceFilter::default());
    let active = || instances.iter().filter(|instance| instance.is_active());
    let cpu = Usage {
        capacity: std::thread::available_parallelism().map_or(0, |count| count.get() as u64),
        allocated: active().map(|instance| u64::from(instance.record.vcpus)).sum(),
    };
    let system = rustix::system::sysinfo();
    #[allow(
        clippy::useless_conversion,
        reason = "the field's type differs between architectures"
    )]
    let memory = Usage {
        capacity: u64::from(system.totalram) * u64::from(system.mem_unit),
        allocated: active()
            .map(|instance| instance.record.memory_bytes + instance.record.hotplug_bytes)
            .sum(),
    };
    let blobs = shared.images.blobs().list().await?;
    let disk_use = DiskUse {
        images_bytes: shared.images.root_disk_bytes(),
        oci_cache_bytes: blobs.iter().map(|blob| blob.size).sum(),
        overlays_bytes: instances
            .iter()
            .map(|instance| instance.record.overlay_bytes)
            .sum(),
    };
    let disk = rustix::fs::statvfs(shared.layout.root())
        .map_err(|error| EngineError::io("inspect the data disk", error.into()))?;
    let disk = Usage {
        capacity: disk.f_blocks * disk.f_frsize,
        allocated: disk_use.images_bytes + disk_use.oci_cache_bytes + disk_use.overlays_bytes,
    };
    Ok(ResourceReport {
        cpu,
        memory,
        disk,
        disk_use,
        instances,
    })
}
