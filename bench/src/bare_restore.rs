//! The bare limit of a restore: a VMM that is started from the same device state and maps the same memory, by a program
//! that does nothing else, until the guest's agent has run a command.
//!
//! No record, no journal, no check of what is read, no clock, no new identity. The disks are copied beforehand.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hypeman_guest_api::host::{ExecOutput, GuestClient};
use hypeman_guest_api::{AgentKey, ExecRequest};
use hypeman_snapshots::CHUNK_BYTES;
use hypeman_store::{Store, StoreError};
use hypeman_vmm::{
    AgentChannel, Disk, GuestMemory, JailMode, JailOptions, Machine, MachineSpec, MemoryBacking, Patch,
    Restore, StateIdentity, Vmm, VmmKind, VmmOptions, Vmms,
};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::place::Place;
use crate::server::Server;
use crate::source;

/// Longer than a guest takes to answer under any load, also one of many whose kernel is interpreted.
const PATIENCE: Duration = Duration::from_secs(180);

/// An empty file: what a machine that goes on loads as kernel and initramfs, which some VMMs open all the same.
const NOTHING: &str = "nothing";

/// What captured machines are started with.
#[derive(Debug)]
pub struct BareVmms {
    /// Where what is asked of a machine runs.
    pub runtime: Runtime,
    vmms: Vmms,
    folder: tempfile::TempDir,
}

/// A captured machine, ready to be started.
#[derive(Debug)]
pub struct BareRestore<'a> {
    host: &'a BareVmms,
    vmm: Arc<dyn Vmm>,
    spec: MachineSpec,
    overlay: PathBuf,
    /// The state of its devices, as the driver has it.
    pub devices: Vec<u8>,
    identity: StateIdentity,
    /// What its agent knows the host by.
    pub key: AgentKey,
    /// Where its memory lies.
    pub memory: PathBuf,
}

impl BareVmms {
    /// Looks at the host. Disks are copied to the place where the server has its own. Nothing confines these VMMs, and KVM
    /// is trusted where the server trusts it.
    ///
    /// # Errors
    /// No runtime, no directory.
    pub fn new(context: &Context, place: &Place) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|error| BenchError::io("start a runtime", error))?;
        let mut builder = tempfile::Builder::new();
        builder.prefix("bare-");
        let folder = match place.directory() {
            Some(directory) => builder.tempdir_in(directory),
            None => builder.tempdir(),
        };
        let folder = folder.map_err(|error| BenchError::io("make a directory", error))?;
        std::fs::write(folder.path().join(NOTHING), [])
            .map_err(|error| BenchError::io("make a file", error))?;
        Ok(Self {
            runtime,
            vmms: Vmms::detect(VmmOptions {
                trust_kvm: context.trusts_kvm(),
                jail: JailOptions {
                    mode: JailMode::Off,
                    ..JailOptions::default()
                },
                ..VmmOptions::default()
            }),
            folder,
        })
    }

    /// Reads what a snapshot of `server` holds. Its memory must be one raw image: the first capture of a machine.
    ///
    /// # Errors
    /// There is no such snapshot, or its memory is kept otherwise.
    pub fn of(&self, server: &Server, snapshot: &str) -> Result<BareRestore<'_>> {
        let record = record(server, snapshot)?;
        let data = server.data_directory();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let source = &record["source"];
        let kind: VmmKind = serde_json::from_value(source["hypervisor"].clone())?;
        let vmm = self
            .vmms
            .get(kind)
            .ok_or_else(|| BenchError::Missing(format!("no bare reference for {kind:?}")))?;
        let memory = data
            .join("memory")
            .join(text(&record["memory"]["image"]))
            .join("memory.raw");
        let directory = data.join("snapshots").join(snapshot);
        let devices = std::fs::read(directory.join("devices.state"))
            .map_err(|error| BenchError::io("read a device state", error))?;
        let manifest = std::fs::read(directory.join("manifest.json"))
            .map_err(|error| BenchError::io("read a manifest", error))?;
        let manifest: Value = serde_json::from_slice(&manifest)?;
        let identity: StateIdentity = serde_json::from_value(manifest["facts"]["identity"].clone())?;
        let digest = text(&source["image_digest"]);
        let root = digest.rsplit(':').next().unwrap_or_default().to_owned();
        let spec = MachineSpec {
            id: String::new(),
            runtime_directory: PathBuf::new(),
            cpus: u32::try_from(number(&source["vcpus"])).unwrap_or(1),
            memory_bytes: number(&source["memory_bytes"]),
            memory: MemoryBacking::Private(memory.clone()),
            kernel: self.folder.path().join(NOTHING),
            initramfs: self.folder.path().join(NOTHING),
            kernel_arguments: Vec::new(),
            disks: vec![Disk {
                path: data.join("images").join(root).join("rootfs.erofs"),
                read_only: true,
                limit: None,
            }],
            nic: None,
            hotplug_bytes: 0,
            host_devices: Vec::new(),
            workload_log: PathBuf::new(),
            vmm_log: PathBuf::new(),
        };
        Ok(BareRestore {
            host: self,
            vmm,
            spec,
            overlay: directory.join("overlay.raw"),
            devices,
            identity,
            key: key(&text(&record["memory"]["agent_key"]))?,
            memory,
        })
    }
}

impl BareRestore<'_> {
    /// Starts `count` machines at once and returns the time until the last one has run a command. They end afterwards.
    ///
    /// # Errors
    /// One of them does not answer.
    pub fn restore(&self, count: usize) -> Result<Duration> {
        let specs: Vec<MachineSpec> = (0..count)
            .map(|number| self.spec(number))
            .collect::<Result<_>>()?;
        let outcome = self.host.runtime.block_on(async {
            let started = Instant::now();
            let running = specs.into_iter().map(|spec| {
                let (vmm, key) = (Arc::clone(&self.vmm), self.key.clone());
                let restore = Restore {
                    identity: self.identity.clone(),
                    device_state: self.devices.clone(),
                    patch: None,
                };
                tokio::spawn(async move { wake(vmm, spec, restore, &key).await })
            });
            let ended = futures::future::join_all(running.collect::<Vec<_>>()).await;
            let took = started.elapsed();
            let mut failure = None;
            for machine in ended {
                match machine {
                    Ok(Ok(machine)) => drop(machine.kill().await),
                    Ok(Err(error)) => failure = Some(error),
                    Err(error) => failure = Some(BenchError::Answer(error.to_string())),
                }
            }
            failure.map_or(Ok(took), Err)
        });
        for number in 0..count {
            self.forget(number);
        }
        outcome
    }

    /// Starts one machine and returns when it has run a command.
    ///
    /// # Errors
    /// It does not answer.
    pub fn start(&self, spec: MachineSpec, patch: Option<Patch>) -> Result<Box<dyn Machine>> {
        let restore = Restore {
            identity: self.identity.clone(),
            device_state: self.devices.clone(),
            patch,
        };
        let running = wake(Arc::clone(&self.vmm), spec, restore, &self.key);
        self.host.runtime.block_on(running)
    }

    /// What it runs on.
    pub fn kind(&self) -> VmmKind {
        self.vmm.kind()
    }

    /// Starts one machine whose memory is its process's own, as after a boot, and returns when it has run a command.
    ///
    /// # Errors
    /// It does not answer, or Firecracker is to do that.
    pub fn start_filled(&self, mut spec: MachineSpec) -> Result<Box<dyn Machine>> {
        let from = File::open(&self.memory).map_err(|error| BenchError::io("open guest memory", error))?;
        spec.memory = MemoryBacking::Anonymous;
        let fill = move |memory: &GuestMemory| -> std::io::Result<()> {
            let mut buffer = vec![0; CHUNK_BYTES];
            for extent in source::extents(&from)? {
                for start in (extent.start..extent.end).step_by(CHUNK_BYTES) {
                    let end = extent.end.min(start + CHUNK_BYTES as u64);
                    let buffer = &mut buffer[..(end - start) as usize];
                    from.read_exact_at(buffer, start)?;
                    memory.write(start, buffer)?;
                }
            }
            Ok(())
        };
        self.start(spec, Some(Box::new(fill)))
    }

    /// Removes the files of machine `number`, which has ended.
    pub fn forget(&self, number: usize) {
        let _ = std::fs::remove_dir_all(self.host.folder.path().join(number.to_string()));
    }

    /// Describes machine `number`, with disks of its own.
    ///
    /// # Errors
    /// They cannot be copied.
    pub fn spec(&self, number: usize) -> Result<MachineSpec> {
        let folder = self.host.folder.path().join(number.to_string());
        std::fs::create_dir_all(&folder).map_err(|error| BenchError::io("make a directory", error))?;
        let overlay = folder.join("overlay.raw");
        copy_sparse(&self.overlay, &overlay)?;
        let mut spec = MachineSpec {
            id: format!("bare-{number}"),
            workload_log: folder.join("app.log"),
            vmm_log: folder.join("vmm.log"),
            runtime_directory: folder,
            ..self.spec.clone()
        };
        spec.disks.push(Disk {
            path: overlay,
            read_only: false,
            limit: None,
        });
        Ok(spec)
    }
}

async fn wake(
    vmm: Arc<dyn Vmm>,
    spec: MachineSpec,
    restore: Restore,
    key: &AgentKey,
) -> Result<Box<dyn Machine>> {
    let failed = |error: &dyn std::fmt::Display| BenchError::Answer(format!("the bare restore: {error}"));
    let machine = vmm
        .restore(&spec, restore)
        .await
        .map_err(|error| failed(&error))?;
    machine.resume().await.map_err(|error| failed(&error))?;
    answer(&machine.agent_channel(), key).await?;
    Ok(machine)
}

/// Returns when the guest behind a channel has run a command.
///
/// # Errors
/// It does not answer.
pub async fn answer(channel: &AgentChannel, key: &AgentKey) -> Result<()> {
    let failed = |error: &dyn std::fmt::Display| BenchError::Answer(format!("the bare restore: {error}"));
    let began = Instant::now();
    // A vsock device of a machine that has just gone on refuses for a moment, and the client itself has little patience.
    let client = loop {
        let attempt = async {
            let stream = channel.connect().await?;
            let (client, _events) = GuestClient::connect(stream, Some(key), PATIENCE)
                .await
                .map_err(std::io::Error::other)?;
            // It was captured with its workload held still.
            client.thaw().await.map_err(std::io::Error::other)?;
            Ok::<_, std::io::Error>(client)
        };
        match attempt.await {
            Ok(client) => break client,
            Err(error) if began.elapsed() > PATIENCE => return Err(failed(&error)),
            Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
        }
    };
    let request = ExecRequest {
        command: vec!["/bin/true".to_owned()],
        tty: None,
        environment: Vec::new(),
        working_directory: None,
        timeout: None,
    };
    let mut session = client.exec(request).await.map_err(|error| failed(&error))?;
    while let Some(output) = session.next().await.map_err(|error| failed(&error))? {
        if matches!(output, ExecOutput::Exit(0)) {
            return Ok(());
        }
    }
    Err(failed(&"its command failed"))
}

/// The stored record of a snapshot.
///
/// # Errors
/// There is none.
pub fn record(server: &Server, snapshot: &str) -> Result<Value> {
    let fail = |error: StoreError| BenchError::Answer(format!("the store refuses to be read: {error}"));
    let store = Store::open(&server.data_directory().join("metadata.db")).map_err(fail)?;
    store
        .read(|connection| hypeman_store::snapshots::get(connection, snapshot))
        .map_err(fail)?
        .ok_or_else(|| BenchError::Answer(format!("there is no record of snapshot {snapshot}")))
}

fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .args([from, to])
        .status()
        .map_err(|error| BenchError::io("copy a disk", error))?;
    if status.success() {
        return Ok(());
    }
    Err(BenchError::Answer(format!("cp of {}: {status}", from.display())))
}

fn key(text: &str) -> Result<AgentKey> {
    let mut key = [0; 32];
    for (place, byte) in key.iter_mut().enumerate() {
        let digits = text.get(2 * place..2 * place + 2);
        *byte = digits
            .and_then(|digits| u8::from_str_radix(digits, 16).ok())
            .ok_or_else(|| BenchError::Answer("a snapshot without the guest's key".into()))?;
    }
    Ok(AgentKey(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_32_bytes_in_hexadecimal_digits() {
        assert_eq!(key(&"0aff".repeat(16)).unwrap().0[..2], [10, 255]);
        assert!(key("0aff").is_err() && key(&"zz".repeat(32)).is_err());
    }
}
