//! A new instance: everything that can be refused is refused before anything is made.

use std::sync::Arc;
use std::time::Duration;

use hypeman_core::id::{Id, RANDOM_BYTES};
use hypeman_core::instance::{InstanceState, Lifecycle, PhaseClock};
use hypeman_store::{StoreError, journal};
use hypeman_vmm::{Capabilities, Feature};
use jiff::Timestamp;
use tokio::sync::oneshot;

use super::disks::MIN_OVERLAY_BYTES;
use super::driver;
use super::model::{CreateInstance, Instance, InstanceRecord, NetworkRecord, NetworkRequest};
use super::request::{Operation, Request};
use crate::events::EventKind;
use crate::options::Limits;
use crate::shared::Shared;
use crate::{EngineError, faults};

/// How long a request waits for an image that is not here yet; clients give up after a minute.
const IMAGE_PATIENCE: Duration = Duration::from_secs(45);
/// Less than this and no kernel boots.
const MIN_MEMORY_BYTES: u64 = 64 << 20;
/// Root disk and writable layer.
const DISKS: usize = 2;

/// Creates and boots an instance; returns when its VMM runs.
pub(crate) async fn create(
    shared: &Arc<Shared>,
    request: CreateInstance,
) -> Result<Arc<Instance>, EngineError> {
    check_size(
        &shared.options.limits,
        request.vcpus,
        request.memory_bytes,
        request.hotplug_bytes,
        request.overlay_bytes,
    )?;
    let hypervisor = request.hypervisor.unwrap_or(shared.options.default_hypervisor);
    let (hotplug, disk_io) = (request.hotplug_bytes, request.disk_io_bytes_per_second);
    check_hypervisor(shared, hypervisor, hotplug, disk_io).await?;
    if shared.table.has_name(&request.name) {
        return Err(EngineError::NameConflict(request.name));
    }
    if request.network.enabled {
        shared.network().await?;
    }
    let image = shared
        .images
        .ensure_ready(&request.image, request.platform.as_deref(), IMAGE_PATIENCE)
        .await?;
    let artifacts = shared.current_artifacts().await?;

    let random =
        crate::random::bytes::<RANDOM_BYTES>().map_err(|error| EngineError::io("random id", error))?;
    let id = Id::from_random(&random).into_string();
    let now = Timestamp::now();
    let expires_at = request
        .expiry
        .map(|expiry| expiry.deadline(now))
        .transpose()?
        .flatten();
    // Last: what is refused after this has an address to give back.
    let network = if request.network.enabled {
        Some(network_record(shared, &id, request.network).await?)
    } else {
        None
    };
    let record = InstanceRecord {
        id: id.clone(),
        name: request.name,
        image: image.name,
        image_digest: image.digest,
        platform: image.platform,
        memory_bytes: request.memory_bytes,
        hotplug_bytes: request.hotplug_bytes,
        overlay_bytes: request.overlay_bytes,
        vcpus: request.vcpus,
        disk_io_bytes_per_second: request.disk_io_bytes_per_second,
        environment: request.environment,
        network,
        hypervisor,
        entrypoint: request.entrypoint,
        command: request.command,
        tags: request.tags,
        skip_kernel_headers: request.skip_kernel_headers,
        skip_guest_agent: request.skip_guest_agent,
        snapshot_policy: request.snapshot_policy,
        created_at: now,
        expires_at,
        started_at: None,
        stopped_at: None,
        exit: None,
        phases: PhaseClock::start(InstanceState::Created, now),
        boot_artifacts: artifacts.id.clone(),
        run: None,
        standby: None,
        disk_generation: 0,
        origin: None,
    };
    // The image stays while an instance needs it, whatever becomes of its references.
    shared.images.retain(&record.image_digest);
    if let Err(error) = commit(shared, record.clone(), EngineError::NameConflict).await {
        shared.release(&record).await;
        return Err(error);
    }
    faults::point("create.recorded");
    let (driver, requests) = driver::prepare(shared, record.clone(), Lifecycle::Created);
    let slot = Arc::clone(&driver.slot);
    if let Err(error) = shared.table.insert(Arc::clone(&slot)) {
        // The name is just being given up by an instance whose row is gone already.
        uncommit(shared, &record).await?;
        shared.release(&record).await;
        return Err(error);
    }
    let created = InstanceState::Created.as_str();
    shared.events.publish(EventKind::Instance, &record.id, created);
    driver.spawn(requests);
    let (reply, answer) = oneshot::channel();
    slot.requests
        .send(Request::Boot(reply))
        .await
        .map_err(|_| EngineError::ShuttingDown)?;
    answer.await.map_err(|_| EngineError::ShuttingDown)?
}

/// Records the instance together with the intent to make it; `taken` is said of a name that is.
pub(super) async fn commit(
    shared: &Arc<Shared>,
    record: InstanceRecord,
    taken: fn(String) -> EngineError,
) -> Result<(), EngineError> {
    let name = record.name.clone();
    shared
        .store
        .write(move |connection| {
            hypeman_store::instances::insert(connection, &record.id, &record.name, &record)?;
            journal::begin(connection, &record.id, &Operation::Create.encode()).map(|_| ())
        })
        .await
        .map_err(|error| match error {
            StoreError::Conflict(_) => taken(name),
            other => other.into(),
        })
}

pub(super) async fn uncommit(shared: &Arc<Shared>, record: &InstanceRecord) -> Result<(), EngineError> {
    let id = record.id.clone();
    let removed = shared.store.write(move |connection| {
        hypeman_store::instances::delete(connection, &id)?;
        journal::clear(connection, &id)
    });
    Ok(removed.await?)
}

/// Holds an instance to the limits of this server.
///
/// # Errors
/// 400 with the code of what is too much or too little.
pub(crate) fn check_size(
    limits: &Limits,
    vcpus: u32,
    memory_bytes: u64,
    hotplug_bytes: u64,
    overlay_bytes: u64,
) -> Result<(), EngineError> {
    let refuse = |code, message: String| Err(EngineError::invalid(code, message));
    if vcpus == 0 || vcpus > limits.max_vcpus_per_instance {
        return refuse(
            "invalid_request",
            format!("vcpus must be 1 to {}", limits.max_vcpus_per_instance),
        );
    }
    let memory = memory_bytes.saturating_add(hotplug_bytes);
    if memory_bytes < MIN_MEMORY_BYTES || memory > limits.max_memory_per_instance {
        return refuse(
            "invalid_size",
            format!(
                "size must be at least {} MiB, and size plus hotplug_size at most {} MiB",
                MIN_MEMORY_BYTES >> 20,
                limits.max_memory_per_instance >> 20
            ),
        );
    }
    if overlay_bytes < MIN_OVERLAY_BYTES || overlay_bytes > limits.max_overlay_size {
        return refuse(
            "invalid_overlay_size",
            format!(
                "overlay_size must be {} MiB to {} MiB",
                MIN_OVERLAY_BYTES >> 20,
                limits.max_overlay_size >> 20
            ),
        );
    }
    Ok(())
}

/// Whether machines with these wishes can be started by a hypervisor here.
///
/// # Errors
/// 400 with the reason.
pub(crate) async fn check_hypervisor(
    shared: &Shared,
    kind: hypeman_vmm::VmmKind,
    hotplug_bytes: u64,
    disk_io_bytes_per_second: Option<u64>,
) -> Result<(), EngineError> {
    let vmm = shared.vmm(kind)?;
    let features = match vmm.capabilities().await {
        Capabilities::Available { features, .. } => features,
        Capabilities::Unavailable { reason } => {
            return Err(EngineError::invalid(
                "invalid_request",
                format!("this hypervisor is not available: {reason}"),
            ));
        }
    };
    let needs = |feature, wanted: bool, code, field: &str| {
        if wanted && !features.contains(&feature) {
            return Err(EngineError::invalid(
                code,
                format!("this hypervisor does not support {field}"),
            ));
        }
        Ok(())
    };
    needs(
        Feature::HotplugMemory,
        hotplug_bytes > 0,
        "invalid_hotplug_size",
        "hotplug_size",
    )?;
    needs(
        Feature::DiskIoLimit,
        disk_io_bytes_per_second.is_some(),
        "invalid_disk_io_bps",
        "disk_io_bps",
    )?;
    if vmm.max_disks() < DISKS {
        return Err(EngineError::invalid(
            "invalid_request",
            "this hypervisor has too few disks",
        ));
    }
    Ok(())
}

/// An address of its own for the instance `id`, with the bandwidths of the request.
pub(super) async fn network_record(
    shared: &Arc<Shared>,
    id: &str,
    request: NetworkRequest,
) -> Result<NetworkRecord, EngineError> {
    let network = shared.network().await?;
    let seed = u64::from_le_bytes(crate::random::bytes().map_err(|error| EngineError::io("random", error))?);
    let octets = crate::random::bytes().map_err(|error| EngineError::io("random", error))?;
    let address = shared.reserve_address(|in_use| network.allocate(in_use, seed))?;
    Ok(NetworkRecord {
        ip: address.ip,
        mac: hypeman_network::mac_address(octets),
        tap: hypeman_network::tap_name(id),
        bandwidth_download: request.bandwidth_download,
        bandwidth_upload: request.bandwidth_upload,
    })
}
