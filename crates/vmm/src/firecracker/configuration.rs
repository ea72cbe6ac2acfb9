//! What Firecracker is told, as pure functions of the machine.
//!
//! Invariant: nothing of a spec can become anything but a value: everything goes into JSON.

use std::path::Path;

use serde_json::{Value, json};

use super::files::{GUEST_SOCKET, STATE, disk};
use crate::spec::text;
use crate::{MachineSpec, MemoryBacking, VmmError, VmmKind};

const MEBIBYTE: u64 = 1 << 20;
/// The guest's number on its own bus; every machine has its own bus.
const GUEST_CID: u32 = 3;
const NIC: &str = "eth0";
/// Rates are counted by the second.
const REFILL_MILLISECONDS: u64 = 1000;
const MAX_CPUS: u32 = 32;

/// Whether Firecracker can build it.
pub(super) fn check(spec: &MachineSpec, max_disks: usize) -> Result<(), VmmError> {
    spec.check_words()?;
    spec.check_plain(VmmKind::Firecracker)?;
    let invalid = |message: String| Err(VmmError::InvalidSpec(message));
    if spec.cpus == 0 || spec.cpus > MAX_CPUS {
        return invalid(format!(
            "{} virtual CPUs: Firecracker takes 1 to {MAX_CPUS}",
            spec.cpus
        ));
    }
    if !spec.memory_bytes.is_multiple_of(MEBIBYTE) || spec.memory_bytes < 16 * MEBIBYTE {
        return invalid(format!(
            "{} bytes of memory: Firecracker takes whole MiB, 16 and more",
            spec.memory_bytes
        ));
    }
    if spec.disks.len() > max_disks {
        return invalid(format!(
            "{} disks: Firecracker takes {max_disks}",
            spec.disks.len()
        ));
    }
    for disk in &spec.disks {
        text(&disk.path)?;
    }
    Ok(())
}

/// A machine that boots its kernel.
pub(super) fn boot(spec: &MachineSpec, command_line: &str) -> Value {
    let drives: Vec<Value> = spec
        .disks
        .iter()
        .enumerate()
        .map(|(index, of_spec)| {
            let mut drive = json!({
                "drive_id": disk(index),
                "path_on_host": disk(index),
                "is_root_device": false,
                "is_read_only": of_spec.read_only,
                "cache_type": "Writeback",
                "io_engine": "Sync",
            });
            if let Some(limit) = of_spec.limit {
                drive["rate_limiter"] = json!({
                    "bandwidth": bucket(limit.bytes_per_second, limit.burst_bytes_per_second),
                });
            }
            drive
        })
        .collect();
    let nics: Vec<Value> = spec
        .nic
        .iter()
        .map(|nic| {
            let mut interface = json!({ "iface_id": NIC, "host_dev_name": nic.tap, "guest_mac": nic.mac });
            // Both are named from the side of the guest.
            for (name, limit) in [("rx_rate_limiter", nic.download), ("tx_rate_limiter", nic.upload)] {
                if let Some(rate) = limit {
                    interface[name] = json!({ "bandwidth": bucket(rate, rate) });
                }
            }
            interface
        })
        .collect();
    json!({
        "boot-source": {
            "kernel_image_path": spec.kernel,
            "initrd_path": spec.initramfs,
            "boot_args": command_line,
        },
        "machine-config": {
            "vcpu_count": spec.cpus,
            "mem_size_mib": spec.memory_bytes / MEBIBYTE,
            "smt": false,
            // What changed is read from the page tables; tracking it would cost a fault a page.
            "track_dirty_pages": false,
        },
        "drives": drives,
        "network-interfaces": nics,
        "vsock": { "guest_cid": GUEST_CID, "uds_path": GUEST_SOCKET },
        "entropy": {},
        "balloon": {
            "amount_mib": 0,
            "deflate_on_oom": true,
            "stats_polling_interval_s": 0,
            "free_page_reporting": true,
        },
    })
}

/// A captured machine that is to go on upon this memory.
pub(super) fn load(spec: &MachineSpec, memory: &MemoryBacking) -> Result<Value, VmmError> {
    let (kind, memory): (_, &Path) = match memory {
        MemoryBacking::Private(file) => ("File", file),
        MemoryBacking::Served(socket) => ("Uffd", socket),
        MemoryBacking::Anonymous => {
            return Err(VmmError::InvalidSpec(
                "a captured machine needs its memory".to_owned(),
            ));
        }
    };
    let overrides: Vec<Value> = spec
        .nic
        .iter()
        .map(|nic| json!({ "iface_id": NIC, "host_dev_name": nic.tap }))
        .collect();
    Ok(json!({
        "snapshot_path": STATE,
        "mem_backend": { "backend_type": kind, "backend_path": text(memory)? },
        "track_dirty_pages": false,
        "resume_vm": false,
        "network_overrides": overrides,
    }))
}

/// Both in bytes a second.
fn bucket(sustained: u64, burst: u64) -> Value {
    let sustained = sustained.max(1);
    json!({
        "size": sustained,
        "one_time_burst": burst.saturating_sub(sustained),
        "refill_time": REFILL_MILLISECONDS,
    })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::{Disk, IoLimit, MemoryBacking, Nic};

    fn spec() -> MachineSpec {
        MachineSpec {
            id: "machine-1".to_owned(),
            runtime_directory: PathBuf::from("/run/machine"),
            cpus: 2,
            memory_bytes: 256 << 20,
            memory: MemoryBacking::Anonymous,
            hotplug_bytes: 0,
            kernel: PathBuf::from("/k/vmlinux"),
            initramfs: PathBuf::from("/k/initramfs"),
            kernel_arguments: Vec::new(),
            disks: vec![
                Disk {
                    path: PathBuf::from("/images/root"),
                    read_only: true,
                    limit: None,
                },
                Disk {
                    path: PathBuf::from("/instances/a/overlay"),
                    read_only: false,
                    limit: Some(IoLimit {
                        bytes_per_second: 1000,
                        burst_bytes_per_second: 4000,
                    }),
                },
            ],
            host_devices: Vec::new(),
            nic: Some(Nic {
                tap: "hm-1".to_owned(),
                mac: "02:00:00:00:00:01".to_owned(),
                download: None,
                upload: None,
            }),
            workload_log: PathBuf::from("/l/app.log"),
            vmm_log: PathBuf::from("/l/vmm.log"),
        }
    }

    #[test]
    fn no_path_of_a_machine_gets_into_what_its_state_will_name() {
        let configuration = boot(&spec(), "console=ttyS0");
        for drive in configuration["drives"].as_array().unwrap() {
            assert_eq!(drive["path_on_host"], drive["drive_id"]);
            assert_eq!(drive["is_root_device"], false);
        }
        assert_eq!(configuration["drives"][0]["is_read_only"], true);
        assert_eq!(configuration["vsock"]["uds_path"], GUEST_SOCKET);
        let bucket = &configuration["drives"][1]["rate_limiter"]["bandwidth"];
        assert_eq!(
            (&bucket["size"], &bucket["one_time_burst"]),
            (&json!(1000), &json!(3000))
        );
    }

    #[test]
    fn traffic_is_limited_each_way_by_itself() {
        let limited = |download, upload| {
            let mut spec = spec();
            let nic = spec.nic.as_mut().unwrap();
            (nic.download, nic.upload) = (download, upload);
            boot(&spec, "")["network-interfaces"][0].clone()
        };
        let free = limited(None, None);
        assert_eq!(
            (free.get("rx_rate_limiter"), free.get("tx_rate_limiter")),
            (None, None)
        );
        let one_way = limited(Some(5000), None);
        assert_eq!(one_way.get("tx_rate_limiter"), None);
        let bucket = &one_way["rx_rate_limiter"]["bandwidth"];
        assert_eq!(
            bucket,
            &json!({ "size": 5000, "one_time_burst": 0, "refill_time": 1000 })
        );
        let both = limited(Some(5000), Some(7000));
        assert_eq!(both["rx_rate_limiter"]["bandwidth"]["size"], 5000);
        assert_eq!(both["tx_rate_limiter"]["bandwidth"]["size"], 7000);
    }

    #[test]
    fn a_loaded_machine_gets_its_own_tap_and_stays_paused() {
        let captured = |memory| MachineSpec { memory, ..spec() };
        let private = captured(MemoryBacking::Private(PathBuf::from("/memory/base")));
        let request = load(&private, &private.memory).unwrap();
        assert_eq!(request["network_overrides"][0]["host_dev_name"], "hm-1");
        assert_eq!(request["resume_vm"], false);
        assert_eq!(request["mem_backend"]["backend_path"], "/memory/base");
        assert_eq!(request["mem_backend"]["backend_type"], "File");
        assert!(load(&spec(), &MemoryBacking::Private(PathBuf::from("relative"))).is_err());
        assert!(load(&spec(), &MemoryBacking::Anonymous).is_err());
        let served = MemoryBacking::Served(PathBuf::from("/run/pages.sock"));
        let request = load(&MachineSpec { nic: None, ..spec() }, &served).unwrap();
        assert_eq!(request["mem_backend"]["backend_type"], "Uffd");
        assert_eq!(request["network_overrides"], json!([]));
    }

    #[test]
    fn what_cannot_be_built_is_refused_before_anything_starts() {
        assert!(check(&spec(), 2).is_ok());
        assert!(check(&spec(), 1).is_err());
        for broken in [
            MachineSpec { cpus: 33, ..spec() },
            MachineSpec {
                memory_bytes: (256 << 20) + 4096,
                ..spec()
            },
            MachineSpec {
                id: "a,b".to_owned(),
                ..spec()
            },
        ] {
            assert!(check(&broken, 2).is_err(), "{broken:?}");
        }
    }
}
