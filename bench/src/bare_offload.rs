//! A captured machine on a bare Cloud Hypervisor, by its offload protocol alone, or by its own restore on demand.
//!
//! The machine is that of a snapshot of ours: the description is what Cloud Hypervisor tells of it once our driver has
//! restored it, the device state is what the driver kept.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypeman_guest_api::{AGENT_VSOCK_PORT, AgentKey};
use hypeman_vmm::{AgentChannel, MachineSpec};
use serde_json::{Value, json};

use crate::bare_cloud_hypervisor::{BareProcess, SOCKET, call, connect};
use crate::bare_restore::{BareRestore, BareVmms, answer};
use crate::error::{BenchError, Result};
use crate::offload::{Parts, Serving, Taken, Way, lay_out, receive, send};
use crate::source::Source;

/// What the driver's device state begins with, before two lengths.
const MAGIC: &[u8; 8] = b"hvchdev1";

/// A machine that can be restored by the protocol, again and again.
#[derive(Debug)]
pub struct BareOffload {
    program: PathBuf,
    described: Value,
    state: Vec<u8>,
    common_cpuid: Value,
    memory_manager: Value,
    slot: u32,
    memory_bytes: u64,
}

/// A machine that came by the protocol. Its process ends with it.
#[derive(Debug)]
pub struct Restored {
    process: BareProcess,
    folder: PathBuf,
    serving: Option<Serving>,
}

impl BareOffload {
    /// Starts the machine once by our driver to learn what it is.
    ///
    /// # Errors
    /// It does not start, or has more than one piece of memory.
    pub fn of(host: &BareVmms, captured: &BareRestore<'_>, program: &Path) -> Result<Self> {
        let spec = captured.spec(0)?;
        let memory_bytes = spec.memory_bytes;
        let socket = spec.runtime_directory.join(SOCKET);
        let machine = captured.start(spec, None)?;
        let info = call(&socket, "GET", "vm.info", None);
        let _ = host.runtime.block_on(machine.kill());
        captured.forget(0);
        let state = state_of(&captured.devices)?.to_vec();
        let whole: Value = serde_json::from_slice(&state)?;
        let part = |of: &Value| -> Result<Value> {
            let text = of["snapshot_data"]["state"].as_str().unwrap_or_default();
            Ok(serde_json::from_str(text)?)
        };
        let memory_manager = part(&whole["snapshots"]["memory-manager"])?;
        let slot = match memory_manager["guest_ram_mappings"].as_array().map(Vec::as_slice) {
            Some([piece]) => piece["slot"].as_u64().and_then(|slot| u32::try_from(slot).ok()),
            _ => None,
        };
        let slot =
            slot.ok_or_else(|| BenchError::Answer("the daemon knows memory of one piece only".into()))?;
        let common_cpuid = part(&whole)?["common_cpuid"].clone();
        Ok(Self {
            program: program.to_owned(),
            described: info?["config"].clone(),
            state,
            common_cpuid,
            memory_manager,
            slot,
            memory_bytes,
        })
    }

    /// Starts a process in the directory of `spec`, makes it the machine, and returns when that has run a command.
    ///
    /// # Errors
    /// The process refuses, or the guest does not answer.
    pub fn restore(
        &self,
        host: &BareVmms,
        key: &AgentKey,
        spec: &MachineSpec,
        way: Way,
        source: Source,
    ) -> Result<Restored> {
        let process = BareProcess::start(&self.program, &spec.runtime_directory)?;
        let channel = AgentChannel::VsockSocket {
            path: vsock(spec),
            port: AGENT_VSOCK_PORT,
        };
        let sent = self.hand_over(&process, spec, way, source).and_then(|serving| {
            host.runtime.block_on(answer(&channel, key))?;
            Ok(serving)
        });
        Ok(Restored {
            serving: sent.map_err(|error| process.explain(&error))?,
            folder: spec.runtime_directory.clone(),
            process,
        })
    }

    /// Starts a process in the directory of `spec` that restores the machine and reads pages of its raw `memory` when
    /// they are touched (since v52); returns the time until the guest has run a command. It ends afterwards.
    ///
    /// # Errors
    /// The process refuses, or the guest does not answer.
    pub fn restore_on_demand(
        &self,
        host: &BareVmms,
        key: &AgentKey,
        spec: &MachineSpec,
        memory: &Path,
    ) -> Result<Duration> {
        let fail = |error| BenchError::io("lay out a snapshot for Cloud Hypervisor", error);
        let source = spec.runtime_directory.join("source");
        std::fs::create_dir_all(&source).map_err(fail)?;
        let description = self.machine(spec, false)?.to_string();
        std::fs::write(source.join("config.json"), description).map_err(fail)?;
        std::fs::write(source.join("state.json"), &self.state).map_err(fail)?;
        // It has all ranges of memory one after the other, as a raw image has them.
        symlink(memory, source.join("memory-ranges")).map_err(fail)?;
        let order = json!({
            "source_url": format!("file://{}", source.display()),
            "memory_restore_mode": "OnDemand",
        });
        let channel = AgentChannel::VsockSocket {
            path: vsock(spec),
            port: AGENT_VSOCK_PORT,
        };
        let began = Instant::now();
        let process = BareProcess::start(&self.program, &spec.runtime_directory)?;
        let restored = call(&process.socket, "PUT", "vm.restore", Some(&order))
            .and_then(|_| call(&process.socket, "PUT", "vm.resume", None))
            .and_then(|_| host.runtime.block_on(answer(&channel, key)));
        let took = began.elapsed();
        restored.map(|()| took).map_err(|error| process.explain(&error))
    }

    fn hand_over(
        &self,
        process: &BareProcess,
        spec: &MachineSpec,
        way: Way,
        source: Source,
    ) -> Result<Option<Serving>> {
        let parts = self.parts(spec, way)?;
        let target = spec.runtime_directory.join("restore.sock");
        let mode = match way {
            Way::Filled => "Precopy",
            Way::Shared | Way::Inline => "Postcopy",
        };
        let order = json!({ "receiver_url": format!("unix:{}", target.display()), "memory_mode": mode });
        let socket = process.socket.clone();
        // It is answered when all has been received.
        let receiving =
            std::thread::spawn(move || call(&socket, "PUT", "vm.receive-migration", Some(&order)));
        // Memory is laid out while the process starts.
        let source = Arc::new(source);
        let memory = lay_out(way, &source, self.memory_bytes).map_err(spoken)?;
        let sent = connect(&target, || receiving.is_finished()).and_then(|stream| {
            let served = (way != Way::Filled).then_some(source);
            send(stream, &target, &parts, memory.as_ref(), served)
        });
        if sent.is_ok() || receiving.is_finished() {
            // What the process has to say of a failure is more than that it hung up.
            receiving
                .join()
                .map_err(|_| BenchError::Answer("a thread panicked".into()))??;
        }
        sent.map_err(spoken)
    }

    /// The description of the machine with files of its own, and memory that is not a file's.
    fn machine(&self, spec: &MachineSpec, shared: bool) -> Result<Value> {
        let mut machine = self.described.clone();
        let disks = machine["disks"].as_array_mut().into_iter().flatten();
        for (described, disk) in disks.zip(&spec.disks) {
            described["path"] = json!(disk.path);
        }
        machine["vsock"]["socket"] = json!(vsock(spec));
        let zone = machine
            .pointer_mut("/memory/zones/0")
            .and_then(Value::as_object_mut);
        let zone = zone.ok_or_else(|| BenchError::Answer("a machine without a zone of memory".into()))?;
        zone.remove("file");
        zone.insert("shared".to_owned(), json!(shared));
        Ok(machine)
    }

    fn parts(&self, spec: &MachineSpec, way: Way) -> Result<Parts> {
        let config = json!({
            "vm_config": self.machine(spec, way != Way::Inline)?,
            "common_cpuid": self.common_cpuid,
            "memory_manager_data": self.memory_manager,
        });
        Ok(Parts {
            slot: self.slot,
            config: serde_json::to_vec(&config)?,
            state: self.state.clone(),
        })
    }
}

impl Restored {
    /// Its process.
    pub fn process(&self) -> u32 {
        self.process.process()
    }

    /// Whether it will ask for no page any more.
    pub fn has_all(&self) -> bool {
        self.serving.as_ref().is_none_or(Serving::is_finished)
    }

    /// Captures it; its process ends by itself then.
    ///
    /// # Errors
    /// The process refuses.
    pub fn capture(&self) -> Result<Taken> {
        let socket = self.folder.join("capture.sock");
        let listener = UnixListener::bind(&socket).map_err(spoken)?;
        let order = json!({ "destination_url": format!("unix:{}", socket.display()), "local": true });
        call(&self.process.socket, "PUT", "vm.send-migration", Some(&order))
            .and_then(|_| receive(&listener).map_err(spoken))
            .map_err(|error| self.process.explain(&error))
    }

    /// Ends it, and whoever serves it.
    pub fn end(self) {
        drop(self.process);
        if let Some(serving) = self.serving {
            let _ = serving.join();
        }
    }
}

fn vsock(spec: &MachineSpec) -> PathBuf {
    spec.runtime_directory.join("vsock.sock")
}

fn spoken(error: std::io::Error) -> BenchError {
    BenchError::io("speak the offload protocol", error)
}

/// What Cloud Hypervisor wrote of a device state of our driver: magic, two lengths, our facts, and then that.
fn state_of(devices: &[u8]) -> Result<&[u8]> {
    let parts = || {
        let rest = devices.strip_prefix(MAGIC)?;
        let (facts, rest) = rest.split_first_chunk::<4>()?;
        let (state, rest) = rest.split_first_chunk::<8>()?;
        let facts = u32::from_le_bytes(*facts) as usize;
        let end = facts.checked_add(usize::try_from(u64::from_le_bytes(*state)).ok()?)?;
        rest.get(facts..end)
    };
    parts().ok_or_else(|| BenchError::Answer("a device state that is not Cloud Hypervisor's".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_of_the_vmm_lies_between_our_facts_and_the_pages() {
        let mut devices = MAGIC.to_vec();
        devices.extend_from_slice(&2_u32.to_le_bytes());
        devices.extend_from_slice(&5_u64.to_le_bytes());
        devices.extend_from_slice(b"{}statepages");
        assert_eq!(state_of(&devices).unwrap(), b"state");
        assert!(state_of(&devices[..20]).is_err());
        assert!(state_of(b"something else").is_err());
    }
}
