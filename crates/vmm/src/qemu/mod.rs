//! QEMU: the q35 and microvm boards.
//!
//! ```text
//! launch:  bind sockets ─► spawn (sockets inherited) ─► connect ─► greeting ─► negotiated ─► Machine
//!                               │ any failure: kill, reap, remove sockets, tell the end of the log
//! restore: the same, and then ─► patch ─► device state ─► Machine, paused    (restore.rs)
//! adopt:   pidfd ─► identity equal? ─► Machine (connects when first asked)
//! ```
//!
//! The listening sockets are made by us and inherited, so a connection waits in their queue from the first
//! instant and nobody polls for a socket to appear.

mod agent_port;
mod arguments;
mod binary;
mod board;
mod capture;
mod confined;
mod control;
mod copies;
mod machine;
mod qmp;
mod restore;

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use hypeman_core::Undo;

use self::arguments::{AGENT_SOCKET, Handed, Host, PID_FILE, QMP_SOCKET, Sockets, Start};
use self::binary::Facts;
pub(crate) use self::binary::QemuHost;
pub(crate) use self::board::Board;
use self::control::Control;
use self::machine::QemuMachine;
use self::restore::StatePipe;
use crate::console::Console;
use crate::files::{append_only, io_error};
use crate::process::{Detached, ProcessHandle, Starting, Words, confines, limits, processes_with_argument};
use crate::socket::listen_for_vmm;
use crate::{
    Capabilities, Feature, Jail, Machine, MachineSpec, MemoryBacking, ProcessIdentity, Restore,
    StateIdentity, Vmm, VmmError, VmmKind,
};

/// How long a starting QEMU may take until it answers. It takes 30 ms on an idle machine.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// One board of QEMU on this host.
#[derive(Debug)]
pub(crate) struct Qemu {
    board: Board,
    host: Arc<QemuHost>,
    jail: Arc<Jail>,
}

impl Qemu {
    pub(crate) fn new(board: Board, host: Arc<QemuHost>, jail: Arc<Jail>) -> Self {
        Self { board, host, jail }
    }

    async fn start(&self, spec: &MachineSpec, restore: Option<Restore>) -> Result<QemuMachine, VmmError> {
        let facts = self.host.facts(self.board).await?;
        spec.check_memory_file(spec.memory_bytes)?;
        let directory = spec.runtime_directory.clone();
        let made = Undo::by(move || remove_files(&directory));
        let qmp_path = spec.runtime_directory.join(QMP_SOCKET);
        let agent_path = spec.runtime_directory.join(AGENT_SOCKET);
        let mut keep = vec![listen_for_vmm(&qmp_path)?, listen_for_vmm(&agent_path)?];
        let sockets = Sockets {
            qmp: keep[0].as_raw_fd(),
            agent: keep[1].as_raw_fd(),
        };
        let (start, restore) = match restore {
            None => (Start::Boot, None),
            // QEMU would wait for the first byte for ever.
            Some(restore) if restore.device_state.is_empty() => {
                return Err(VmmError::StartFailed("the device state is empty".to_owned()));
            }
            Some(restore) if restore.identity != facts.state_identity(self.board) => {
                return Err(VmmError::StartFailed(
                    "the device state was written by another QEMU".to_owned(),
                ));
            }
            Some(restore) => {
                let pipe = StatePipe::new()?;
                let start = Start::Restore {
                    state: pipe.read.as_raw_fd(),
                };
                keep.push(pipe.read);
                (start, Some((restore, pipe.write)))
            }
        };
        // Made by us so that they have our mode; QEMU would let everybody read what a workload prints.
        append_only(&spec.workload_log)?;
        let (console, output) = match &restore {
            None => Console::begin(spec, None)?,
            Some(_) => {
                let (words, writer) = Words::begin()?;
                let (console, _log) = Console::begin(spec, Some(words))?;
                (console, writer)
            }
        };

        let program = self.detached(&facts, spec, sockets, start, keep, output).await?;
        let starting = Starting::spawn(self.board.kind(), program, &console).await?;
        let control = Control::new(spec.id.clone(), Arc::clone(starting.process()), qmp_path);
        let identity = facts.state_identity(self.board);
        let machine = QemuMachine::new(control, console, spec, Some(identity));
        let ready = async {
            machine.control().connect(START_DEADLINE).await?;
            match restore {
                Some((restore, pipe)) => machine.load(restore, pipe).await,
                None => Ok(()),
            }
        };
        let ((), jail) = starting.until(ready).await?;
        made.forget();
        Ok(machine.in_jail(jail))
    }

    /// The program with its command line, in the jail where there is one.
    async fn detached(
        &self,
        facts: &Facts,
        spec: &MachineSpec,
        sockets: Sockets,
        start: Start,
        mut keep: Vec<OwnedFd>,
        output: File,
    ) -> Result<Detached, VmmError> {
        let directory = PathBuf::from("/");
        if !confines(&self.jail).await? {
            let host = &facts.arguments;
            let handed = Handed::default();
            let limits = limits(self.jail.options(), spec, confined::OTHER_FILES);
            return Ok(Detached {
                program: facts.program.clone(),
                arguments: arguments::arguments(self.board, spec, host, sockets, start, &handed)?,
                directory,
                output,
                errors: None,
                keep,
                forbid_holes: matches!(spec.memory, MemoryBacking::Private(_))
                    && !host.read_only_memory_files,
                jail: None,
                restraint: self.jail.restrain(&limits),
            });
        }
        let program = fs::canonicalize(&facts.program).map_err(io_error("cannot find", &facts.program))?;
        let accelerator = facts.arguments.accelerator;
        let confined = confined::prepare(&self.jail, &program, spec, accelerator, start == Start::Boot)?;
        let host = Host {
            // It asks for reading and writing, and is given what can only be read.
            read_only_memory_files: false,
            ..facts.arguments.clone()
        };
        let (seen, handed) = (&confined.spec, &confined.handed);
        let arguments = arguments::arguments(self.board, seen, &host, sockets, start, handed)?;
        keep.extend(confined.keep);
        Ok(Detached {
            program,
            arguments,
            directory,
            output,
            errors: None,
            keep,
            forbid_holes: false,
            jail: Some(confined.confinement),
            restraint: None,
        })
    }
}

#[async_trait]
impl Vmm for Qemu {
    fn kind(&self) -> VmmKind {
        self.board.kind()
    }

    async fn capabilities(&self) -> Capabilities {
        match self.host.facts(self.board).await {
            Ok(facts) => Capabilities::Available {
                version: facts.version.clone(),
                accelerator: facts.arguments.accelerator,
                features: vec![
                    Feature::Snapshots,
                    Feature::Standby,
                    Feature::Fork,
                    Feature::Pause,
                    Feature::DiskIoLimit,
                    Feature::SnapshotKeepsConnections,
                ],
            },
            Err(error) => Capabilities::Unavailable {
                reason: error.to_string(),
            },
        }
    }

    fn max_disks(&self) -> usize {
        self.board.max_disks()
    }

    async fn launch(&self, spec: &MachineSpec) -> Result<Box<dyn Machine>, VmmError> {
        Ok(Box::new(self.start(spec, None).await?))
    }

    async fn restore(&self, spec: &MachineSpec, restore: Restore) -> Result<Box<dyn Machine>, VmmError> {
        Ok(Box::new(self.start(spec, Some(restore)).await?))
    }

    async fn state_identities(&self) -> Result<Vec<StateIdentity>, VmmError> {
        let facts = self.host.facts(self.board).await?;
        Ok(vec![facts.state_identity(self.board)])
    }

    async fn adopt(
        &self,
        spec: &MachineSpec,
        process: &ProcessIdentity,
        identity: Option<&StateIdentity>,
    ) -> Result<Box<dyn Machine>, VmmError> {
        let handle = ProcessHandle::adopt(process)?;
        let socket = spec.runtime_directory.join(QMP_SOCKET);
        let console = Console::new(spec.vmm_log.clone(), Words::of(handle.identity()));
        let machine = QemuMachine::new(
            Control::new(spec.id.clone(), handle, socket),
            console,
            spec,
            identity.cloned(),
        );
        // Connected early to hear events. A VMM that hangs is adopted all the same: it can still be killed.
        match machine.control().connect(Duration::from_secs(1)).await {
            Ok(()) => {
                machine.control().learn_agent_port().await;
                if let Err(error) = copies::clear(machine.control()).await {
                    tracing::warn!(machine = spec.id, %error, "copies of disks that a server left behind go on");
                }
            }
            Err(error) => tracing::warn!(machine = spec.id, %error, "an adopted VMM does not answer yet"),
        }
        Ok(Box::new(machine))
    }

    fn find_orphans(&self, runtime_directory: &Path) -> Result<Vec<ProcessIdentity>, VmmError> {
        let pid_file = runtime_directory.join(PID_FILE);
        processes_with_argument(&self.host.executable_names(), pid_file.as_os_str())
            .map_err(io_error("cannot scan", Path::new("/proc")))
    }
}

/// Removes everything of a machine that is gone.
fn remove_files(runtime_directory: &Path) {
    for name in [QMP_SOCKET, AGENT_SOCKET, PID_FILE] {
        let _ = fs::remove_file(runtime_directory.join(name));
    }
}
