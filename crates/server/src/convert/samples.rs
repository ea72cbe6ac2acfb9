//! What the tests of conversions share.

use hypeman_core::instance::{InstanceState, PhaseClock};
use hypeman_engine::SnapshotRecord;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::error::ApiResult;

/// A request from its JSON.
pub(super) fn body<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// The code of a refusal.
pub(super) fn code_of<T: std::fmt::Debug>(result: ApiResult<T>) -> String {
    result.unwrap_err().code().to_owned()
}

/// A snapshot of a machine, with what the row says of its memory.
pub(super) fn record(memory: Value) -> SnapshotRecord {
    let source = json!({
        "id": "qilviffnqzck2jrim1x6s2b1", "name": "nginx1", "image": "docker.io/library/nginx:latest",
        "image_digest": "sha256:aa", "platform": "linux/amd64", "memory_bytes": 1 << 30, "hotplug_bytes": 0,
        "overlay_bytes": 1 << 30, "vcpus": 1, "disk_io_bytes_per_second": null, "environment": {},
        "network": null, "hypervisor": "qemu-microvm", "entrypoint": null, "command": null, "tags": {},
        "skip_kernel_headers": false, "skip_guest_agent": false, "created_at": "2026-03-06T13:00:00Z",
        "expires_at": null, "started_at": null, "stopped_at": null, "exit": null,
        "phases": PhaseClock::start(InstanceState::Running, "2026-03-06T13:00:00Z".parse().unwrap()),
        "boot_artifacts": "x", "run": null
    });
    body(json!({
        "id": "q7z1w7l2af4l8y7q1h7g2m3s", "name": "baseline", "kind": if memory.is_null() { "Stopped" } else { "Standby" },
        "tags": {"team": "backend"}, "created_at": "2026-03-06T13:56:11Z", "source": source,
        "parent": null, "scheduled_for": null, "size_bytes": 104_857_600, "memory": memory,
        "disk_bytes": 1000, "disk_digest": "00", "manifest": "00"
    }))
}
