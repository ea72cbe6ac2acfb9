//! Firecracker.
//!
//! ```text
//! launch:  configuration file ─► spawn in its own directory ─► socket answers ─► memory found ─► Machine
//!                                  │ any failure: kill, reap, remove, tell the end of the log
//! restore: spawn ─► socket answers ─► load (memory mapped privately, or served) ─► patch ─► Machine, paused
//! adopt:   pidfd ─► identity equal? ─► let go of what a dead server held ─► Machine
//! ```
//!
//! Firecracker writes the paths of disks and sockets into its device state and opens the same ones when it loads it.
//! So it works in a directory of the machine and knows them by short relative names, which lead elsewhere in each
//! machine (`files.rs`): no fork depends on its source's directory.

mod adjust;
mod configuration;
mod files;
mod hold;
mod machine;
#[cfg(test)]
mod saving_tests;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hypeman_core::Undo;
use hyper::Method;

use self::files::Files;
use self::machine::FirecrackerMachine;
use crate::binaries::{Binaries, Binary, Version};
use crate::blocking::blocking;
use crate::console::Console;
use crate::files::io_error;
use crate::gate::KvmGate;
use crate::kernel_arguments;
use crate::memory::{Segment, locate};
use crate::probe::processor_abilities;
use crate::process::{ByName, ProcessHandle, Starting, processes_with_argument};
use crate::rest::RestClient;
use crate::socket::until_it_listens;
use crate::workload_log::WorkloadLog;
use crate::{
    Accelerator, Capabilities, Feature, GuestMemory, Jail, Machine, MachineSpec, MemoryBacking,
    ProcessIdentity, Restore, StateIdentity, Vmm, VmmError, VmmKind, VmmOptions,
};

/// Before it, a guest could write outside of its queues (CVE-2026-5747), and older ones still have further holes (as
/// CVE-2019-18960). It is also the oldest whose configuration and device state this driver was verified with.
pub(crate) const OLDEST: Version = Version::new(1, 15, 1);
/// Goes up when a machine of the same specification gets other devices than before.
const DEVICES_REVISION: u32 = 1;
/// How long a starting Firecracker may take until it answers. It takes 10 ms on an idle machine.
const START_DEADLINE: Duration = Duration::from_secs(60);
/// Loading maps memory and reads none of it.
const LOAD_DEADLINE: Duration = Duration::from_secs(60);
/// Where the gap for 32-bit devices begins; memory goes on above 4 GiB in a mapping of its own.
const GAP: u64 = 3 << 30;
/// What lies between 4 GiB and the gap for 64-bit devices.
const FAR_GAP: u64 = (256 << 30) - (4 << 30);
/// Where the boot protocol puts the kernel's command line.
const COMMAND_LINE: u64 = 0x20000;
/// The MMIO bus of Firecracker has so many interrupt lines; some are for the other devices.
const MAX_DISKS: usize = 13;

/// Firecracker on this host.
#[derive(Debug)]
pub(crate) struct Firecracker {
    binaries: Binaries,
    kvm: KvmGate,
    jail: Arc<Jail>,
}

impl Firecracker {
    pub(crate) fn new(
        options: &VmmOptions,
        search_path: Vec<PathBuf>,
        kvm: KvmGate,
        jail: Arc<Jail>,
    ) -> Self {
        let binaries = Binaries::new(
            "Firecracker",
            "firecracker",
            OLDEST,
            options.firecracker_binary.clone(),
            search_path,
            options.versions_directory.as_deref(),
        );
        Self { binaries, kvm, jail }
    }

    async fn usable(&self) -> Result<Vec<Binary>, VmmError> {
        let binaries = self.binaries.all().await?;
        self.kvm.check().await?;
        Ok(binaries)
    }

    async fn start(
        &self,
        spec: &MachineSpec,
        binary: &Binary,
        restore: Option<Restore>,
    ) -> Result<FirecrackerMachine, VmmError> {
        configuration::check(spec, MAX_DISKS)?;
        let files = Files::of(&spec.runtime_directory);
        let left = files.clone();
        let made = Undo::by(move || left.remove());
        files.prepare(spec)?;
        let workload_log = WorkloadLog::listen(&files.log_socket(), &spec.workload_log)?;
        let command_line = kernel_arguments::firecracker(spec)?;
        let boots = restore.is_none();
        if boots {
            files.write_configuration(&configuration::boot(spec, &command_line))?;
        }
        let (console, log) = Console::begin(spec, None)?;
        // It writes its own memory into a file.
        let (kind, written) = (VmmKind::Firecracker, spec.memory_bytes);
        let start =
            ByName::prepare(&self.jail, kind, &binary.path, spec, files.own(), boots, written).await?;
        let memory = start.memory.clone();

        let program = start.detached(arguments(spec, &files, boots), files.own().path(), log, None);
        let starting = Starting::spawn(kind, program, &console).await?;
        let client = RestClient::new(files.api_socket(), Arc::clone(starting.process()));
        let ready = async {
            until_it_listens(client.socket(), START_DEADLINE).await?;
            let segments = match restore {
                None => booted(&client, spec, &command_line).await?,
                Some(restore) => load(&client, spec, &memory, &files, restore).await?,
            };
            files.remember_memory(&segments).map(|()| segments)
        };
        let (segments, jail) = starting.until(ready).await?;
        made.forget();
        let identity = Some(identity(binary.version));
        Ok(FirecrackerMachine::new(
            client,
            files,
            console,
            Some(segments),
            identity,
            spec,
            workload_log,
        )
        .in_jail(jail))
    }
}

/// The command line. `boots`: there is a configuration.
fn arguments(spec: &MachineSpec, files: &Files, boots: bool) -> Vec<OsString> {
    let mut arguments = vec![
        "--id".into(),
        spec.id.clone().into(),
        "--api-sock".into(),
        files.api_socket().into_os_string(),
        "--level".into(),
        "Warning".into(),
    ];
    if boots {
        arguments.extend(["--config-file".into(), files::CONFIGURATION.into()]);
    }
    arguments
}

/// Finds the memory of a machine that has just begun to boot.
async fn booted(
    client: &RestClient,
    spec: &MachineSpec,
    command_line: &str,
) -> Result<Vec<Segment>, VmmError> {
    // The socket is there before the machine is built; once this is answered it is built and runs.
    client
        .call(Method::GET, "/", None, START_DEADLINE)
        .await
        .map(drop)?;
    let (process, command_line) = (Arc::clone(client.process()), command_line.to_owned());
    let lengths = lengths(spec.memory_bytes);
    blocking(move || {
        let signature = locate::Signature {
            offset: COMMAND_LINE,
            bytes: command_line.as_bytes(),
        };
        locate::anonymous(&process, &lengths, &signature)
    })
    .await
    .map_err(VmmError::io("cannot find guest memory"))
}

/// Makes the process the captured machine, paused. `seen`: its memory, as the process sees it.
async fn load(
    client: &RestClient,
    spec: &MachineSpec,
    seen: &MemoryBacking,
    files: &Files,
    restore: Restore,
) -> Result<Vec<Segment>, VmmError> {
    files.write_state(&restore.device_state)?;
    let request = configuration::load(spec, seen)?;
    client
        .call(Method::PUT, "/snapshot/load", Some(&request), LOAD_DEADLINE)
        .await
        .map_err(VmmError::of_start)?;
    files.forget_state();
    let (process, memory) = (Arc::clone(client.process()), spec.memory.clone());
    let lengths = lengths(spec.memory_bytes);
    let segments = blocking(move || match &memory {
        MemoryBacking::Private(file) => locate::private_file(&process, file, &lengths),
        _ => locate::served(&process, &lengths),
    })
    .await
    .map_err(VmmError::io("cannot find guest memory"))?;
    if let Some(patch) = restore.patch {
        // No device has read guest memory yet: they do when the machine goes on.
        let (process, segments) = (Arc::clone(client.process()), segments.clone());
        blocking(move || patch(&GuestMemory::open(process, segments)?))
            .await
            .map_err(VmmError::io("cannot write the memory of the restored machine"))?;
    }
    Ok(segments)
}

/// Lengths of the mappings of guest memory.
fn lengths(memory_bytes: u64) -> Vec<u64> {
    let mut rest = memory_bytes;
    let mut lengths = Vec::new();
    for room in [GAP, FAR_GAP, u64::MAX] {
        let part = rest.min(room);
        if part > 0 {
            lengths.push(part);
        }
        rest -= part;
    }
    lengths
}

fn identity(version: Version) -> StateIdentity {
    StateIdentity {
        vmm: VmmKind::Firecracker,
        version: version.to_string(),
        machine: format!("devices={DEVICES_REVISION}"),
        cpu: format!("host {}", processor_abilities()),
        accelerator: Accelerator::Kvm,
    }
}

#[async_trait]
impl Vmm for Firecracker {
    fn kind(&self) -> VmmKind {
        VmmKind::Firecracker
    }

    async fn capabilities(&self) -> Capabilities {
        match self.usable().await {
            Ok(binaries) => Capabilities::Available {
                version: binaries[0].version.to_string(),
                accelerator: Accelerator::Kvm,
                features: vec![
                    Feature::Snapshots,
                    Feature::Standby,
                    Feature::Fork,
                    Feature::Pause,
                    Feature::BalloonControl,
                    Feature::Vsock,
                    Feature::DiskIoLimit,
                ],
            },
            Err(error) => Capabilities::Unavailable {
                reason: error.to_string(),
            },
        }
    }

    fn max_disks(&self) -> usize {
        MAX_DISKS
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Box<dyn Machine>, VmmError> {
        let binaries = self.usable().await?;
        Ok(Box::new(self.start(spec, &binaries[0], None).await?))
    }

    async fn restore(&self, spec: &MachineSpec, restore: Restore) -> Result<Box<dyn Machine>, VmmError> {
        let binaries = self.usable().await?;
        let wrote_it = |binary: &&Binary| identity(binary.version) == restore.identity;
        let binary = binaries.iter().find(wrote_it).ok_or_else(|| {
            VmmError::StartFailed(format!(
                "the device state was written by Firecracker {}, which is not here",
                restore.identity.version
            ))
        })?;
        Ok(Box::new(self.start(spec, binary, Some(restore)).await?))
    }

    async fn state_identities(&self) -> Result<Vec<StateIdentity>, VmmError> {
        let binaries = self.usable().await?;
        Ok(binaries.iter().map(|binary| identity(binary.version)).collect())
    }

    async fn adopt(
        &self,
        spec: &MachineSpec,
        process: &ProcessIdentity,
        identity: Option<&StateIdentity>,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let process = ProcessHandle::adopt(process)?;
        let files = Files::of(&spec.runtime_directory);
        files.let_go_of_a_hold();
        let client = RestClient::new(files.api_socket(), process);
        let console = Console::new(spec.vmm_log.clone(), None);
        let segments = files.remembered_memory();
        let workload_log = WorkloadLog::listen(&files.log_socket(), &spec.workload_log)?;
        let machine = FirecrackerMachine::new(
            client,
            files,
            console,
            segments,
            identity.cloned(),
            spec,
            workload_log,
        );
        Ok(Box::new(machine.taken_back()))
    }

    fn find_orphans(&self, runtime_directory: &Path) -> Result<Vec<ProcessIdentity>, VmmError> {
        let socket = Files::of(runtime_directory).api_socket();
        processes_with_argument(&self.binaries.executable_names(), socket.as_os_str())
            .map_err(io_error("cannot scan", Path::new("/proc")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_above_the_gap_is_another_mapping() {
        assert_eq!(lengths(128 << 20), [128 << 20]);
        assert_eq!(lengths(3 << 30), [3 << 30]);
        assert_eq!(lengths((3 << 30) + 4096), [3 << 30, 4096]);
        let huge = lengths(300 << 30);
        assert_eq!(huge.len(), 3);
        assert_eq!(huge.iter().sum::<u64>(), 300 << 30);
    }
}
