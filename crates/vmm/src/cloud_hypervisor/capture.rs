//! What a capture needs of a paused machine: where its memory lies, and the state of its devices.
//!
//! Cloud Hypervisor writes description and state of a machine into its own directory, and then its memory into a file
//! beside them. We make that file before it does, so it stops there: nothing of memory is ever written, whatever its size. We
//! read memory ourselves, see [`GuestMemory`].

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::{self, COMMAND_LINE_ADDRESS, segments};
use super::control::Control;
use super::state::{self, Facts, PAGE, StateError};
use crate::blocking::blocking;
use crate::kernel_arguments;
use crate::memory::locate::{self, Signature};
use crate::memory::{GuestMemory, Segment};
use crate::own_directory::OwnDirectory;
use crate::process::{ProcessHandle, ProcessIdentity};
use crate::spec::text;
use crate::{MachineSpec, MemoryBacking, VmmError};

const SAVE_DEADLINE: Duration = Duration::from_secs(120);
/// A state has some hundred kilobytes at most.
const FILE_LIMIT: u64 = 64 * 1024 * 1024;
/// Names that Cloud Hypervisor gives.
pub(super) const CONFIG_FILE: &str = "config.json";
pub(super) const STATE_FILE: &str = "state.json";
pub(super) const MEMORY_FILE: &str = "memory-ranges";
/// Where memory was found, in the runtime directory, for servers to come.
pub(super) const PLACE_FILE: &str = "memory.json";

/// Where the memory of a process lies.
#[derive(Debug, Serialize, Deserialize)]
struct Place {
    process: ProcessIdentity,
    segments: Vec<Segment>,
}

/// How guest memory is found in a process.
#[derive(Debug)]
pub(super) enum Search<'a> {
    /// It is a private mapping of this file.
    File(&'a Path),
    /// It has bytes that are nowhere else.
    Mark(Signature<'a>),
}

/// Finds the memory of a process that has just started and writes down where.
pub(super) fn find_memory(
    spec: &MachineSpec,
    process: &Arc<ProcessHandle>,
    search: &Search<'_>,
) -> io::Result<GuestMemory> {
    let lengths = segments(config::memory_bytes(spec));
    let segments = match search {
        Search::File(path) => locate::private_file(process, path, &lengths)?,
        Search::Mark(mark) => locate::anonymous(process, &lengths, mark)?,
    };
    let memory = GuestMemory::open(Arc::clone(process), segments.clone())?;
    let place = Place {
        process: process.identity().clone(),
        segments,
    };
    let path = spec.runtime_directory.join(PLACE_FILE);
    let temporary = path.with_extension("new");
    fs::write(&temporary, serde_json::to_vec(&place)?)?;
    fs::rename(&temporary, &path)?;
    Ok(memory)
}

/// The memory of a process that another server started.
pub(super) fn known_memory(spec: &MachineSpec, process: &Arc<ProcessHandle>) -> io::Result<GuestMemory> {
    let path = spec.runtime_directory.join(PLACE_FILE);
    let known = fs::read(&path)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<Place>(&bytes).ok());
    if let Some(place) = known.filter(|place| place.process == *process.identity()) {
        return GuestMemory::open(Arc::clone(process), place.segments);
    }
    match &spec.memory {
        MemoryBacking::Private(file) => find_memory(spec, process, &Search::File(file)),
        MemoryBacking::Anonymous | MemoryBacking::Served(_) => booted_memory(spec, process),
    }
}

/// The memory of a machine that has just begun to boot.
pub(super) fn booted_memory(spec: &MachineSpec, process: &Arc<ProcessHandle>) -> io::Result<GuestMemory> {
    let mut bytes = kernel_arguments::cloud_hypervisor(spec)
        .map_err(io::Error::other)?
        .into_bytes();
    bytes.push(0);
    let mark = Signature {
        offset: COMMAND_LINE_ADDRESS,
        bytes: &bytes,
    };
    find_memory(spec, process, &Search::Mark(mark))
}

/// State of all devices, without RAM.
pub(super) async fn save_devices(
    control: &Control,
    own: &OwnDirectory,
    memory: GuestMemory,
) -> Result<Vec<u8>, VmmError> {
    let saving = Saving::begin(own)?;
    let target = json!({ "destination_url": format!("file://{}", text(own.path())?) });
    match control.order("vm.snapshot", Some(&target), SAVE_DEADLINE).await {
        Err(VmmError::Refused { message, .. }) if is_expected(&message) => {}
        Err(error) => return Err(error),
        Ok(_) => {
            return Err(failed(io::Error::other(
                "Cloud Hypervisor wrote memory where it could not",
            )));
        }
    }
    blocking(move || {
        let bytes = saving.0.read(STATE_FILE, FILE_LIMIT).map_err(failed)?;
        let description = saving.0.read(CONFIG_FILE, FILE_LIMIT).map_err(failed)?;
        let description: Value =
            serde_json::from_slice(&description).map_err(|error| failed(error.into()))?;
        let snapshot = state::parse(&bytes).map_err(unusable)?;
        let zone = &description["memory"]["zones"][0];
        let facts = Facts {
            memory_bytes: memory.len(),
            balloon_bytes: description["balloon"]["size"].as_u64().unwrap_or(0),
            room_bytes: zone["hotplug_size"].as_u64().unwrap_or(0),
            pages: Vec::new(),
        };
        state::check_added(&snapshot, facts.memory_bytes, facts.room_bytes).map_err(unusable)?;
        let offsets = state::pages_of_queues(&snapshot, memory.len()).map_err(unusable)?;
        let mut pages = vec![0; offsets.len() * PAGE as usize];
        for (page, offset) in pages.chunks_exact_mut(PAGE as usize).zip(&offsets) {
            memory.read(*offset, page).map_err(failed)?;
        }
        let facts = Facts {
            pages: offsets,
            ..facts
        };
        state::join(&facts, &bytes, &pages).map_err(unusable)
    })
    .await
}

/// What is read of a machine is the memory that it began with: a guest that has more is not captured.
fn unusable(error: StateError) -> VmmError {
    match error {
        StateError::InUse(bytes) => VmmError::MemoryInUse { bytes },
        other => failed(io::Error::other(other)),
    }
}

/// Whether the only thing that failed was to make the file that we had made.
fn is_expected(message: &str) -> bool {
    message.contains("File exists (os error 17)")
}

fn failed(source: io::Error) -> VmmError {
    VmmError::io("cannot take a device state")(source)
}

/// A state on its way out; what is left of it goes with this.
#[derive(Debug)]
struct Saving(OwnDirectory);

impl Saving {
    fn begin(own: &OwnDirectory) -> Result<Self, VmmError> {
        let saving = Self(own.clone());
        saving.clear();
        own.write(MEMORY_FILE, &[])?;
        Ok(saving)
    }

    fn clear(&self) {
        for name in [CONFIG_FILE, STATE_FILE, MEMORY_FILE] {
            let _ = self.0.forget(name);
        }
    }
}

impl Drop for Saving {
    fn drop(&mut self) {
        self.clear();
    }
}
