//! The jail as every driver sees it: whether there is one, and how much a machine may use.

use std::sync::Arc;

use hypeman_jail::{Jail, JailOptions, Limits};

use crate::blocking::blocking;
use crate::{MachineSpec, VmmError};

/// Beyond the largest disk: logs between two looks at their size, device states.
const FILE_SLACK: u64 = 2 << 30;

/// Whether the VMM is to be started in the jail. The first time the host is asked, which takes some milliseconds.
pub(crate) async fn confines(jail: &Arc<Jail>) -> Result<bool, VmmError> {
    let jail = Arc::clone(jail);
    blocking(move || {
        jail.confines()
            .map_err(|error| VmmError::Unavailable(error.to_string()))
    })
    .await
}

/// How much the VMM of a machine may use. `written`: the largest file besides disks that it writes.
pub(crate) fn limits(options: &JailOptions, spec: &MachineSpec, written: u64) -> Limits {
    let writable = || spec.disks.iter().filter(|disk| !disk.read_only);
    let largest_disk = writable()
        .filter_map(|disk| std::fs::metadata(&disk.path).ok())
        .map(|about| about.len())
        .max()
        .unwrap_or(0);
    // Bursts are the VMM's own to shape; a VMM that is not itself any more gets no more than their sum.
    let rates: Option<Vec<u64>> = spec
        .disks
        .iter()
        .map(|disk| disk.limit.map(|limit| limit.burst_bytes_per_second))
        .collect();
    let rate = rates
        .filter(|rates| !rates.is_empty())
        .map(|rates| rates.iter().fold(0, |sum: u64, rate| sum.saturating_add(*rate)));
    Limits {
        memory_bytes: Some(
            spec.memory_bytes
                .saturating_add(spec.hotplug_bytes)
                .saturating_add(options.memory_overhead),
        ),
        // One more for the VMM's own threads.
        processors: Some(spec.cpus.saturating_add(1)),
        processes: Some(options.processes),
        descriptors: Some(options.descriptors),
        file_bytes: Some(largest_disk.max(written).saturating_add(FILE_SLACK)),
        disk_bytes_per_second: rate,
        disk: writable().next().map(|disk| disk.path.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Disk, IoLimit, MemoryBacking};

    #[test]
    fn limits_follow_the_machine() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(5 << 30).unwrap();
        let limit = Some(IoLimit {
            bytes_per_second: 100,
            burst_bytes_per_second: 400,
        });
        let spec = MachineSpec {
            id: "a".to_owned(),
            runtime_directory: directory.path().to_owned(),
            cpus: 2,
            memory_bytes: 1 << 30,
            memory: MemoryBacking::Anonymous,
            kernel: "/kernel".into(),
            initramfs: "/initramfs".into(),
            kernel_arguments: Vec::new(),
            hotplug_bytes: 0,
            host_devices: Vec::new(),
            disks: vec![
                Disk {
                    path: "/root-disk".into(),
                    read_only: true,
                    limit,
                },
                Disk {
                    path: path.clone(),
                    read_only: false,
                    limit,
                },
            ],
            nic: None,
            workload_log: "/log".into(),
            vmm_log: "/log".into(),
        };
        let limits = limits(&JailOptions::default(), &spec, 0);
        assert_eq!(limits.processors, Some(3));
        assert_eq!(limits.memory_bytes, Some(3 << 30));
        assert_eq!(limits.file_bytes, Some(7 << 30));
        assert_eq!(limits.disk_bytes_per_second, Some(800));
        assert_eq!(limits.disk, Some(path));
    }
}
