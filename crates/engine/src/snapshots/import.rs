//! A snapshot that another server exported becomes one of this server's.
//!
//! ```text
//!  body ─► pieces ─► checked and written (blocking) ─► papers checked ─► root disk placed ─► settled ─► COMMIT
//!            └──────────────── failure or crash: nothing of it is left ────────────────┘
//! ```
//!
//! A guest has its root disk in its memory, in parts, so it goes on only above the same one, byte for byte: the file
//! brings it along. Where the image is here with the same bytes, that one is used. A disk without memory goes on above
//! whatever this server made of the image.
//!
//! Invariants:
//! - The file names nothing here: snapshot and memory get new ids, and no path of it is used.
//! - Until the row is committed the files are under a lease whose end removes them, and the memory under a hold.
//! - Whether this host can run what was captured is judged when it is restored, not now: nothing is lost by keeping it.

use std::cell::OnceCell;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use hypeman_snapshots as portable;
use jiff::Timestamp;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::model::{CompressionState, MemoryRecord, Snapshot, SnapshotKind, SnapshotRecord};
use super::papers::{self, Papers, wrong};
use super::state::{self, Facts};
use super::vault::Hold;
use crate::blocking::{blocking, blocking_io};
use crate::images::Carried;
use crate::instances::capture::Captured;
use crate::instances::disks;
use crate::layout::make_private;
use crate::shared::Shared;
use crate::{EngineError, InstanceRecord, durable, faults};

/// The largest root disk, bytes: no image may become more.
const MAX_ROOT_DISK: u64 = 64 << 30;
/// Pieces of the body that wait to be written.
const WAITING: usize = 4;

/// Hands the pieces of a body on until it ends, breaks off, or nobody wants more.
pub(super) async fn feed(
    body: &mut (dyn Stream<Item = io::Result<Bytes>> + Send + Unpin),
    sender: mpsc::Sender<io::Result<Bytes>>,
) {
    loop {
        let piece = tokio::select! {
            piece = body.next() => piece,
            () = sender.closed() => return,
        };
        let Some(piece) = piece else { return };
        let broken = piece.is_err();
        if sender.send(piece).await.is_err() || broken {
            return;
        }
    }
}

/// Where the pieces of a body go.
pub(super) fn pipe() -> (mpsc::Sender<io::Result<Bytes>>, mpsc::Receiver<io::Result<Bytes>>) {
    mpsc::channel(WAITING)
}

/// Imports as snapshot `id`. `name` replaces the one in the file. What fails leaves nothing.
pub(super) async fn import(
    shared: &Arc<Shared>,
    id: String,
    name: Option<String>,
    body: mpsc::Receiver<io::Result<Bytes>>,
) -> Result<Snapshot, EngineError> {
    let lease = shared.leases.take(&id);
    let mut retained = Vec::new();
    let committed = keep(shared, id.clone(), name, body, &mut retained).await;
    for image in retained {
        shared.images.release(&image);
        shared.images.collect_unused(&image).await;
    }
    if committed.is_err() {
        // Its files go with the lease.
        shared.leases.doom(&id);
    }
    drop(lease);
    committed
}

async fn keep(
    shared: &Arc<Shared>,
    id: String,
    name: Option<String>,
    body: mpsc::Receiver<io::Result<Bytes>>,
    retained: &mut Vec<String>,
) -> Result<Snapshot, EngineError> {
    let mut received = receive(shared, &id, body).await?;
    place_root_disk(shared, &mut received, retained).await?;
    fits(shared, &received.source)?;
    let captured = settle(shared, id, name, received).await?;
    super::service::commit(shared, captured).await
}

/// What a file held, checked.
struct Received {
    papers: Papers,
    source: InstanceRecord,
    root_disk: Carried,
    devices_bytes: u64,
    manifest: String,
    /// The image, and its bytes that are not zero.
    memory: Option<(Hold, String, u64)>,
}

async fn receive(
    shared: &Arc<Shared>,
    id: &str,
    body: mpsc::Receiver<io::Result<Bytes>>,
) -> Result<Received, EngineError> {
    let _turn = tokio::select! {
        turn = shared.transfers.acquire() => turn.map_err(|_| EngineError::ShuttingDown)?,
        () = shared.closing.cancelled() => return Err(EngineError::ShuttingDown),
    };
    let directory = shared.layout.snapshot(id);
    make_private(&directory)?;
    let cancel = Arc::new(AtomicBool::new(false));
    let (working, watched) = (Arc::clone(shared), Arc::clone(&cancel));
    let body = Body {
        pieces: body,
        closing: shared.closing.clone(),
        runtime: Handle::current(),
        piece: Bytes::new(),
    };
    let work = blocking(move || read(&working, &directory, body, &watched));
    tokio::pin!(work);
    tokio::select! {
        outcome = &mut work => outcome,
        () = shared.closing.cancelled() => {
            cancel.store(true, Ordering::Release);
            work.await.and(Err(EngineError::ShuttingDown))
        }
    }
}

fn read(
    shared: &Shared,
    directory: &Path,
    mut body: Body,
    cancel: &AtomicBool,
) -> Result<Received, EngineError> {
    let limits = &shared.options.limits;
    let bounds = portable::Bounds {
        memory: limits.max_memory_per_instance,
        disk: limits.max_overlay_size,
        root_disk: MAX_ROOT_DISK,
        device_state: state::MAX_DEVICES,
        description: papers::MAX_BYTES,
    };
    let store = shared.vault.store();
    let id = portable::MemoryId::random()?;
    // A small file can hold a large disk: what runs here must not suffer for it.
    let full = OnceCell::new();
    let watch = |_| {
        if let Err(error) = shared.images.check_reserve() {
            let _ = full.set(error);
            cancel.store(true, Ordering::Release);
        }
    };
    let imported = portable::import(store, &id, &mut body, directory, &bounds, cancel, &watch);
    if let Some(error) = full.into_inner() {
        return Err(error);
    }
    let portable::Imported {
        manifest,
        description,
        device_state,
        disk,
        root_disk,
        memory,
    } = imported.map_err(refused)?;
    let memory = memory.map(|memory| {
        // Held by us before the store lets go.
        let hold = shared.vault.hold(&id.to_string());
        (hold, memory.content_bytes, memory.digest.to_hex().to_string())
    });
    let papers = Papers::open(&description, limits)?;
    let source = papers.source();
    let agrees = manifest.memory_bytes == source.memory_bytes
        && manifest.vcpus == source.vcpus
        && manifest.network == source.network.is_some()
        && manifest.kernel == source.boot_artifacts
        && memory.is_some() == (papers.kind == SnapshotKind::Standby);
    if !agrees {
        return Err(wrong("its description is not that of what it holds"));
    }
    let (Some((disk, digest)), Some((root_path, root_digest))) = (disk, root_disk) else {
        return Err(wrong("it does not hold both disks"));
    };
    if digest.length() != source.overlay_bytes {
        return Err(wrong("its disk has another size than it says"));
    }
    let named = |from: &Path, name: &str| {
        std::fs::rename(from, directory.join(name))
            .map_err(|error| EngineError::io("name the imported files", error))
    };
    named(&disk, disks::SNAPSHOT_DISK)?;
    let (mut devices_bytes, mut manifest_digest) = (0, String::new());
    if let (Some(file), Some(described), Some((_, _, digest))) = (device_state, &papers.memory, &memory) {
        let kept = |error| EngineError::io("keep the device state", error);
        let devices = std::fs::read(&file).map_err(kept)?;
        std::fs::remove_file(&file).map_err(kept)?;
        let facts = Facts {
            hypervisor: source.hypervisor,
            identity: described.identity.clone(),
            boot_artifacts: source.boot_artifacts.clone(),
            memory_bytes: source.memory_bytes,
            vcpus: source.vcpus,
            networked: source.network.is_some(),
            memory_image: id.to_string(),
            memory_digest: digest.clone(),
        };
        devices_bytes = devices.len() as u64;
        manifest_digest = state::write(directory, facts, &devices)?;
    }
    let root_disk = Carried {
        seal: root_digest.seal().to_hex().to_string(),
        path: root_path,
        bytes: root_digest.length(),
        platform: source.platform.clone(),
        config: papers.image_config().clone(),
    };
    Ok(Received {
        papers,
        source,
        root_disk,
        devices_bytes,
        manifest: manifest_digest,
        memory: memory.map(|(hold, bytes, _)| (hold, id.to_string(), bytes)),
    })
}

/// What a refused file means to whoever sent it.
fn refused(error: portable::Error) -> EngineError {
    match error {
        portable::Error::Damaged { .. } => EngineError::invalid(
            "snapshot_damaged",
            format!("this is not a whole exported snapshot, nothing of it was kept: {error}"),
        ),
        portable::Error::Version { .. } => EngineError::Incompatible(error.to_string()),
        portable::Error::Invalid(_) | portable::Error::Stream(_) => {
            EngineError::invalid("invalid_request", error.to_string())
        }
        portable::Error::Cancelled => EngineError::ShuttingDown,
        other => other.into(),
    }
}

/// Names the root disk that the snapshot goes on above: the image's if it serves, else the one in the file. What is
/// named goes into `retained` first, so that nobody deletes it in between.
async fn place_root_disk(
    shared: &Arc<Shared>,
    received: &mut Received,
    retained: &mut Vec<String>,
) -> Result<(), EngineError> {
    let mut retain = |image: &str| {
        shared.images.retain(image);
        retained.push(image.to_owned());
    };
    let image = received.source.image_digest.clone();
    retain(&image);
    let known = shared.images.bootable(&image).is_ok();
    let serves =
        known && (received.memory.is_none() || holds(shared, &image, &received.root_disk.seal).await?);
    if !serves {
        let name = received.root_disk.name();
        retain(&name);
        shared.images.keep_carried(received.root_disk.clone()).await?;
        received.source.image_digest = name;
    }
    let path = received.root_disk.path.clone();
    blocking_io("drop a root disk that is here already", move || {
        durable::remove_tree(&path)
    })
    .await
}

/// Whether the root disk of an image is one with this seal.
async fn holds(shared: &Shared, image: &str, seal: &str) -> Result<bool, EngineError> {
    let (path, seal) = (shared.layout.root_disk(image), seal.to_owned());
    blocking(move || {
        let digest = portable::disk::seal(&path, &AtomicBool::new(false))?;
        Ok(digest.seal().to_hex().as_str() == seal)
    })
    .await
}

/// Refuses what could be restored in place into an instance of another shape.
fn fits(shared: &Shared, source: &InstanceRecord) -> Result<(), EngineError> {
    let shape = |record: &InstanceRecord| {
        (
            record.image_digest.clone(),
            record.memory_bytes,
            record.hotplug_bytes,
            record.overlay_bytes,
            record.vcpus,
            record.network.is_some(),
        )
    };
    let same = |record: &InstanceRecord| shape(record) == shape(source);
    match shared.table.get(&source.id) {
        Ok(slot) if !same(&slot.published.borrow().record) => Err(wrong(
            "it says that it is of an instance of this server, which has another image or size",
        )),
        _ => Ok(()),
    }
}

/// What becomes the snapshot, all of it durable.
async fn settle(
    shared: &Arc<Shared>,
    id: String,
    name: Option<String>,
    received: Received,
) -> Result<Captured, EngineError> {
    let Received {
        papers,
        mut source,
        devices_bytes,
        manifest,
        memory,
        ..
    } = received;
    let path = shared.layout.snapshot(&id).join(disks::SNAPSHOT_DISK);
    let disk = disks::settle(path).await?;
    let snapshots = shared.layout.snapshots();
    blocking_io("keep the imported files", move || {
        durable::sync_directory(&snapshots)
    })
    .await?;
    if papers.kind == SnapshotKind::Stopped && shared.known_artifacts(&source.boot_artifacts).is_none() {
        // Nothing runs in it: any kernel can boot it.
        source.boot_artifacts = shared.current_artifacts().await?.id;
    }
    let (mut hold, mut kept) = (None, None);
    if let (Some((held, image, bytes)), Some(described)) = (memory, papers.memory) {
        hold = Some(held);
        kept = Some(MemoryRecord {
            image,
            bytes,
            compression: described.compression,
            state: CompressionState::None,
            agent_key: described.agent_key,
        });
    }
    let record = SnapshotRecord {
        id,
        name: name.or(papers.name),
        kind: papers.kind,
        tags: papers.tags,
        // The other server's clock may be ahead, and lists are in the order of time.
        created_at: papers.created_at.min(Timestamp::now()),
        source,
        parent: None,
        scheduled_for: None,
        size_bytes: disk.bytes + devices_bytes + kept.as_ref().map_or(0, |memory| memory.bytes),
        memory: kept,
        disk_bytes: disk.bytes,
        disk_digest: disk.digest,
        manifest,
    };
    faults::point("import.settled");
    Ok(Captured { record, hold })
}

/// A body as something that blocks. An end of the server ends it too.
struct Body {
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    closing: CancellationToken,
    runtime: Handle,
    piece: Bytes,
}

impl Read for Body {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            let next = self.runtime.block_on(async {
                tokio::select! {
                    next = self.pieces.recv() => Ok(next),
                    () = self.closing.cancelled() => Err(io::Error::other("the server is shutting down")),
                }
            });
            match next?.transpose()? {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let taken = self.piece.split_to(into.len().min(self.piece.len()));
        into[..taken.len()].copy_from_slice(&taken);
        Ok(taken.len())
    }
}
