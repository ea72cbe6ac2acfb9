//! The bare limit of a pause: a VMM that is stopped, told to write devices and memory into files, and let go on, by a
//! client that does nothing else.
//!
//! ```text
//! snapshot of a running guest ─► the same guest beside it ─┬─ stop ─ write all (or what changed) ─ go on ─┐
//!                                                          └───────────────────────────────◄──────────────┘
//! Firecracker       a process of its own, memory mapped privately, what changes tracked
//! Cloud Hypervisor  started by our driver, memory its own, orders over its socket
//! QEMU              started by our driver, memory its own; the driver's connection ends, and ours takes its place
//! ```
//!
//! Files are written anew each time. Nothing is synced but what the VMM itself syncs.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hypeman_guest_api::AGENT_VSOCK_PORT;
use hypeman_vmm::{AgentChannel, Disk, Machine, VmmKind};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use crate::bare_cloud_hypervisor::{BareProcess, SOCKET, call, request};
use crate::bare_qmp::Qmp;
use crate::bare_restore::{BareRestore, BareVmms, answer};
use crate::context::need_program;
use crate::error::{BenchError, Result};

/// Number of the machine among those of its host.
const NUMBER: usize = 0;
/// Names of what is written.
const STATE: &str = "pause.state";
const MEMORY: &str = "pause.memory";
const DIRECTORY: &str = "pause";

/// What is written while the guest stands still.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// All of its memory.
    All,
    /// What changed since it was written last: Firecracker alone does that.
    Changed,
}

/// A running machine. It ends with this, and so do its files.
#[derive(Debug)]
pub struct BarePause {
    way: Way,
    process: u32,
    folder: PathBuf,
}

#[derive(Debug)]
enum Way {
    Firecracker(BareProcess),
    /// Nobody uses the driver's handle, but what the process says goes there.
    CloudHypervisor(PathBuf, #[allow(dead_code)] Box<dyn Machine>),
    Qemu(Qmp),
}

impl BarePause {
    /// Starts a captured machine; returns when it has run a command. The snapshot may go then.
    ///
    /// # Errors
    /// It does not start, or nothing is known of its VMM.
    pub fn start(host: &BareVmms, captured: &BareRestore<'_>) -> Result<Self> {
        captured.forget(NUMBER);
        let spec = captured.spec(NUMBER)?;
        let folder = spec.runtime_directory.clone();
        let started = match captured.kind() {
            VmmKind::Firecracker => firecracker(host, captured, &folder, &spec.disks)
                .map(|process| (process.process(), Way::Firecracker(process))),
            VmmKind::CloudHypervisor => captured.start_filled(spec).map(|machine| {
                let process = machine.process().pid;
                (process, Way::CloudHypervisor(folder.join(SOCKET), machine))
            }),
            VmmKind::Qemu | VmmKind::QemuMicrovm => captured.start_filled(spec).and_then(|machine| {
                let process = machine.process().pid;
                // It takes one connection at a time.
                drop(machine);
                match Qmp::open(&folder.join("qmp.sock")) {
                    Ok(qmp) => Ok((process, Way::Qemu(qmp))),
                    Err(error) => {
                        kill(process);
                        Err(error)
                    }
                }
            }),
            VmmKind::Vz => Err(BenchError::Missing("no bare pause of this VMM".into())),
        };
        match started {
            Ok((process, way)) => Ok(Self { way, process, folder }),
            Err(error) => {
                captured.forget(NUMBER);
                Err(error)
            }
        }
    }

    /// What it can be told to write.
    pub fn kinds(&self) -> &'static [Written] {
        match self.way {
            Way::Firecracker(_) => &[Written::All, Written::Changed],
            Way::CloudHypervisor(..) | Way::Qemu(_) => &[Written::All],
        }
    }

    /// How long the guest stands still, from before it is told to stop until it has been told to go on.
    ///
    /// # Errors
    /// The VMM refuses.
    pub fn pause(&mut self, written: Written) -> Result<Duration> {
        let fail = |error| BenchError::io("make room for a bare snapshot", error);
        for name in [STATE, MEMORY] {
            let _ = fs::remove_file(self.folder.join(name));
        }
        match &mut self.way {
            Way::Firecracker(process) => {
                let kind = match written {
                    Written::All => "Full",
                    Written::Changed => "Diff",
                };
                let order = json!({ "snapshot_type": kind, "snapshot_path": STATE, "mem_file_path": MEMORY });
                let state =
                    |state: &str| request(&process.socket, "PATCH", "/vm", Some(&json!({ "state": state })));
                let began = Instant::now();
                state("Paused")?;
                let made = request(&process.socket, "PUT", "/snapshot/create", Some(&order));
                state("Resumed")?;
                let took = began.elapsed();
                made.map(|_| took)
            }
            Way::CloudHypervisor(socket, _) => {
                let directory = self.folder.join(DIRECTORY);
                let _ = fs::remove_dir_all(&directory);
                fs::create_dir(&directory).map_err(fail)?;
                let order = json!({ "destination_url": format!("file://{}", directory.display()) });
                let began = Instant::now();
                call(socket, "PUT", "vm.pause", None)?;
                let made = call(socket, "PUT", "vm.snapshot", Some(&order));
                call(socket, "PUT", "vm.resume", None)?;
                let took = began.elapsed();
                made.map(|_| took)
            }
            Way::Qemu(qmp) => {
                let file = File::create(self.folder.join(MEMORY)).map_err(fail)?;
                qmp.pause_and_write(&file)
            }
        }
    }
}

impl Drop for BarePause {
    fn drop(&mut self) {
        kill(self.process);
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn kill(process: u32) {
    if let Some(process) = Pid::from_raw(process.cast_signed()) {
        let _ = kill_process(process, Signal::KILL);
    }
}

/// Starts Firecracker by itself with a captured machine. Its state names files by short names in its directory.
fn firecracker(
    host: &BareVmms,
    captured: &BareRestore<'_>,
    folder: &Path,
    disks: &[Disk],
) -> Result<BareProcess> {
    let program = need_program("firecracker")?;
    let lay_out = || -> io::Result<()> {
        for (index, disk) in disks.iter().enumerate() {
            symlink(&disk.path, folder.join(format!("disk{index}")))?;
        }
        fs::write(folder.join("state"), &captured.devices)
    };
    lay_out().map_err(|error| BenchError::io("lay out a machine for Firecracker", error))?;
    let order = json!({
        "snapshot_path": "state",
        "mem_backend": { "backend_type": "File", "backend_path": captured.memory },
        "track_dirty_pages": true,
        "resume_vm": true,
    });
    let channel = AgentChannel::VsockSocket {
        path: folder.join("v.sock"),
        port: AGENT_VSOCK_PORT,
    };
    let process = BareProcess::spawn(&program, &["--api-sock", SOCKET], folder)?;
    let loaded = request(&process.socket, "PUT", "/snapshot/load", Some(&order))
        .and_then(|_| host.runtime.block_on(answer(&channel, &captured.key)));
    match loaded {
        Ok(()) => Ok(process),
        Err(error) => Err(process.explain(&error)),
    }
}
