//! The description of a machine that Cloud Hypervisor takes, as a pure function of ours.
//!
//! ```text
//! slot   1 …            disks, then the network interface, randomness, vsock, balloon, pvpanic
//! RAM    0 ─ 3 GiB      and, without the hole of 32-bit devices, from 4 GiB on: one zone
//!        behind it      at the next 128 MiB from 4 GiB on: what may be added, by virtio-mem
//! ```
//!
//! Invariants:
//! - A restored machine is described by its own [`MachineSpec`] as a new one is: nothing of a captured state becomes
//!   a path, a device or an option. Names and order of devices are therefore fixed.
//! - No disk format is ever probed, and no disk has another behind it.

use std::path::Path;

use serde_json::{Value, json};

use crate::kernel_arguments;
use crate::own_directory::OwnDirectory;
use crate::spec::text;
use crate::{Disk, IoLimit, MachineSpec, MemoryBacking, VmmError};

/// Name of the control socket in the runtime directory.
pub(super) const API_SOCKET: &str = "api.sock";
/// Name of the socket of the guest's vsock device in its own directory.
pub(super) const VSOCK_SOCKET: &str = "vsock.sock";
/// Name in its own directory under which the kernel is seen while a machine boots. It is gone afterwards, so that a reboot fails and ends
/// the process, whether or not a server watches.
pub(super) const BOOT_KERNEL: &str = "boot-kernel";
/// The one zone of guest memory.
pub(super) const ZONE: &str = "mem0";
/// Where the kernel's command line lies in guest memory.
pub(super) const COMMAND_LINE_ADDRESS: u64 = 0x2_0000;

pub(super) const MEBIBYTE: u64 = 1 << 20;
/// Where the hole of 32-bit devices begins and ends.
pub(super) const HOLE: std::ops::Range<u64> = 0xc000_0000..0x1_0000_0000;
/// Memory is added in blocks of this size.
const HOTPLUG_BLOCK: u64 = 128 * MEBIBYTE;
/// What a guest takes and gives back at once.
const PLUG_BLOCK: u64 = 2 * MEBIBYTE;
/// A PCI segment has 31 places besides its root. Seven are for the devices that are no disks, one of them for later.
pub(super) const MAX_DISKS: usize = 24;
const MAX_CPUS: u32 = 254;
/// The guest's own address; each machine has a vsock of its own.
const GUEST_CID: u32 = 3;
const SOCKET_PATH_LIMIT: usize = 107;

/// What differs between versions and hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Abilities {
    /// The balloon survives that memory behind a private mapping can't be given back.
    pub(super) balloon: bool,
}

/// What the process is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// A machine that boots its kernel.
    Boot,
    /// One that goes on from a captured state.
    Restore {
        /// What the guest's balloon held.
        balloon_bytes: u64,
    },
}

/// Guest memory in bytes, as the machine has it.
pub(super) fn memory_bytes(spec: &MachineSpec) -> u64 {
    spec.memory_bytes.next_multiple_of(MEBIBYTE)
}

/// Room for the memory that may be added, in bytes.
pub(super) fn room_for_more(spec: &MachineSpec) -> u64 {
    spec.hotplug_bytes.next_multiple_of(HOTPLUG_BLOCK)
}

/// Guest physical address of that room, behind memory that ends at this one.
pub(super) fn place_for_more(end: u64) -> u64 {
    end.max(HOLE.end).next_multiple_of(HOTPLUG_BLOCK)
}

/// What its zone is to have, for a machine that is to have so much memory in all. Both in bytes.
pub(super) fn zone_bytes(spec: &MachineSpec, all: u64) -> u64 {
    let more = all.saturating_sub(spec.memory_bytes);
    let more = more.checked_next_multiple_of(PLUG_BLOCK).unwrap_or(u64::MAX);
    memory_bytes(spec).saturating_add(more)
}

/// The pieces that guest memory has: below the hole, and above it.
pub(super) fn segments(memory_bytes: u64) -> Vec<u64> {
    match memory_bytes.checked_sub(HOLE.start) {
        None | Some(0) => vec![memory_bytes],
        Some(above) => vec![HOLE.start, above],
    }
}

/// Translates a machine.
pub(super) fn config(spec: &MachineSpec, abilities: Abilities, start: Start) -> Result<Value, VmmError> {
    check(spec)?;
    let own = OwnDirectory::of(&spec.runtime_directory);
    let mut config = json!({
        // Guests that are hypervisors themselves would make each captured state depend on more of the host.
        "cpus": { "boot_vcpus": spec.cpus, "max_vcpus": spec.cpus, "nested": false },
        "memory": memory(spec, start)?,
        "payload": {
            "kernel": text(&own.join(BOOT_KERNEL))?,
            "cmdline": kernel_arguments::cloud_hypervisor(spec)?,
            "initramfs": text(&spec.initramfs)?,
        },
        "rng": { "src": "/dev/urandom" },
        "serial": { "mode": "Tty" },
        "console": { "mode": "Off" },
        "pvpanic": true,
        "vsock": {
            "id": "vsock0",
            "cid": GUEST_CID,
            "socket": socket(&own.join(VSOCK_SOCKET))?,
        },
    });
    let disks: Result<Vec<Value>, VmmError> = spec.disks.iter().enumerate().map(disk).collect();
    config["disks"] = Value::Array(disks?);
    if let Some(nic) = &spec.nic {
        config["net"] = json!([{ "id": "net0", "tap": nic.tap, "mac": nic.mac }]);
    }
    if !spec.host_devices.is_empty() {
        config["devices"] = passed_through(&spec.host_devices)?;
    }
    if abilities.balloon {
        let size = match start {
            Start::Boot => 0,
            Start::Restore { balloon_bytes } => balloon_bytes,
        };
        config["balloon"] = json!({ "size": size, "deflate_on_oom": true, "free_page_reporting": true });
    }
    Ok(config)
}

/// A disk that joins a machine, or is one of it from the start.
pub(super) fn disk((index, disk): (usize, &Disk)) -> Result<Value, VmmError> {
    let mut description = json!({
        "id": disk_id(index),
        "path": text(&disk.path)?,
        "readonly": disk.read_only,
        "direct": false,
        "image_type": "Raw",
        "backing_files": false,
        "sparse": true,
        // By default it is made of the file's inode, and a copy would be another disk.
        "serial": disk_id(index),
    });
    if let Some(limit) = disk.limit {
        description["rate_limiter_config"] = json!({ "bandwidth": bucket(limit) });
    }
    Ok(description)
}

/// Name of a disk, for Cloud Hypervisor and for the guest.
pub(super) fn disk_id(index: usize) -> String {
    format!("disk{index}")
}

/// Devices of the host that the guest is given, by their PCI addresses as `0000:01:00.0`.
fn passed_through(addresses: &[String]) -> Result<Value, VmmError> {
    let devices: Result<Vec<Value>, VmmError> = addresses
        .iter()
        .enumerate()
        .map(|(index, address)| match is_pci_address(address) {
            true => Ok(json!({
                "id": format!("host{index}"),
                "path": format!("/sys/bus/pci/devices/{address}"),
            })),
            false => Err(invalid(format!("{address:?} is no address of a PCI device"))),
        })
        .collect();
    Ok(Value::Array(devices?))
}

/// A bucket that holds a second of the burst and fills at the sustained rate.
fn bucket(limit: IoLimit) -> Value {
    let sustained = limit.bytes_per_second.max(1);
    let size = limit.burst_bytes_per_second.max(sustained);
    let milliseconds = (u128::from(size) * 1000).div_ceil(u128::from(sustained));
    json!({ "size": size, "refill_time": u64::try_from(milliseconds).unwrap_or(u64::MAX) })
}

fn memory(spec: &MachineSpec, start: Start) -> Result<Value, VmmError> {
    let mut zone = json!({ "id": ZONE, "size": memory_bytes(spec), "shared": false });
    if let MemoryBacking::Private(path) = &spec.memory {
        zone["file"] = json!(text(path)?);
    }
    let mut memory = json!({ "size": 0 });
    if spec.hotplug_bytes > 0 {
        memory["hotplug_method"] = json!("VirtioMem");
        zone["hotplug_size"] = json!(room_for_more(spec));
    }
    // Large pages make a boot faster. A machine that goes on writes here and there, and each page that it changes is
    // one to keep.
    memory["thp"] = json!(start == Start::Boot);
    memory["zones"] = json!([zone]);
    Ok(memory)
}

fn check(spec: &MachineSpec) -> Result<(), VmmError> {
    spec.check_words()?;
    if spec.cpus == 0 || spec.cpus > MAX_CPUS {
        return Err(invalid(format!(
            "{} virtual CPUs: Cloud Hypervisor takes 1 to {MAX_CPUS}",
            spec.cpus
        )));
    }
    if spec.memory_bytes < 16 * MEBIBYTE {
        return Err(invalid(format!(
            "{} bytes of memory: no kernel starts in less than 16 MiB",
            spec.memory_bytes
        )));
    }
    if spec.memory_bytes.max(spec.hotplug_bytes) > u64::MAX / 4 {
        return Err(invalid(format!(
            "{} and {} bytes of memory: more than there can be",
            spec.memory_bytes, spec.hotplug_bytes
        )));
    }
    if spec.disks.len() + spec.host_devices.len() > MAX_DISKS {
        return Err(invalid(format!(
            "{} disks and devices of the host: Cloud Hypervisor takes {MAX_DISKS}",
            spec.disks.len() + spec.host_devices.len()
        )));
    }
    Ok(())
}

fn is_pci_address(address: &str) -> bool {
    // dddd:bb:dd.f
    address.len() == 12
        && address.bytes().enumerate().all(|(at, byte)| match at {
            4 | 7 => byte == b':',
            10 => byte == b'.',
            _ => matches!(byte, b'0'..=b'9' | b'a'..=b'f'),
        })
}

fn invalid(message: String) -> VmmError {
    VmmError::InvalidSpec(message)
}

/// A path that the kernel takes for the name of a socket, also with the number of a port behind it.
fn socket(path: &Path) -> Result<String, VmmError> {
    let text = text(path)?;
    match text.len() + "_4294967295".len() <= SOCKET_PATH_LIMIT {
        true => Ok(text),
        false => Err(invalid(format!("{text:?} is too long for the path of a socket"))),
    }
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
