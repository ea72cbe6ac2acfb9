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

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use self::arguments::{AGENT_SOCKET, Handed, PID_FILE, QMP_SOCKET, Sockets, Start};
pub(crate) use self::binary::QemuHost;
pub(crate) use self::board::Board;
use self::control::Control;
use self::machine::QemuMachine;
use self::restore::StatePipe;
use crate::console::{self, Console};
use crate::files::{append_only, io_error};
use crate::process::{
    Detached, KillOnDrop, ProcessHandle, Words, confines, limits, note_own_filter, processes_with_argument,
    spawn_detached,
};
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
        check_memory(spec)?;
        let qmp_path = spec.runtime_directory.join(QMP_SOCKET);
        let agent_path = spec.runtime_directory.join(AGENT_SOCKET);
        let sockets = OwnedSockets(vec![qmp_path.clone(), agent_path.clone()]);
        let mut keep = vec![listen(&qmp_path)?, listen(&agent_path)?];
        let numbers = Sockets {
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
        let mut program = facts.program.clone();
        let mut host = facts.arguments.clone();
        let (mut jail, mut restraint) = (None, None);
        let arguments = if confines(&self.jail).await? {
            program = fs::canonicalize(&program).map_err(io_error("cannot find", &facts.program))?;
            let boots = start == Start::Boot;
            let confined = confined::prepare(&self.jail, &program, spec, host.accelerator, boots)?;
            // It asks for reading and writing, and is given what can only be read.
            host.read_only_memory_files = false;
            keep.extend(confined.keep);
            jail = Some(confined.confinement);
            arguments::arguments(
                self.board,
                &confined.spec,
                &host,
                numbers,
                start,
                &confined.handed,
            )?
        } else {
            restraint = self
                .jail
                .restrain(&limits(self.jail.options(), spec, confined::OTHER_FILES));
            arguments::arguments(self.board, spec, &host, numbers, start, &Handed::default())?
        };
        let forbid_holes = jail.is_none()
            && matches!(spec.memory, MemoryBacking::Private(_))
            && !host.read_only_memory_files;
        // Made by us so that they have our mode; QEMU would let everybody read what a workload prints.
        append_only(&spec.workload_log)?;
        let mut log = append_only(&spec.vmm_log)?;
        let log_start = log
            .seek(SeekFrom::End(0))
            .map_err(io_error("cannot read", &spec.vmm_log))?;
        writeln!(log, "{}{}", console::START_MARK, spec.id)
            .map_err(io_error("cannot write", &spec.vmm_log))?;
        let words_failed = |source| VmmError::Io {
            context: "cannot make room for what QEMU says".to_owned(),
            source,
        };
        let (console, output) = match &restore {
            None => (Console::new(spec.vmm_log.clone(), None), log),
            Some(_) => {
                let words = Words::new().map_err(words_failed)?;
                let output = words.writer().map_err(words_failed)?;
                (Console::new(spec.vmm_log.clone(), Some(words)), output)
            }
        };

        let spawned = tokio::task::spawn_blocking(move || {
            spawn_detached(Detached {
                program: &program,
                arguments,
                directory: Path::new("/"),
                output,
                errors: None,
                keep: &keep,
                forbid_holes,
                jail,
                restraint,
            })
        })
        .await
        .unwrap_or_else(|error| Err(std::io::Error::other(error)));
        let spawned = spawned.map_err(io_error("cannot start", &facts.program))?;
        let failed = || VmmError::StartFailed(console.tail_since(log_start));
        let process = match ProcessHandle::of_child(spawned.pid) {
            Ok(process) => Arc::new(process),
            Err(error) => {
                tracing::debug!(%error, "QEMU ended before it could be looked at");
                return Err(failed());
            }
        };
        let guard = KillOnDrop::of(&process);
        let control = Control::new(spec.id.clone(), Arc::clone(&process), qmp_path);
        let identity = facts.state_identity(self.board);
        let machine = QemuMachine::new(control, console.clone(), spec, Some(identity));
        let ready = async {
            machine.control().connect(START_DEADLINE).await?;
            match restore {
                Some((restore, pipe)) => machine.load(restore, pipe).await,
                None => Ok(()),
            }
        };
        tokio::select! {
            biased;
            outcome = ready => match outcome {
                Ok(()) => {}
                // The connection ends a moment before the process does.
                Err(VmmError::Gone) => {
                    process.kill().map_err(io_error("cannot kill", &facts.program))?;
                    process.ended().await;
                    return Err(failed());
                }
                Err(error) => {
                    process.kill().map_err(io_error("cannot kill", &facts.program))?;
                    process.ended().await;
                    return Err(error);
                }
            },
            _ = process.ended() => return Err(failed()),
        }
        let jail = note_own_filter(spawned, &self.jail, self.board.kind()).await?;
        guard.forget();
        std::mem::forget(sockets);
        Ok(machine.in_jail(jail))
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
        let handle = ProcessHandle::of_recorded(process)
            .map_err(|source| VmmError::Io {
                context: format!("cannot look at process {}", process.pid),
                source,
            })?
            .ok_or(VmmError::Gone)?;
        let socket = spec.runtime_directory.join(QMP_SOCKET);
        let console = Console::new(spec.vmm_log.clone(), Words::of(handle.identity()));
        let machine = QemuMachine::new(
            Control::new(spec.id.clone(), Arc::new(handle), socket),
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
        processes_with_argument(pid_file.as_os_str(), |executable| {
            executable
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("qemu"))
        })
        .map_err(io_error("cannot scan", Path::new("/proc")))
    }
}

/// Removes sockets of a start that failed.
struct OwnedSockets(Vec<PathBuf>);

impl Drop for OwnedSockets {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
            let _ = fs::remove_file(path.with_file_name(PID_FILE));
        }
    }
}

/// QEMU would make a file that is not there, and take a directory for a place to make one in.
fn check_memory(spec: &MachineSpec) -> Result<(), VmmError> {
    let MemoryBacking::Private(path) = &spec.memory else {
        return Ok(());
    };
    let about = fs::metadata(path).map_err(io_error("cannot look at", path))?;
    if !about.is_file() || about.len() < spec.memory_bytes {
        return Err(VmmError::InvalidSpec(format!(
            "{} is no file of {} bytes of memory",
            path.display(),
            spec.memory_bytes
        )));
    }
    Ok(())
}

fn listen(path: &Path) -> Result<OwnedFd, VmmError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(io_error("cannot remove", path)(error));
        }
        _ => {}
    }
    UnixListener::bind(path)
        .map(OwnedFd::from)
        .map_err(io_error("cannot listen on", path))
}
