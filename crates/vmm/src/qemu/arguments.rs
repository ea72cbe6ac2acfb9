//! The command line of QEMU, as a pure function of the machine.
//!
//! Invariant: no word of a spec can become an option. Values go into JSON where QEMU takes JSON; elsewhere they
//! are either checked against a narrow alphabet or their commas are doubled.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::board::{Board, Slot};
use crate::spec::text;
use crate::{Accelerator, Disk, MachineSpec, MemoryBacking, VmmError, kernel_arguments};

/// Name of the pid file in the runtime directory. Its path on the command line marks the process as ours.
pub(crate) const PID_FILE: &str = "qemu.pid";
/// Name of the control socket in the runtime directory.
pub(crate) const QMP_SOCKET: &str = "qmp.sock";
/// Name of the agent's socket in the runtime directory.
pub(crate) const AGENT_SOCKET: &str = "agent.sock";
/// The agent's socket and its port, as QEMU names them to us.
pub(crate) const AGENT_CHARDEV: &str = "agent";
pub(crate) const AGENT_PORT_DEVICE: &str = "agent-port";
/// Name of the guest's port for its agent.
const AGENT_PORT: &str = "hypeman.agent.0";
/// Name of the guest's port for the workload's output.
const LOG_PORT: &str = "hypeman.log.0";
/// Object that a [`crate::Machine::reopen_workload_log`] replaces.
pub(crate) const LOG_CHARDEV: &str = "log";
/// Object that a [`crate::Machine::reopen_vmm_log`] replaces.
pub(crate) const CONSOLE_CHARDEV: &str = "console";

pub(crate) const MEBIBYTE: u64 = 1024 * 1024;

/// What the command line needs to know of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    pub(crate) accelerator: Accelerator,
    /// Versioned name of the q35 board, as `pc-q35-7.2`.
    pub(crate) q35_name: String,
    /// `qboot.rom`, which starts a kernel faster than the default firmware.
    pub(crate) firmware: Option<PathBuf>,
    /// Frequency of the time stamp counter in kHz, where the guest sees the host's.
    pub(crate) tsc_khz: Option<u64>,
    /// This QEMU can map a file that it opened only for reading.
    pub(crate) read_only_memory_files: bool,
    /// This QEMU was built with seccomp.
    pub(crate) sandbox: bool,
}

/// What the process is to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// A machine that boots its kernel.
    Boot,
    /// A machine whose device state comes through this descriptor. It stays paused.
    Restore {
        /// Read end of the pipe.
        state: i32,
    },
}

/// Numbers of the listening sockets that QEMU inherits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sockets {
    pub(crate) qmp: i32,
    pub(crate) agent: i32,
}

/// What a QEMU inherits that cannot open it by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Handed {
    /// The TAP.
    pub(crate) tap: Option<i32>,
    /// Files; the first is `/dev/fdset/1` to it, and so on.
    pub(crate) files: Vec<i32>,
}

/// Translates a machine into the arguments of QEMU.
pub(crate) fn arguments(
    board: Board,
    spec: &MachineSpec,
    host: &Host,
    sockets: Sockets,
    start: Start,
    handed: &Handed,
) -> Result<Vec<OsString>, VmmError> {
    check(board, spec)?;
    let memory_mib = spec.memory_bytes.div_ceil(MEBIBYTE);
    let mut line = Line::default();

    line.option("-name", format!("guest={},debug-threads=on", spec.id));
    line.flags(&["-nodefaults", "-no-user-config", "-no-reboot"]);
    line.option("-display", "none");
    line.option("-msg", "timestamp=on");
    if host.sandbox {
        line.option(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
    }
    line.option("-pidfile", text(&spec.runtime_directory.join(PID_FILE))?);
    for (index, file) in handed.files.iter().enumerate() {
        line.option("-add-fd", format!("fd={file},set={}", index + 1));
    }

    // A state without memory has no description at its end, and none shall be missed.
    let expectations = match start {
        Start::Boot => "",
        Start::Restore { .. } => ",suppress-vmdesc=on",
    };
    line.option(
        "-machine",
        format!(
            "{},memory-backend=mem{expectations}",
            board.machine(&host.q35_name)
        ),
    );
    match host.accelerator {
        Accelerator::Kvm => {
            line.option("-accel", "kvm");
            line.option("-cpu", "host");
        }
        Accelerator::Tcg => {
            line.option("-accel", "tcg,thread=multi");
            line.option("-cpu", "max");
        }
    }
    line.option(
        "-smp",
        format!("cpus={cpus},sockets=1,cores={cpus},threads=1", cpus = spec.cpus),
    );
    line.option("-m", format!("size={memory_mib}M"));
    line.json("-object", memory(spec, memory_mib, host)?);

    if let Some(firmware) = &host.firmware {
        line.option("-bios", text(firmware)?);
    }
    match start {
        Start::Boot => {
            line.option("-kernel", text(&spec.kernel)?);
            line.option("-initrd", text(&spec.initramfs)?);
            line.option("-append", kernel_arguments::qemu(spec, host.tsc_khz)?);
        }
        // The captured machine has long read its kernel, and a reboot ends it: nothing is loaded in vain.
        Start::Restore { state } => {
            line.flags(&["-S"]);
            // Nor has it the settings of its writer at its head.
            line.option("-global", "migration.send-configuration=off");
            line.option("-incoming", format!("fd:{state}"));
        }
    }

    line.option(
        "-chardev",
        format!("socket,id=qmp,fd={},server=on,wait=off", sockets.qmp),
    );
    line.option("-mon", "chardev=qmp,mode=control");
    line.option("-chardev", file_chardev(CONSOLE_CHARDEV, &spec.vmm_log)?);
    line.option("-serial", format!("chardev:{CONSOLE_CHARDEV}"));

    line.option(
        "-chardev",
        format!(
            "socket,id={AGENT_CHARDEV},fd={},server=on,wait=off",
            sockets.agent
        ),
    );
    line.option("-chardev", file_chardev(LOG_CHARDEV, &spec.workload_log)?);
    line.json("-device", board.device("serial", "serial", Slot::Serial));
    line.json(
        "-device",
        serial_port(AGENT_PORT_DEVICE, AGENT_CHARDEV, AGENT_PORT, 1),
    );
    line.json("-device", serial_port("log-port", LOG_CHARDEV, LOG_PORT, 2));

    line.json("-object", json!({ "qom-type": "rng-builtin", "id": "entropy" }));
    line.json(
        "-device",
        with(board.device("rng", "rng", Slot::Random), "rng", json!("entropy")),
    );
    let balloon = board.device("balloon", "balloon", Slot::Balloon);
    let balloon = with(balloon, "deflate-on-oom", json!(true));
    line.json("-device", with(balloon, "free-page-reporting", json!(true)));
    if board == Board::Q35 {
        line.json("-device", json!({ "driver": "pvpanic", "id": "pvpanic" }));
    }

    if let Some(nic) = &spec.nic {
        line.option(
            "-netdev",
            match handed.tap {
                Some(tap) => format!("tap,id=net,fd={tap},vhost=off"),
                None => format!("tap,id=net,ifname={},script=no,downscript=no,vhost=off", nic.tap),
            },
        );
        let device = with(board.device("net", "nic", Slot::Nic), "netdev", json!("net"));
        let device = with(device, "mac", json!(nic.mac));
        // No network boot, so no option ROM for it.
        let device = if board == Board::Q35 {
            with(device, "romfile", json!(""))
        } else {
            device
        };
        line.json("-device", device);
    }
    for (index, disk) in spec.disks.iter().enumerate() {
        add_disk(&mut line, board, index, disk)?;
    }
    Ok(line.words)
}

/// Name of the node that holds a disk as the guest sees it, under its limit.
pub(crate) fn raw_node(index: usize) -> String {
    format!("disk{index}-raw")
}

fn add_disk(line: &mut Line, board: Board, index: usize, disk: &Disk) -> Result<(), VmmError> {
    let file = format!("disk{index}-file");
    let raw = raw_node(index);
    // A disk that is only read may be shared with a VMM of another make. Cloud Hypervisor locks the whole file against
    // writers, which QEMU takes for a refusal of everything; with nobody to write there is nothing to guard.
    let locking = if disk.read_only { "off" } else { "on" };
    line.json(
        "-blockdev",
        json!({
            "driver": "file",
            "node-name": file,
            "filename": text(&disk.path)?,
            "read-only": disk.read_only,
            "locking": locking,
            "aio": "threads",
            "discard": "unmap",
            "cache": { "direct": false, "no-flush": false },
        }),
    );
    line.json(
        "-blockdev",
        json!({
            "driver": "raw",
            "node-name": raw,
            "file": file,
            "read-only": disk.read_only,
            "discard": "unmap",
        }),
    );
    let mut drive = raw;
    if let Some(limit) = disk.limit {
        let group = format!("disk{index}-limit");
        let sustained = limit.bytes_per_second.max(1);
        line.json(
            "-object",
            json!({
                "qom-type": "throttle-group",
                "id": group,
                "limits": {
                    "bps-total": sustained,
                    "bps-total-max": limit.burst_bytes_per_second.max(sustained),
                    "bps-total-max-length": 1,
                },
            }),
        );
        let throttled = format!("disk{index}-throttle");
        line.json(
            "-blockdev",
            json!({
                "driver": "throttle",
                "node-name": throttled,
                "throttle-group": group,
                "file": drive,
                "read-only": disk.read_only,
                "discard": "unmap",
            }),
        );
        drive = throttled;
    }
    let device = board.device("blk", &format!("disk{index}"), Slot::Disk(index));
    let device = with(device, "drive", json!(drive));
    // A full host disk stops the machine until there is room; any other error is the guest's to handle.
    let device = with(device, "werror", json!("enospc"));
    line.json("-device", with(device, "rerror", json!("report")));
    Ok(())
}

fn memory(spec: &MachineSpec, memory_mib: u64, host: &Host) -> Result<Value, VmmError> {
    let size = memory_mib * MEBIBYTE;
    Ok(match &spec.memory {
        MemoryBacking::Private(path) => {
            let memory = json!({
                "qom-type": "memory-backend-file",
                "id": "mem",
                "size": size,
                "mem-path": text(path)?,
                "share": false,
                "dump": false,
            });
            match host.read_only_memory_files {
                true => with(with(memory, "readonly", json!(true)), "rom", json!("off")),
                false => memory,
            }
        }
        MemoryBacking::Served(_) => {
            return Err(VmmError::InvalidSpec(
                "QEMU asks nobody for the pages of its guest".to_owned(),
            ));
        }
        MemoryBacking::Anonymous => {
            json!({ "qom-type": "memory-backend-ram", "id": "mem", "size": size, "dump": false })
        }
    })
}

fn serial_port(id: &str, chardev: &str, name: &str, number: u32) -> Value {
    json!({
        "driver": "virtserialport",
        "id": id,
        "bus": "serial.0",
        "nr": number,
        "chardev": chardev,
        "name": name,
    })
}

fn file_chardev(id: &str, path: &Path) -> Result<String, VmmError> {
    Ok(format!("file,id={id},path={},append=on", escaped(path)?))
}

fn check(board: Board, spec: &MachineSpec) -> Result<(), VmmError> {
    spec.check_words()?;
    spec.check_plain(board.kind())?;
    if spec.cpus == 0 || spec.cpus > 255 {
        return Err(invalid(format!(
            "{} virtual CPUs: the board takes 1 to 255",
            spec.cpus
        )));
    }
    if spec.memory_bytes < 16 * MEBIBYTE {
        return Err(invalid(format!(
            "{} bytes of memory: no kernel starts in less than 16 MiB",
            spec.memory_bytes
        )));
    }
    if spec.disks.len() > board.max_disks() {
        return Err(invalid(format!(
            "{} disks: the board takes {}",
            spec.disks.len(),
            board.max_disks()
        )));
    }
    Ok(())
}

fn invalid(message: String) -> VmmError {
    VmmError::InvalidSpec(message)
}

/// The path as a value in a list of options, where a comma separates and two are one.
fn escaped(path: &Path) -> Result<String, VmmError> {
    Ok(text(path)?.replace(',', ",,"))
}

fn with(mut device: Value, key: &str, value: Value) -> Value {
    device[key] = value;
    device
}

#[derive(Default)]
struct Line {
    words: Vec<OsString>,
}

impl Line {
    fn flags(&mut self, flags: &[&str]) {
        self.words.extend(flags.iter().map(OsString::from));
    }

    fn option(&mut self, name: &str, value: impl Into<OsString>) {
        self.words.push(name.into());
        self.words.push(value.into());
    }

    fn json(&mut self, name: &str, value: Value) {
        self.option(name, value.to_string());
    }
}

#[cfg(test)]
#[path = "arguments_tests.rs"]
mod tests;
