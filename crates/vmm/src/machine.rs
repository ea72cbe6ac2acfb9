//! The traits that every VMM driver implements.

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, io};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    Accelerator, AgentChannel, Disk, GuestMemory, JailReport, MachineSpec, ProcessIdentity, VmmError,
};

/// The five kinds of the contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VmmKind {
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
    /// QEMU with the q35 board.
    Qemu,
    /// QEMU with the microvm board.
    QemuMicrovm,
    /// Apple's Virtualization framework.
    Vz,
}

impl VmmKind {
    /// All kinds, in the order of the contract.
    pub const ALL: [Self; 5] = [
        Self::CloudHypervisor,
        Self::Firecracker,
        Self::Qemu,
        Self::QemuMicrovm,
        Self::Vz,
    ];
}

/// Optional abilities, named as in `GET /capabilities`. What no call can ask for yet is not among them, though a driver may
/// know how: `gpu-passthrough`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum Feature {
    Snapshots,
    Standby,
    Fork,
    Pause,
    HotplugMemory,
    BalloonControl,
    Vsock,
    DiskIoLimit,
    DiskResize,
    /// Exec sessions and copies in a running guest outlive a snapshot of it (see [`Machine::connections_have_ended`]).
    SnapshotKeepsConnections,
}

/// What a driver can do on this host, probed live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Capabilities {
    /// The VMM can start machines here.
    Available {
        /// Version as the binary reports it.
        version: String,
        /// What runs guest code.
        accelerator: Accelerator,
        /// Abilities, sorted.
        features: Vec<Feature>,
    },
    /// It cannot, and why, in words that tell the operator what to do.
    Unavailable {
        /// The reason and the fix.
        reason: String,
    },
}

/// What the VMM says about its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunState {
    /// Built, never run.
    Created,
    /// Executing.
    Running,
    /// Stopped between two instructions, until [`Machine::resume`].
    Paused,
    /// Its guest sleeps, as it asked to, until something wakes it; [`Machine::resume`] does not.
    Suspended,
    /// Stopped because the host has no room for what the guest writes. Goes on by itself once there is room.
    Stalled,
    /// The guest powered off and the VMM is about to exit.
    Shutdown,
}

/// Usage of the VMM process.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MachineStats {
    /// User plus system CPU time in seconds.
    pub cpu_seconds: f64,
    /// Resident set in bytes.
    pub memory_rss_bytes: u64,
    /// Virtual size in bytes.
    pub memory_vms_bytes: u64,
}

/// Why a machine's VMM process ended, as far as the host can know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitKind {
    /// The process still lives.
    Running,
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reboot, which ends a machine here.
    Reset,
    /// The guest kernel panicked. The message is the console's own words where it showed any. They come from
    /// the guest, so they may be forged: show them, decide nothing by them.
    Panic {
        /// First line of the panic.
        message: Option<String>,
    },
    /// Ended by [`Machine::kill`] of this handle.
    Stopped,
    /// The process was killed by a signal that this handle did not send.
    Signal {
        /// Signal number.
        number: i32,
    },
    /// The process exited by itself with this code (the VMM failed when it is not zero).
    Code {
        /// Exit code.
        code: i32,
    },
    /// The process ended while nobody watched it.
    Unknown,
}

/// What is known of a machine's end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitCause {
    /// Why.
    pub kind: ExitKind,
    /// The last lines of console and VMM output, at most 4 KiB, not to be trusted.
    pub console_tail: String,
}

impl ExitCause {
    /// Of a machine that has not ended.
    pub(crate) fn running() -> Self {
        Self {
            kind: ExitKind::Running,
            console_tail: String::new(),
        }
    }
}

/// What a device state needs to be loaded again. Two states are interchangeable only when these are equal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StateIdentity {
    /// Which driver wrote it.
    pub vmm: VmmKind,
    /// Version of the VMM, as its binary reports it.
    pub version: String,
    /// Versioned machine type.
    pub machine: String,
    /// Processor model that the guest sees; that of the host where the guest sees the host's.
    pub cpu: String,
    /// What ran guest code.
    pub accelerator: Accelerator,
}

/// Writes pages over the memory of a machine that has not run yet.
pub type Patch = Box<dyn FnOnce(&GuestMemory) -> io::Result<()> + Send>;

/// What makes a fresh process the captured machine.
pub struct Restore {
    /// What the device state needs; one of [`Vmm::state_identities`].
    pub identity: StateIdentity,
    /// From [`Machine::save_devices`], verified by the caller.
    pub device_state: Vec<u8>,
    /// Pages that differ from [`MachineSpec::memory`]. Runs on a thread that may block.
    pub patch: Option<Patch>,
}

impl fmt::Debug for Restore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Restore")
            .field("identity", &self.identity)
            .field("device_state_bytes", &self.device_state.len())
            .field("has_patch", &self.patch.is_some())
            .finish()
    }
}

/// One disk to copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskCopy {
    /// Index in [`MachineSpec::disks`]; a writable disk.
    pub disk: usize,
    /// The copy: a raw file that does not exist yet.
    pub target: PathBuf,
}

/// Copies of disks, all of one instant. Dropping it cancels them.
///
/// ```text
/// prepare (running) ─► begin (paused: the instant) ─► finish (running again)
/// ```
#[async_trait]
pub trait DiskCopies: Send + fmt::Debug {
    /// Fixes the instant. Called once, while the machine is paused; the copying itself goes on while it runs.
    async fn begin(&mut self) -> Result<(), VmmError>;

    /// Waits until every copy is whole and on stable storage (its name is for the caller to sync). Holes of a disk
    /// are holes of its copy. On error the caller removes the targets.
    async fn finish(self: Box<Self>) -> Result<(), VmmError>;

    /// Stops copying and lets go of the targets, which the caller removes.
    async fn cancel(self: Box<Self>);
}

/// A kind of VMM on this host.
#[async_trait]
pub trait Vmm: Send + Sync + std::fmt::Debug {
    /// Which kind this is.
    fn kind(&self) -> VmmKind;

    /// Probes binaries and the host now. Cheap enough for each request: slow probes (a self-test guest) are
    /// done once and remembered.
    async fn capabilities(&self) -> Capabilities;

    /// How many disks a machine may have, so that a request is refused before any effect.
    fn max_disks(&self) -> usize;

    /// Starts the process and boots the machine; returns once the VMM answers on its socket and vCPUs run.
    /// On error nothing is left behind: no process, no socket.
    async fn launch(&self, spec: &MachineSpec) -> Result<Box<dyn Machine>, VmmError>;

    /// Starts the process with the devices of `spec`, writes the patch over its memory and loads the device
    /// state. The machine is paused until [`Machine::resume`]. On error nothing is left behind.
    ///
    /// `spec` must have the same processors, memory size and devices in the same order as the machine that was
    /// captured; paths, the TAP and the MAC may differ (the guest keeps the old MAC until it is told another).
    async fn restore(&self, spec: &MachineSpec, restore: Restore) -> Result<Box<dyn Machine>, VmmError>;

    /// Which device states can be loaded here. The first is what new machines write.
    async fn state_identities(&self) -> Result<Vec<StateIdentity>, VmmError>;

    /// Takes back a machine that another server process started, with what its [`Machine::state_identity`] was.
    /// `Gone` when no such process lives.
    async fn adopt(
        &self,
        spec: &MachineSpec,
        process: &ProcessIdentity,
        identity: Option<&StateIdentity>,
    ) -> Result<Box<dyn Machine>, VmmError>;

    /// Processes of this kind of VMM that were started for this runtime directory, recorded or not. Recovery
    /// uses it after a crash between the start of a process and the record of it.
    fn find_orphans(&self, runtime_directory: &Path) -> Result<Vec<ProcessIdentity>, VmmError>;
}

/// A machine whose VMM process lives. Methods take `&self`: the driver serialises what must be serial.
#[async_trait]
pub trait Machine: Send + Sync + std::fmt::Debug {
    /// The VMM process.
    fn process(&self) -> &ProcessIdentity;

    /// What a device state of this machine needs to be loaded again: the binary on the disk may be another one by now.
    /// `None` where nobody remembers.
    fn state_identity(&self) -> Option<&StateIdentity>;

    /// What of a jail confines it. `None`: there is none, or another server started it and knows.
    fn jail(&self) -> Option<&JailReport> {
        None
    }

    /// Where the guest's agent answers.
    fn agent_channel(&self) -> AgentChannel;

    /// Whether the guest has its end of the agent's channel open, as far as the VMM has said, and every further word
    /// of it. `None` where the channel itself ends with the guest's agent, as a vsock connection does.
    fn agent_port(&self) -> Option<watch::Receiver<Option<bool>>> {
        None
    }

    /// Asks the VMM for its state, bounded by `deadline`.
    async fn run_state(&self, deadline: Duration) -> Result<RunState, VmmError>;

    /// Stops the vCPUs.
    async fn pause(&self) -> Result<(), VmmError>;

    /// Lets the vCPUs go on.
    async fn resume(&self) -> Result<(), VmmError>;

    /// Where guest memory lies. Its contents are of one instant only while the machine is paused.
    async fn guest_memory(&self) -> Result<GuestMemory, VmmError>;

    /// Whether memory and disks of a paused machine stand still while [`Machine::save_devices`] is under way, so that
    /// all can be taken at once. Else they are taken after it.
    fn rests_while_saving(&self) -> bool {
        true
    }

    /// Whether all connections to the guest have ended without a word to this side, since this was asked the last time:
    /// some VMMs tell their guest so with each device state that they give.
    fn connections_have_ended(&self) -> bool {
        false
    }

    /// The state of all devices and processors of a paused machine. Guest memory is not in it; from the end of this
    /// call until [`Machine::resume`] nothing changes it.
    ///
    /// # Errors
    /// [`VmmError::MemoryInUse`] when the guest has memory that was added, of which [`Machine::guest_memory`] knows
    /// nothing.
    async fn save_devices(&self) -> Result<Vec<u8>, VmmError>;

    /// Opens the targets of copies and writes back what the host has cached of the disks, so that the pause, with
    /// [`DiskCopies::begin`] in it, costs next to nothing. On error no target is left.
    async fn prepare_disk_copies(&self, copies: &[DiskCopy]) -> Result<Box<dyn DiskCopies>, VmmError>;

    /// Presses the power button (ACPI) where there is one. Returns when pressed, not when the guest is off.
    async fn power_button(&self) -> Result<(), VmmError>;

    /// Ends the process now and waits until the kernel has reaped its memory. Idempotent.
    async fn kill(&self) -> Result<(), VmmError>;

    /// Resolves when the process has ended (pidfd), at once if it already has. Cancel safe.
    async fn exited(&self);

    /// Why the process ended. Reads what is known and returns at once; [`ExitKind::Running`] while it lives.
    async fn exit_cause(&self) -> ExitCause;

    /// Continues the workload log in a fresh file at the same path, after the caller renamed the old one.
    /// No byte is lost or written twice.
    async fn reopen_workload_log(&self) -> Result<(), VmmError>;

    /// The same for the kernel console in the VMM log. What the VMM itself prints stays in the old file.
    async fn reopen_vmm_log(&self) -> Result<(), VmmError>;

    /// What can be changed while the machine runs. `None`: nothing.
    fn adjust(&self) -> Option<&dyn Adjust> {
        None
    }

    /// Usage of the VMM process from `/proc`.
    fn stats(&self) -> Result<MachineStats, VmmError>;
}

/// Changes to a machine that runs. Each returns when the VMM has taken it in; the guest follows when it can.
#[async_trait]
pub trait Adjust: Send + Sync {
    /// Gives the guest this much memory in all: what it began with, and of [`MachineSpec::hotplug_bytes`] the rest.
    /// Asking again for the same is no error.
    async fn set_memory(&self, bytes: u64) -> Result<(), VmmError>;

    /// How many bytes of [`MachineSpec::hotplug_bytes`] the guest has now. It takes and gives back in its own time, and
    /// nothing once what it has is what was set.
    async fn added_memory(&self) -> Result<u64, VmmError>;

    /// Asks the guest's balloon to hold this much.
    async fn set_balloon(&self, bytes: u64) -> Result<(), VmmError>;

    /// Adds a disk as number `index` of the machine.
    async fn attach_disk(&self, index: usize, disk: &Disk) -> Result<(), VmmError>;

    /// Takes disk number `index`, which is this one, away; the VMM no longer sees its file, unless the host cannot hide
    /// it, which is logged.
    async fn detach_disk(&self, index: usize, disk: &Disk) -> Result<(), VmmError>;

    /// Changes the size of a disk, and of its file.
    async fn resize_disk(&self, index: usize, bytes: u64) -> Result<(), VmmError>;
}
