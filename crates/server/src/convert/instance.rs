//! Instances and what hangs on them, from the engine to the wire.

use std::collections::BTreeMap;

use hypeman_api::instance as api;
use hypeman_core::instance::InstanceState;
use hypeman_core::{bandwidth, rate, size};
use hypeman_engine::{Instance, InstanceStats, WaitOutcome};
use hypeman_vmm::{JailReport, VmmKind};
use jiff::Timestamp;

/// A state on the wire.
#[must_use]
pub fn state_to_api(state: InstanceState) -> api::InstanceState {
    match state {
        InstanceState::Created => api::InstanceState::Created,
        InstanceState::Initializing => api::InstanceState::Initializing,
        InstanceState::Running => api::InstanceState::Running,
        InstanceState::Paused => api::InstanceState::Paused,
        InstanceState::Shutdown => api::InstanceState::Shutdown,
        InstanceState::Stopped => api::InstanceState::Stopped,
        InstanceState::Standby => api::InstanceState::Standby,
        InstanceState::Unknown => api::InstanceState::Unknown,
    }
}

/// A state in the engine.
#[must_use]
pub fn state_to_core(state: api::InstanceState) -> InstanceState {
    match state {
        api::InstanceState::Created => InstanceState::Created,
        api::InstanceState::Initializing => InstanceState::Initializing,
        api::InstanceState::Running => InstanceState::Running,
        api::InstanceState::Paused => InstanceState::Paused,
        api::InstanceState::Shutdown => InstanceState::Shutdown,
        api::InstanceState::Stopped => InstanceState::Stopped,
        api::InstanceState::Standby => InstanceState::Standby,
        api::InstanceState::Unknown => InstanceState::Unknown,
    }
}

/// A hypervisor on the wire.
#[must_use]
pub fn hypervisor_to_api(kind: VmmKind) -> api::Hypervisor {
    match kind {
        VmmKind::CloudHypervisor => api::Hypervisor::CloudHypervisor,
        VmmKind::Firecracker => api::Hypervisor::Firecracker,
        VmmKind::Qemu => api::Hypervisor::Qemu,
        VmmKind::QemuMicrovm => api::Hypervisor::QemuMicrovm,
        VmmKind::Vz => api::Hypervisor::Vz,
    }
}

/// A hypervisor in the engine.
#[must_use]
pub fn hypervisor_to_engine(kind: api::Hypervisor) -> VmmKind {
    match kind {
        api::Hypervisor::CloudHypervisor => VmmKind::CloudHypervisor,
        api::Hypervisor::Firecracker => VmmKind::Firecracker,
        api::Hypervisor::Qemu => VmmKind::Qemu,
        api::Hypervisor::QemuMicrovm => VmmKind::QemuMicrovm,
        api::Hypervisor::Vz => VmmKind::Vz,
    }
}

/// An instance as clients see it at `now`.
#[must_use]
pub fn to_api(instance: &Instance, now: Timestamp) -> api::Instance {
    let record = &*instance.record;
    let phases = record.phases.totals(now);
    api::Instance {
        id: record.id.clone(),
        name: record.name.clone(),
        image: record.image.clone(),
        state: state_to_api(instance.state),
        state_error: instance.state_error.clone(),
        platform: Some(record.platform.clone()),
        hypervisor: Some(hypervisor_to_api(record.hypervisor)),
        size: size::format(record.memory_bytes),
        hotplug_size: (record.hotplug_bytes > 0).then(|| size::format(record.hotplug_bytes)),
        overlay_size: size::format(record.overlay_bytes),
        vcpus: i32::try_from(record.vcpus).unwrap_or(i32::MAX),
        disk_io_bps: record.disk_io_bytes_per_second.and_then(rate::format),
        env: record.environment.clone(),
        network: network(instance),
        volumes: Vec::new(),
        gpu: None,
        tags: record.tags.clone(),
        has_snapshot: instance.state == InstanceState::Standby,
        created_at: record.created_at,
        started_at: record.started_at,
        stopped_at: record.stopped_at,
        expires_at: record.expires_at,
        exit_code: record.exit.as_ref().and_then(|exit| exit.code),
        exit_message: record.exit.as_ref().map(|exit| exit.message.clone()),
        current_phase: Some(record.phases.current().as_str().to_lowercase()),
        current_phase_since: Some(record.phases.since()),
        phase_durations_ms: phases
            .into_iter()
            .map(|(state, spent)| {
                (
                    state.as_str().to_lowercase(),
                    i64::try_from(spent).unwrap_or(i64::MAX),
                )
            })
            .collect::<BTreeMap<_, _>>(),
        snapshot_policy: record.snapshot_policy.map(super::compression::policy_to_api),
        auto_standby: None,
        health_check: None,
        health_status: None,
        restart_policy: None,
        restart_status: None,
        jail: record.run.as_ref().map(|run| jail(run.jail.as_ref())),
    }
}

fn jail(report: Option<&JailReport>) -> api::InstanceJail {
    let Some(report) = report else {
        return api::InstanceJail {
            enabled: false,
            user: None,
            active: Vec::new(),
            missing: Vec::new(),
        };
    };
    let missing = report
        .missing
        .iter()
        .map(|(item, reason)| api::MissingConfinement {
            item: item.name().to_owned(),
            reason: reason.clone(),
        });
    api::InstanceJail {
        enabled: !report.active.is_empty(),
        user: report.user.map(i64::from),
        active: report.active.iter().map(|item| item.name().to_owned()).collect(),
        missing: missing.collect(),
    }
}

fn network(instance: &Instance) -> api::InstanceNetwork {
    let record = instance.record.network.as_ref();
    api::InstanceNetwork {
        enabled: record.is_some(),
        name: record.map(|_| "default".to_owned()),
        ip: record.map(|network| network.ip.to_string()),
        mac: record.map(|network| network.mac.clone()),
        bandwidth_download: record
            .and_then(|network| network.bandwidth_download)
            .and_then(bandwidth::format),
        bandwidth_upload: record
            .and_then(|network| network.bandwidth_upload)
            .and_then(bandwidth::format),
    }
}

/// What waiting ended with.
#[must_use]
pub fn wait_to_api(outcome: WaitOutcome) -> api::WaitResponse {
    api::WaitResponse {
        state: state_to_api(outcome.state),
        state_error: outcome.state_error,
        timed_out: outcome.timed_out,
    }
}

/// Usage of an instance.
#[must_use]
pub fn stats_to_api(instance: &Instance, stats: &InstanceStats) -> api::InstanceStats {
    let signed = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    #[allow(clippy::cast_precision_loss, reason = "a ratio needs no more than 52 bits")]
    let ratio = (stats.allocated_memory_bytes > 0)
        .then(|| stats.memory_rss_bytes as f64 / stats.allocated_memory_bytes as f64);
    api::InstanceStats {
        instance_id: instance.record.id.clone(),
        instance_name: instance.record.name.clone(),
        cpu_seconds: stats.cpu_seconds,
        memory_rss_bytes: signed(stats.memory_rss_bytes),
        memory_vms_bytes: signed(stats.memory_vms_bytes),
        network_rx_bytes: signed(stats.network_rx_bytes),
        network_tx_bytes: signed(stats.network_tx_bytes),
        allocated_vcpus: i32::try_from(stats.allocated_vcpus).unwrap_or(i32::MAX),
        allocated_memory_bytes: signed(stats.allocated_memory_bytes),
        memory_utilization_ratio: ratio,
    }
}

/// A path in the guest.
#[must_use]
pub fn path_to_api(info: hypeman_guest_api::PathInfo) -> api::PathInfo {
    api::PathInfo {
        exists: info.exists,
        error: info.error,
        is_dir: info.is_directory,
        is_file: info.is_file,
        is_symlink: info.is_symlink,
        link_target: info.link_target,
        mode: info.mode & 0o7777,
        size: i64::try_from(info.size).unwrap_or(i64::MAX),
    }
}
