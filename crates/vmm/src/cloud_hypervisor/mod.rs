//! Cloud Hypervisor.
//!
//! ```text
//! launch:  bind sockets ─► spawn (sockets inherited) ─► vm.create ─► vm.boot ─► memory found ─► Machine
//!                               │ any failure: kill, reap, remove what was made, tell its words
//! restore: the same, but vm.restore from a directory of our own making ─► patch ─► Machine, paused  (restore.rs)
//! adopt:   pidfd ─► identity equal? ─► Machine (memory is where it was written down)
//! ```
//!
//! The listening socket is made by us and inherited, so a call waits in its queue from the first instant and nobody
//! polls for a socket to appear. What Cloud Hypervisor itself says goes to memory, a bounded part of it: guests can make
//! it say a lot.

mod adjust;
mod capture;
mod config;
mod control;
mod events;
mod machine;
mod restore;
mod state;

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use hypeman_core::Undo;
use hypeman_guest_api::LOG_VSOCK_PORT;
use hypeman_jail::{Jail, Show};
use serde_json::Value;

use self::config::{API_SOCKET, Abilities, BOOT_KERNEL, Start, VSOCK_SOCKET};
use self::control::Control;
use self::events::{PIPE, Told};
use self::machine::CloudHypervisorMachine;
use self::restore::Prepared;
use crate::binaries::{Binaries, Binary, Version};
use crate::blocking::blocking;
use crate::console::Console;
use crate::files::io_error;
use crate::gate::KvmGate;
use crate::own_directory::OwnDirectory;
use crate::probe::processor_abilities;
use crate::process::{ByName, ProcessHandle, Starting, Words, processes_with_argument};
use crate::socket::listen_for_vmm;
use crate::{
    Accelerator, Capabilities, Feature, GuestMemory, Machine, MachineSpec, MemoryBacking, Patch,
    ProcessIdentity, Restore, StateIdentity, Vmm, VmmError, VmmKind, VmmOptions, WorkloadLog,
};

const NAME: &str = "Cloud Hypervisor";
const PROGRAM: &str = "cloud-hypervisor";
/// Before it, a guest could free what its disk still used (CVE-2026-45782), and formats of disks were guessed
/// (GHSA-jmr4-g2hv-mjj6).
const OLDEST: Version = Version::new(51, 2, 0);
/// From it on, the balloon goes on when memory cannot be given back. Before, the machine ended.
const PATIENT_BALLOON: Version = Version::new(52, 0, 0);
/// From it on, it tells how much of the memory that may be added the guest has. Before, it told what was asked for, and
/// nobody knew when all of it was given back.
const TELLS_ADDED_MEMORY: Version = Version::new(52, 0, 0);
/// How long a starting process may take until it answers. It takes 20 ms on an idle host.
const START_DEADLINE: Duration = Duration::from_secs(60);
const MACHINE_TYPE: &str = "cloud-hypervisor";

/// Cloud Hypervisor on this host, in all its versions.
#[derive(Debug)]
pub(crate) struct CloudHypervisor {
    binaries: Binaries,
    gate: KvmGate,
    jail: Arc<Jail>,
    cannot_save: CannotSave,
}

/// Set once this host's KVM has shown that it does not give all that a device state needs. It is not asked before: only
/// Cloud Hypervisor knows what it will want.
type CannotSave = Arc<AtomicBool>;

impl CloudHypervisor {
    pub(crate) fn new(
        options: &VmmOptions,
        search_path: Vec<PathBuf>,
        gate: KvmGate,
        jail: Arc<Jail>,
    ) -> Self {
        let binaries = Binaries::new(
            NAME,
            PROGRAM,
            OLDEST,
            options.cloud_hypervisor_binary.clone(),
            search_path,
            options.versions_directory.as_deref(),
        );
        Self {
            binaries,
            gate,
            jail,
            cannot_save: CannotSave::default(),
        }
    }

    /// The binary for new machines.
    async fn newest(&self) -> Result<Binary, VmmError> {
        // A binary that is absent or too old is the first thing to mend, whatever the host can do.
        let mut all = self.binaries.all().await?;
        self.gate.check().await?;
        match all.is_empty() {
            true => Err(VmmError::Unavailable(format!("{NAME} is not installed"))),
            false => Ok(all.swap_remove(0)),
        }
    }

    /// The binary that wrote a state.
    async fn writer_of(&self, identity: &StateIdentity) -> Result<Binary, VmmError> {
        self.gate.check().await?;
        let all = self.binaries.all().await?;
        let found = all.iter().find(|binary| identity_of(binary) == *identity);
        found.cloned().ok_or_else(|| {
            let here: Vec<String> = all.iter().map(|binary| binary.version.to_string()).collect();
            VmmError::StartFailed(format!(
                "its state was written by {NAME} {} on a processor {:?}; here are {} on {:?}",
                identity.version,
                identity.cpu,
                here.join(", "),
                processor_abilities()
            ))
        })
    }

    async fn start(
        &self,
        binary: Binary,
        spec: &MachineSpec,
        restore: Option<Restore>,
    ) -> Result<CloudHypervisorMachine, VmmError> {
        spec.check_memory_file(config::memory_bytes(spec))?;
        let directory = spec.runtime_directory.clone();
        let made = Undo::by(move || remove_files(&directory));
        let own = OwnDirectory::of(&spec.runtime_directory);
        own.make()?;
        // It opens the initramfs of a machine that goes on, too. Beside its disks it writes nothing but its own words.
        let (kind, program) = (VmmKind::CloudHypervisor, &binary.path);
        let mut start = ByName::prepare(&self.jail, kind, program, spec, &own, true, 0).await?;
        let work = Work::prepare(spec, &start.memory, abilities(binary.version), restore).await?;

        let socket = spec.runtime_directory.join(API_SOCKET);
        let pipe_path = spec.runtime_directory.join(PIPE);
        let listener = listen_for_vmm(&socket)?;
        let pipe = Told::pipe(&pipe_path).map_err(io_error("cannot make", &pipe_path))?;
        let arguments = vec![
            "--api-socket".into(),
            format!("fd={}", listener.as_raw_fd()).into(),
            "--event-monitor".into(),
            event_argument(&spec.runtime_directory),
        ];
        start.keep.extend([listener, pipe]);
        start.shows(Show::own(&pipe_path));
        let workload_log = listen_for_log(spec)?;
        let (words, errors) = Words::begin()?;
        let (console, log) = Console::begin(spec, Some(words))?;

        let program = start.detached(arguments, Path::new("/"), log, Some(errors));
        let starting = Starting::spawn(VmmKind::CloudHypervisor, program, &console).await?;
        let process = starting.process();
        let told =
            Told::listen(&pipe_path, Arc::clone(process)).map_err(io_error("cannot open", &pipe_path))?;
        let control = Arc::new(Control::new(socket, Arc::clone(process), told));
        let (memory, jail) = starting.until(work.carry_out(&control, spec)).await?;
        made.forget();
        let identity = identity_of(&binary);
        let machine = CloudHypervisorMachine::new(
            control,
            spec,
            console,
            workload_log,
            Some(identity),
            Some(memory),
            Arc::clone(&self.cannot_save),
        );
        Ok(machine.in_jail(jail))
    }
}

#[async_trait]
impl Vmm for CloudHypervisor {
    fn kind(&self) -> VmmKind {
        VmmKind::CloudHypervisor
    }

    async fn capabilities(&self) -> Capabilities {
        match self.newest().await {
            Ok(binary) => Capabilities::Available {
                version: binary.version.to_string(),
                accelerator: Accelerator::Kvm,
                features: features(binary.version, self.cannot_save.load(Ordering::Relaxed)),
            },
            Err(error) => Capabilities::Unavailable {
                reason: error.to_string(),
            },
        }
    }

    fn max_disks(&self) -> usize {
        config::MAX_DISKS
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Box<dyn Machine>, VmmError> {
        let binary = self.newest().await?;
        Ok(Box::new(self.start(binary, spec, None).await?))
    }

    async fn restore(&self, spec: &MachineSpec, restore: Restore) -> Result<Box<dyn Machine>, VmmError> {
        let binary = self.writer_of(&restore.identity).await?;
        Ok(Box::new(self.start(binary, spec, Some(restore)).await?))
    }

    async fn state_identities(&self) -> Result<Vec<StateIdentity>, VmmError> {
        self.gate.check().await?;
        Ok(self.binaries.all().await?.iter().map(identity_of).collect())
    }

    async fn adopt(
        &self,
        spec: &MachineSpec,
        process: &ProcessIdentity,
        identity: Option<&StateIdentity>,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let handle = ProcessHandle::adopt(process)?;
        let pipe = spec.runtime_directory.join(PIPE);
        let told = Told::listen(&pipe, Arc::clone(&handle)).unwrap_or_else(|error| {
            tracing::warn!(machine = spec.id, %error, "an adopted machine will not say why it ends");
            Told::deaf()
        });
        let console = Console::new(spec.vmm_log.clone(), Words::of(handle.identity()));
        let workload_log = listen_for_log(spec)?;
        let control = Control::new(spec.runtime_directory.join(API_SOCKET), handle, told);
        Ok(Box::new(CloudHypervisorMachine::new(
            Arc::new(control),
            spec,
            console,
            workload_log,
            identity.cloned(),
            None,
            Arc::clone(&self.cannot_save),
        )))
    }

    fn find_orphans(&self, runtime_directory: &Path) -> Result<Vec<ProcessIdentity>, VmmError> {
        let word = event_argument(runtime_directory);
        processes_with_argument(&self.binaries.executable_names(), &word)
            .map_err(io_error("cannot scan", Path::new("/proc")))
    }
}

/// What a fresh process is told to do.
enum Work {
    Boot(Value),
    Restore(Prepared, Option<Patch>),
}

impl Work {
    /// Makes the files that it takes. `memory`: that of the machine, as the process sees it.
    async fn prepare(
        spec: &MachineSpec,
        memory: &MemoryBacking,
        abilities: Abilities,
        restore: Option<Restore>,
    ) -> Result<Self, VmmError> {
        let Some(restore) = restore else {
            let description = config::config(spec, abilities, Start::Boot)?;
            let kernel = OwnDirectory::of(&spec.runtime_directory).join(BOOT_KERNEL);
            symlink(&spec.kernel, &kernel).map_err(io_error("cannot make", &kernel))?;
            return Ok(Self::Boot(description));
        };
        let Restore {
            device_state, patch, ..
        } = restore;
        let seen = MachineSpec {
            memory: memory.clone(),
            ..spec.clone()
        };
        let has_patch = patch.is_some();
        let prepared = blocking(move || Prepared::new(&seen, abilities, &device_state, has_patch)).await?;
        Ok(Self::Restore(prepared, patch))
    }

    async fn carry_out(self, control: &Control, spec: &MachineSpec) -> Result<GuestMemory, VmmError> {
        let outcome = match self {
            Self::Boot(description) => boot(control, spec, &description).await,
            Self::Restore(prepared, patch) => prepared.load(control, spec, patch).await,
        };
        outcome.map_err(VmmError::of_start)
    }
}

async fn boot(control: &Control, spec: &MachineSpec, description: &Value) -> Result<GuestMemory, VmmError> {
    control
        .order("vm.create", Some(description), START_DEADLINE)
        .await?;
    control.order("vm.boot", None, START_DEADLINE).await?;
    let own = OwnDirectory::of(&spec.runtime_directory);
    own.forget(BOOT_KERNEL)
        .map_err(io_error("cannot clear", own.path()))?;
    let (spec, process) = (spec.clone(), Arc::clone(control.process()));
    blocking(move || capture::booted_memory(&spec, &process))
        .await
        .map_err(VmmError::io("cannot find the memory of the machine"))
}

fn abilities(version: Version) -> Abilities {
    Abilities {
        balloon: version >= PATIENT_BALLOON,
    }
}

fn features(version: Version, cannot_save: bool) -> Vec<Feature> {
    let mut features = vec![
        Feature::Snapshots,
        Feature::Standby,
        Feature::Fork,
        Feature::Pause,
        Feature::Vsock,
        Feature::DiskIoLimit,
        Feature::DiskResize,
        Feature::SnapshotKeepsConnections,
    ];
    if abilities(version).balloon {
        features.push(Feature::BalloonControl);
    }
    if version >= TELLS_ADDED_MEMORY {
        features.push(Feature::HotplugMemory);
    }
    if cannot_save {
        let of_saving = [
            Feature::Snapshots,
            Feature::Standby,
            Feature::Fork,
            Feature::SnapshotKeepsConnections,
        ];
        features.retain(|feature| !of_saving.contains(feature));
    }
    features.sort();
    features
}

fn identity_of(binary: &Binary) -> StateIdentity {
    StateIdentity {
        vmm: VmmKind::CloudHypervisor,
        version: binary.version.to_string(),
        machine: MACHINE_TYPE.to_owned(),
        cpu: processor_abilities(),
        accelerator: Accelerator::Kvm,
    }
}

/// Takes what the workload prints: the guest connects to a port of its host, which Cloud Hypervisor makes a connection to
/// this socket.
fn listen_for_log(spec: &MachineSpec) -> Result<WorkloadLog, VmmError> {
    let own = OwnDirectory::of(&spec.runtime_directory);
    let socket = own.join(&format!("{VSOCK_SOCKET}_{LOG_VSOCK_PORT}"));
    WorkloadLog::listen(&socket, &spec.workload_log)
}

/// The word of the command line that marks a process as ours.
fn event_argument(runtime_directory: &Path) -> std::ffi::OsString {
    let mut word = std::ffi::OsString::from("path=");
    word.push(runtime_directory.join(PIPE));
    word
}

/// Removes everything of a machine that is gone.
fn remove_files(runtime_directory: &Path) {
    let _ = OwnDirectory::of(runtime_directory).remove();
    for name in [API_SOCKET, PIPE, capture::PLACE_FILE] {
        let _ = fs::remove_file(runtime_directory.join(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_advertised_depends_on_the_binary_and_on_what_the_host_has_shown() {
        let has = |version, cannot_save, feature| features(version, cannot_save).contains(&feature);
        assert!(!has(OLDEST, false, Feature::BalloonControl));
        assert!(has(PATIENT_BALLOON, false, Feature::BalloonControl));
        assert!(has(Version::new(53, 0, 0), false, Feature::BalloonControl));
        assert!(!has(OLDEST, false, Feature::HotplugMemory));
        assert!(has(TELLS_ADDED_MEMORY, false, Feature::HotplugMemory));
        for kept in [Feature::Snapshots, Feature::Standby, Feature::Fork] {
            assert!(has(OLDEST, false, kept) && !has(OLDEST, true, kept));
        }
        assert!(has(OLDEST, true, Feature::Pause));
    }

    #[test]
    fn devices_of_the_host_are_not_advertised_while_no_call_hands_them_over() {
        let named = serde_json::to_value(features(Version::new(53, 0, 0), false)).unwrap();
        let named: Vec<&str> = named
            .as_array()
            .unwrap()
            .iter()
            .filter_map(Value::as_str)
            .collect();
        assert!(named.contains(&"hotplug-memory"), "{named:?}");
        assert!(!named.contains(&"gpu-passthrough"), "{named:?}");
    }
}
