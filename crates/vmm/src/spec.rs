//! What a machine is made of: plain data that every driver translates.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files::io_error;
use crate::{VmmError, VmmKind};

/// One virtual machine, complete. Paths are absolute and made by the server, never by clients.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Opaque id, used as the VMM's process and machine name (`[a-z0-9-]`, at most 63 characters).
    pub id: String,
    /// Private directory for sockets, pid files and the VMM's own logs. Exists, mode 0700, short enough that
    /// socket paths in it stay below 108 bytes.
    pub runtime_directory: PathBuf,
    /// Virtual CPUs at boot.
    pub cpus: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// What guest memory is made of.
    pub memory: MemoryBacking,
    /// Memory that may be added while the machine runs, in bytes; see [`Adjust::set_memory`](crate::Adjust::set_memory).
    /// A machine is captured without it: only while its guest has none.
    #[serde(default)]
    pub hotplug_bytes: u64,
    /// Uncompressed PVH-bootable kernel.
    pub kernel: PathBuf,
    /// Initial RAM file system that holds the guest program.
    pub initramfs: PathBuf,
    /// Words appended to the driver's own kernel command line. Never an identity of the instance.
    pub kernel_arguments: Vec<String>,
    /// Block devices in guest order: the first is `/dev/vda`.
    pub disks: Vec<Disk>,
    /// PCI devices of the host that the guest is given, as `0000:01:00.0`.
    #[serde(default)]
    pub host_devices: Vec<String>,
    /// Network interface, if any.
    pub nic: Option<Nic>,
    /// File that receives what the workload prints (binary safe, appended). The driver connects it to the
    /// guest's log port, and it keeps receiving while the server is down; without such a port the guest keeps
    /// what is printed meanwhile, see [`WorkloadLog`](crate::WorkloadLog).
    pub workload_log: PathBuf,
    /// File that receives the kernel console and the VMM's own standard output and error (appended). What a
    /// restored VMM says itself is kept in memory, at most 64 KiB of it.
    pub vmm_log: PathBuf,
}

/// What lies behind guest memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBacking {
    /// Nothing: zeroed memory.
    #[default]
    Anonymous,
    /// This file, at least as long as the memory, mapped copy-on-write: what the guest writes is seen by nobody
    /// else, and the file is never written.
    Private(PathBuf),
    /// At a restore, whoever listens at this socket: it fills each page when the guest asks for it. Firecracker only.
    Served(PathBuf),
}

/// A raw block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// Raw image file. Its format is never probed.
    pub path: PathBuf,
    /// The guest cannot write to it, and several machines may share it.
    pub read_only: bool,
    /// Optional token bucket.
    pub limit: Option<IoLimit>,
}

/// Token bucket of a disk: a sustained rate and a burst, in bytes a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoLimit {
    /// Sustained bytes per second, reads and writes together.
    pub bytes_per_second: u64,
    /// Bytes per second allowed in a burst.
    pub burst_bytes_per_second: u64,
}

/// A virtio network interface on an existing TAP device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nic {
    /// Name of the TAP device on the host.
    pub tap: String,
    /// MAC address, `02:…` lower case with colons.
    pub mac: String,
    /// Most bytes a second towards the guest. Only Firecracker has such a limit of its own; a captured state brings its.
    #[serde(default)]
    pub download: Option<u64>,
    /// Most bytes a second from the guest, likewise.
    #[serde(default)]
    pub upload: Option<u64>,
}

/// Where the host connects to reach the guest's agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentChannel {
    /// Unix socket that carries the guest's serial port byte for byte (QEMU).
    SerialSocket(PathBuf),
    /// Unix socket of a vsock device: connect, send `CONNECT <port>\n`, read `OK …\n` (Cloud Hypervisor, Firecracker).
    VsockSocket {
        /// Socket path.
        path: PathBuf,
        /// Port that the agent listens on.
        port: u32,
    },
}

/// What executes guest instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    /// Hardware virtualisation, proven by a guest that really ran.
    Kvm,
    /// QEMU's own translator: slow, runs everywhere.
    Tcg,
}

impl MachineSpec {
    /// Refuses what only some VMMs have.
    pub(crate) fn check_plain(&self, kind: VmmKind) -> Result<(), VmmError> {
        let unsupported = |feature| Err(VmmError::Unsupported { kind, feature });
        if self.hotplug_bytes > 0 {
            return unsupported("memory that is added while the machine runs");
        }
        if !self.host_devices.is_empty() {
            return unsupported("devices of the host");
        }
        Ok(())
    }

    /// Refuses a memory file that has not `needed` bytes: a mapping beyond its end would end the VMM at the guest's first
    /// look. Some VMMs would also make a file that is not there.
    pub(crate) fn check_memory_file(&self, needed: u64) -> Result<(), VmmError> {
        let MemoryBacking::Private(path) = &self.memory else {
            return Ok(());
        };
        let about = std::fs::metadata(path).map_err(io_error("cannot look at", path))?;
        if !about.is_file() || about.len() < needed {
            return Err(VmmError::InvalidSpec(format!(
                "{} is no file of {needed} bytes of memory",
                path.display()
            )));
        }
        Ok(())
    }

    /// Checks the words that VMMs take as they are: names, and the MAC address.
    pub(crate) fn check_words(&self) -> Result<(), VmmError> {
        let is_name = |text: &str, limit: usize, also: &[u8]| {
            !text.is_empty()
                && text.len() <= limit
                && text
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || also.contains(&byte))
        };
        if !is_name(&self.id, 63, b"-") {
            return Err(VmmError::InvalidSpec(format!("{:?} is no machine id", self.id)));
        }
        if let Some(nic) = &self.nic {
            // The kernel's limit for interface names is 15 bytes.
            if !is_name(&nic.tap, 15, b"-_.") {
                return Err(VmmError::InvalidSpec(format!(
                    "{:?} is no name of a network interface",
                    nic.tap
                )));
            }
            let is_mac = nic.mac.len() == 17
                && nic.mac.bytes().enumerate().all(|(at, byte)| match at % 3 {
                    2 => byte == b':',
                    _ => byte.is_ascii_hexdigit(),
                });
            if !is_mac {
                return Err(VmmError::InvalidSpec(format!("{:?} is no MAC address", nic.mac)));
            }
        }
        Ok(())
    }
}

/// The path as VMMs can take it: text, absolute, without line breaks.
pub(crate) fn text(path: &Path) -> Result<String, VmmError> {
    match path.to_str() {
        Some(text) if path.is_absolute() && !text.contains(|letter: char| letter.is_control()) => {
            Ok(text.to_owned())
        }
        _ => Err(VmmError::InvalidSpec(format!(
            "{path:?} is no absolute path of printable text"
        ))),
    }
}
