//! How full the host is.

use axum::Json;
use axum::extract::State;
use hypeman_api::resources as api;
use hypeman_engine::{Instance, Usage};

use crate::error::ApiResult;
use crate::state::AppState;

/// Capacity, use and allocations of the host.
#[utoipa::path(get, path = "/resources", tag = "resources", operation_id = "getResources",
    responses((status = 200, description = "Capacity and use.", body = api::Resources)))]
pub async fn resources(State(state): State<AppState>) -> ApiResult<Json<api::Resources>> {
    let report = state.engine.resources().await?;
    Ok(Json(api::Resources {
        cpu: status("cpu", report.cpu, api::ResourceSource::Detected),
        memory: status("memory", report.memory, api::ResourceSource::Detected),
        disk: status("disk", report.disk, api::ResourceSource::Detected),
        // Zeros and `unknown` say that bandwidth is not accounted for.
        network: status(
            "network",
            Usage {
                capacity: 0,
                allocated: 0,
            },
            api::ResourceSource::Unknown,
        ),
        disk_breakdown: Some(api::DiskBreakdown {
            images_bytes: signed(report.disk_use.images_bytes),
            oci_cache_bytes: signed(report.disk_use.oci_cache_bytes),
            volumes_bytes: 0,
            overlays_bytes: signed(report.disk_use.overlays_bytes),
        }),
        allocations: report
            .instances
            .iter()
            .map(|instance| allocation(instance))
            .collect(),
    }))
}

fn status(kind: &str, usage: Usage, source: api::ResourceSource) -> api::ResourceStatus {
    api::ResourceStatus {
        kind: kind.to_owned(),
        capacity: signed(usage.capacity),
        effective_limit: signed(usage.capacity),
        allocated: signed(usage.allocated),
        available: signed(usage.capacity.saturating_sub(usage.allocated)),
        oversub_ratio: 1.0,
        source: Some(source),
    }
}

fn allocation(instance: &Instance) -> api::ResourceAllocation {
    let record = &instance.record;
    let while_active = |amount: u64| if instance.is_active() { signed(amount) } else { 0 };
    let bandwidth = |choose: fn(&hypeman_engine::NetworkRecord) -> Option<u64>| {
        while_active(record.network.as_ref().and_then(choose).unwrap_or(0))
    };
    api::ResourceAllocation {
        instance_id: record.id.clone(),
        instance_name: record.name.clone(),
        cpu: while_active(u64::from(record.vcpus)),
        memory_bytes: while_active(record.memory_bytes + record.hotplug_bytes),
        disk_bytes: signed(record.overlay_bytes),
        network_download_bps: bandwidth(|network| network.bandwidth_download),
        network_upload_bps: bandwidth(|network| network.bandwidth_upload),
        disk_io_bps: while_active(record.disk_io_bytes_per_second.unwrap_or(0)),
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
