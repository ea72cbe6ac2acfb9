//! A captured device state: what Cloud Hypervisor wrote, and what it will miss.
//!
//! ```text
//! ┌───────┬────────┬───────────────────┬──────────────────┬─────────────────────────────┐
//! │ magic │ lengths│ facts (JSON)      │ state.json       │ pages that hold the heads   │
//! │  8    │ 4 + 8  │ ours              │ of the VMM       │ of virtqueues, 4 KiB each   │
//! └───────┴────────┴───────────────────┴──────────────────┴─────────────────────────────┘
//! ```
//!
//! While it builds its devices from a state, Cloud Hypervisor reads how far each virtqueue was (the indices of its two
//! rings) from guest memory. A [`crate::Patch`] comes later, so the pages with these indices travel in the state.
//!
//! Invariants:
//! - Whoever made the bytes, nothing of them becomes a path or a command. Lengths and addresses are checked against the
//!   machine that is to be made.
//! - Memory that was added to a machine is in no state: one whose guest has any is refused, when it is made as when it
//!   is read.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::{HOLE, ZONE, place_for_more, segments};

pub(super) const PAGE: u64 = 4096;
const MAGIC: &[u8; 8] = b"hvchdev1";
const HEAD_BYTES: usize = MAGIC.len() + 4 + 8;
/// The devices of one machine have a dozen virtqueues; each has two indices.
const MOST_PAGES: usize = 4096;
const MEMORY_MANAGER: &str = "memory-manager";
/// Offset of an index in either ring.
const INDEX_OFFSET: u64 = 2;

/// Why a state is none.
#[derive(Debug, thiserror::Error)]
pub(super) enum StateError {
    #[error("it is no device state of Cloud Hypervisor")]
    Foreign,
    #[error("it ends too early")]
    Short,
    #[error("its description is broken: {0}")]
    Json(#[from] serde_json::Error),
    #[error("it has no state of the memory")]
    NoMemory,
    #[error("its memory is not that of the machine: {0}")]
    Memory(String),
    #[error("a virtqueue lies at {0:#x}, where the machine has no memory")]
    Queue(u64),
    #[error("it has more virtqueues than any machine")]
    ManyQueues,
    #[error("its guest has {0} bytes of the memory that was added")]
    InUse(u64),
}

/// One level of `state.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Snapshot {
    snapshots: BTreeMap<String, Snapshot>,
    snapshot_data: Option<Data>,
}

/// The state of one part, itself JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Data {
    state: String,
}

/// What we add to a state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Facts {
    /// Memory of the machine.
    pub(super) memory_bytes: u64,
    /// What the balloon was told to hold.
    pub(super) balloon_bytes: u64,
    /// Room for memory that may be added. None of it was in use.
    #[serde(default)]
    pub(super) room_bytes: u64,
    /// Offsets in guest memory of the pages behind the state, ascending.
    pub(super) pages: Vec<u64>,
}

/// A whole state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Captured {
    pub(super) facts: Facts,
    pub(super) snapshot: Snapshot,
    /// The bytes of [`Facts::pages`], one after the other.
    pub(super) pages: Vec<u8>,
}

/// Reads `state.json`.
pub(super) fn parse(text: &[u8]) -> Result<Snapshot, StateError> {
    Ok(serde_json::from_slice(text)?)
}

/// Joins the parts of a state.
pub(super) fn join(facts: &Facts, state: &[u8], pages: &[u8]) -> Result<Vec<u8>, StateError> {
    let facts = serde_json::to_vec(facts)?;
    let mut bytes = Vec::with_capacity(HEAD_BYTES + facts.len() + state.len() + pages.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&u32::try_from(facts.len()).unwrap_or(u32::MAX).to_le_bytes());
    bytes.extend_from_slice(&(state.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&facts);
    bytes.extend_from_slice(state);
    bytes.extend_from_slice(pages);
    Ok(bytes)
}

/// Takes a state apart and checks it against the memory of the machine that it is for.
pub(super) fn split(bytes: &[u8], memory_bytes: u64) -> Result<Captured, StateError> {
    let rest = bytes.strip_prefix(MAGIC).ok_or(StateError::Foreign)?;
    let (facts_length, rest) = rest.split_first_chunk::<4>().ok_or(StateError::Short)?;
    let (state_length, rest) = rest.split_first_chunk::<8>().ok_or(StateError::Short)?;
    let facts_length = usize::try_from(u32::from_le_bytes(*facts_length)).map_err(|_| StateError::Short)?;
    let state_length = usize::try_from(u64::from_le_bytes(*state_length)).map_err(|_| StateError::Short)?;
    let (facts, rest) = rest.split_at_checked(facts_length).ok_or(StateError::Short)?;
    let (state, pages) = rest.split_at_checked(state_length).ok_or(StateError::Short)?;
    let facts: Facts = serde_json::from_slice(facts)?;
    if facts.memory_bytes != memory_bytes {
        let words = format!("{} bytes instead of {memory_bytes}", facts.memory_bytes);
        return Err(StateError::Memory(words));
    }
    if facts.pages.len() > MOST_PAGES {
        return Err(StateError::ManyQueues);
    }
    if pages.len() as u64 != facts.pages.len() as u64 * PAGE {
        return Err(StateError::Short);
    }
    let outside = |page: &&u64| !page.is_multiple_of(PAGE) || **page > memory_bytes - PAGE;
    if let Some(page) = facts.pages.iter().find(outside) {
        return Err(StateError::Queue(*page));
    }
    Ok(Captured {
        facts,
        snapshot: parse(state)?,
        pages: pages.to_vec(),
    })
}

/// The states of all parts.
fn states(snapshot: &Snapshot) -> impl Iterator<Item = &str> {
    let mut left = vec![snapshot];
    let parts = std::iter::from_fn(move || {
        let next = left.pop()?;
        left.extend(next.snapshots.values());
        Some(next.snapshot_data.as_ref())
    });
    parts.flatten().map(|data| data.state.as_str())
}

/// Memory that may be added, as the state of its device tells it.
#[derive(Deserialize)]
struct Added {
    config: Room,
    blocks_state: Blocks,
}

#[derive(Deserialize)]
struct Room {
    addr: u64,
    region_size: u64,
    plugged_size: u64,
    requested_size: u64,
}

/// Whether the guest has each block.
#[derive(Deserialize)]
struct Blocks {
    bitmap: Vec<bool>,
}

/// Makes sure that the guest has nothing of the memory that may be added, nor may take any, and that there is room for as
/// much as the machine has.
pub(super) fn check_added(snapshot: &Snapshot, memory_bytes: u64, room_bytes: u64) -> Result<(), StateError> {
    let odd = |what: &str| StateError::Memory(what.to_owned());
    let mut all = states(snapshot).filter_map(|state| serde_json::from_str::<Added>(state).ok());
    let (added, others) = (all.next(), all.next());
    if others.is_some() || added.is_some() != (room_bytes > 0) {
        return Err(odd("another number of places for more"));
    }
    let Some(Added { config, blocks_state }) = added else {
        return Ok(());
    };
    if config.region_size != room_bytes || config.addr != place_for_more(address(memory_bytes)) {
        return Err(odd("a place for more that is elsewhere"));
    }
    let bytes = config.plugged_size.max(config.requested_size);
    match bytes == 0 && !blocks_state.bitmap.contains(&true) {
        true => Ok(()),
        false => Err(StateError::InUse(bytes)),
    }
}

/// A virtqueue, as the state of its device tells it.
#[derive(Deserialize)]
struct Queues {
    queues: Vec<Queue>,
}

#[derive(Deserialize)]
struct Queue {
    ready: bool,
    avail_ring: u64,
    used_ring: u64,
}

/// Offsets of the pages in guest memory that hold the indices of virtqueues in use, ascending.
pub(super) fn pages_of_queues(snapshot: &Snapshot, memory_bytes: u64) -> Result<Vec<u64>, StateError> {
    let mut pages = BTreeSet::new();
    for state in states(snapshot) {
        let Ok(device) = serde_json::from_str::<Queues>(state) else {
            continue;
        };
        for queue in device.queues.iter().filter(|queue| queue.ready) {
            for ring in [queue.avail_ring, queue.used_ring] {
                let offset = ring
                    .checked_add(INDEX_OFFSET)
                    .and_then(|address| offset(address, memory_bytes))
                    .ok_or(StateError::Queue(ring))?;
                pages.insert(offset / PAGE * PAGE);
            }
        }
        if pages.len() > MOST_PAGES {
            return Err(StateError::ManyQueues);
        }
    }
    Ok(pages.into_iter().collect())
}

/// What is filled into the memory of a new process before it builds its devices: pages by their offsets.
pub(super) fn with_memory(
    mut snapshot: Snapshot,
    memory_bytes: u64,
    room_bytes: u64,
    filled: &[u64],
) -> Result<Vec<u8>, StateError> {
    let manager = snapshot.snapshots.get_mut(MEMORY_MANAGER);
    let data = manager
        .and_then(|manager| manager.snapshot_data.as_mut())
        .ok_or(StateError::NoMemory)?;
    let mut memory: Value = serde_json::from_str(&data.state)?;
    let ranges: Vec<Value> = filled
        .iter()
        .map(|page| json!({ "gpa": address(*page), "length": PAGE }))
        .collect();
    let parts = memory.as_object_mut().ok_or(StateError::NoMemory)?;
    parts.insert("memory_ranges".to_owned(), json!({ "data": ranges }));
    place(&mut memory, memory_bytes, room_bytes)?;
    data.state = memory.to_string();
    Ok(serde_json::to_vec(&snapshot)?)
}

/// Checks the pieces of memory, and says where in the file behind it each begins: a machine that booted had none.
fn place(memory: &mut Value, memory_bytes: u64, room_bytes: u64) -> Result<(), StateError> {
    let odd = |what: &str| StateError::Memory(what.to_owned());
    let mappings = memory["guest_ram_mappings"]
        .as_array_mut()
        .ok_or_else(|| odd("no pieces"))?;
    let mut expected = Vec::new();
    let mut end = 0;
    for length in segments(memory_bytes) {
        expected.push(Piece::of_file(end, length));
        end += length;
    }
    if room_bytes > 0 {
        expected.push(Piece {
            address: place_for_more(address(memory_bytes)),
            length: room_bytes,
            file_offset: 0,
            is_room: true,
        });
    }
    if mappings.len() != expected.len() {
        return Err(odd("another number of pieces"));
    }
    mappings.sort_by_key(|mapping| mapping["gpa"].as_u64());
    for (mapping, piece) in mappings.iter_mut().zip(expected) {
        let is_ours = mapping["gpa"].as_u64() == Some(piece.address)
            && mapping["size"].as_u64() == Some(piece.length)
            && mapping["zone_id"].as_str() == Some(ZONE)
            && mapping["virtio_mem"].as_bool() == Some(piece.is_room);
        if !is_ours {
            return Err(odd("a piece that is elsewhere"));
        }
        mapping["file_offset"] = json!(piece.file_offset);
    }
    Ok(())
}

/// A piece of memory as it must be.
struct Piece {
    address: u64,
    length: u64,
    file_offset: u64,
    /// Room for more, which no file is behind.
    is_room: bool,
}

impl Piece {
    fn of_file(offset: u64, length: u64) -> Self {
        Self {
            address: address(offset),
            length,
            file_offset: offset,
            is_room: false,
        }
    }
}

/// Offset in guest memory of a guest physical address.
fn offset(address: u64, memory_bytes: u64) -> Option<u64> {
    let offset = match address {
        below if below < HOLE.start => below,
        above if above >= HOLE.end => above - (HOLE.end - HOLE.start),
        _ => return None,
    };
    (offset < memory_bytes).then_some(offset)
}

/// Guest physical address of an offset in guest memory.
fn address(offset: u64) -> u64 {
    match offset < HOLE.start {
        true => offset,
        false => offset + (HOLE.end - HOLE.start),
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
