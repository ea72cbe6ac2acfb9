//! Makes a fresh process the machine that was captured.
//!
//! ```text
//! own directory:
//!             config.json    made of our own description; memory is a private mapping of its file
//!             state.json     as captured, but for what is said of memory
//!             memory-ranges  the pages that Cloud Hypervisor reads while it builds its devices, if there is a patch
//!
//! vm.restore ─► built, paused ─► memory found ─► patch over it ─► ready
//! ```
//!
//! Invariant: no processor and no device has touched guest memory before the patch is complete, but for the pages that
//! the state brings itself.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::capture::{self, CONFIG_FILE, MEMORY_FILE, STATE_FILE, Search};
use super::config::{self, Abilities, COMMAND_LINE_ADDRESS, Start};
use super::control::Control;
use super::state::{self, Captured, PAGE, StateError};
use crate::blocking::blocking;
use crate::files::io_error;
use crate::memory::locate::Signature;
use crate::own_directory::OwnDirectory;
use crate::spec::text;
use crate::{GuestMemory, MachineSpec, MemoryBacking, Patch, VmmError, VmmKind};

/// How long the loading may take. It takes 20 ms on an idle host.
const LOAD_DEADLINE: Duration = Duration::from_secs(60);
/// Files as Cloud Hypervisor restores from; they go with this.
#[derive(Debug)]
pub(super) struct Prepared {
    own: OwnDirectory,
    /// What marks memory that has no file, until it is patched.
    mark: Option<Mark>,
}

/// Bytes that are nowhere else.
#[derive(Debug)]
struct Mark {
    offset: u64,
    bytes: Vec<u8>,
}

impl Drop for Prepared {
    fn drop(&mut self) {
        for name in [CONFIG_FILE, STATE_FILE, MEMORY_FILE] {
            let _ = self.own.forget(name);
        }
    }
}

impl Prepared {
    /// Writes down what the process will be. The memory of `spec` is as the process sees it.
    pub(super) fn new(
        spec: &MachineSpec,
        abilities: Abilities,
        device_state: &[u8],
        has_patch: bool,
    ) -> Result<Self, VmmError> {
        let broken =
            |error: StateError| VmmError::StartFailed(format!("the device state is unusable: {error}"));
        let memory_bytes = config::memory_bytes(spec);
        let captured = state::split(device_state, memory_bytes).map_err(broken)?;
        let start = Start::Restore {
            balloon_bytes: captured.facts.balloon_bytes,
        };
        let room_bytes = captured.facts.room_bytes;
        // One that had no room for more goes on as it was.
        let described = MachineSpec {
            hotplug_bytes: if room_bytes == 0 { 0 } else { spec.hotplug_bytes },
            ..spec.clone()
        };
        if room_bytes != config::room_for_more(&described) {
            let words = format!(
                "room for {room_bytes} more bytes, where it may have {}",
                spec.hotplug_bytes
            );
            return Err(broken(StateError::Memory(words)));
        }
        state::check_added(&captured.snapshot, memory_bytes, room_bytes).map_err(broken)?;
        let description = config::config(&described, abilities, start)?.to_string();
        let own = OwnDirectory::of(&spec.runtime_directory);
        let mark = match spec.memory {
            MemoryBacking::Anonymous => Some(
                Mark::new(&captured.facts.pages).map_err(io_error("cannot mark memory for", own.path()))?,
            ),
            MemoryBacking::Private(_) => None,
            MemoryBacking::Served(_) => {
                return Err(VmmError::Unsupported {
                    kind: VmmKind::CloudHypervisor,
                    feature: "memory that a page server fills",
                });
            }
        };
        // Without a patch the file behind memory has it all.
        let filled = match has_patch || mark.is_some() {
            true => Filled::new(&captured, mark.as_ref()),
            false => Filled::default(),
        };
        let state = state::with_memory(captured.snapshot, memory_bytes, room_bytes, &filled.offsets)
            .map_err(broken)?;
        let prepared = Self { own, mark };
        for (name, bytes) in [
            (CONFIG_FILE, description.as_bytes()),
            (STATE_FILE, state.as_slice()),
            (MEMORY_FILE, filled.bytes.as_slice()),
        ] {
            prepared.own.write(name, bytes)?;
        }
        Ok(prepared)
    }

    /// Loads the state into a process that waits for orders, and patches its memory. On error the process is to be
    /// killed.
    pub(super) async fn load(
        self,
        control: &Control,
        spec: &MachineSpec,
        patch: Option<Patch>,
    ) -> Result<GuestMemory, VmmError> {
        let source = json!({ "source_url": format!("file://{}", text(self.own.path())?) });
        control.order("vm.restore", Some(&source), LOAD_DEADLINE).await?;
        let process = Arc::clone(control.process());
        let spec = spec.clone();
        let work = move || -> io::Result<GuestMemory> {
            let search = match (&self.mark, &spec.memory) {
                (Some(mark), _) => Search::Mark(Signature {
                    offset: mark.offset,
                    bytes: &mark.bytes,
                }),
                (None, MemoryBacking::Private(file)) => Search::File(file),
                (None, MemoryBacking::Anonymous | MemoryBacking::Served(_)) => {
                    return Err(io::Error::other("nothing marks its memory"));
                }
            };
            let memory = capture::find_memory(&spec, &process, &search)?;
            if let Some(mark) = &self.mark {
                memory.write(mark.offset, &vec![0; mark.bytes.len()])?;
            }
            if let Some(patch) = patch {
                patch(&memory)?;
            }
            Ok(memory)
        };
        blocking(work)
            .await
            .map_err(VmmError::io("cannot write the memory of the restored machine"))
    }
}

/// Pages that Cloud Hypervisor fills into memory before it builds devices.
#[derive(Default)]
struct Filled {
    offsets: Vec<u64>,
    bytes: Vec<u8>,
}

impl Filled {
    fn new(captured: &Captured, mark: Option<&Mark>) -> Self {
        let mut filled = Self {
            offsets: captured.facts.pages.clone(),
            bytes: captured.pages.clone(),
        };
        if let Some(mark) = mark {
            filled.offsets.push(mark.offset);
            filled.bytes.extend_from_slice(&mark.bytes);
            filled.bytes.resize(filled.offsets.len() * PAGE as usize, 0);
        }
        filled
    }
}

impl Mark {
    /// A mark in a page that the state leaves alone.
    fn new(taken: &[u64]) -> io::Result<Self> {
        let mut pages = (COMMAND_LINE_ADDRESS..).step_by(PAGE as usize);
        let offset = pages
            .find(|page| !taken.contains(page))
            .unwrap_or(COMMAND_LINE_ADDRESS);
        let mut bytes = vec![0; 32];
        let mut done = 0;
        while done < bytes.len() {
            done += rustix::rand::getrandom(&mut bytes[done..], rustix::rand::GetRandomFlags::empty())?;
        }
        Ok(Self { offset, bytes })
    }
}
