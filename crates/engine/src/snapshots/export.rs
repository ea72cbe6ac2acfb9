//! A snapshot as one stream that another server can import.
//!
//! ```text
//!  files, memory ──► checked ──► portable form (blocking) ──► pieces ──► whoever reads
//! ```
//!
//! Nothing is written to disk, and at most a few pieces wait for a slow reader. Reading ends with a last piece of its
//! own: a stream that broke off never looks whole, and the format itself says so once more.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hypeman_snapshots as portable;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::leases::Lease;
use super::model::{Snapshot, SnapshotKind};
use super::papers::Papers;
use super::{state, vault};
use crate::EngineError;
use crate::blocking::blocking;
use crate::instances::disks;
use crate::shared::Shared;

/// Bytes that are handed on together.
const PIECE: usize = 256 << 10;
/// Pieces that wait for a slow reader.
const WAITING: usize = 4;
/// A reader that takes nothing for so long is gone.
const STALL: Duration = Duration::from_secs(300);
/// Root disk and writable layer.
const DISKS: u32 = 2;

/// A snapshot on its way out.
#[derive(Debug)]
pub struct SnapshotExport {
    /// What it is.
    pub snapshot: Snapshot,
    first: Option<Bytes>,
    rest: mpsc::Receiver<Piece>,
}

#[derive(Debug)]
enum Piece {
    Content(Bytes),
    Failed(EngineError),
    End,
}

impl SnapshotExport {
    /// The next bytes of the file; `None` after the last.
    ///
    /// # Errors
    /// A part is damaged or cannot be read; the file is of no use then.
    pub async fn next(&mut self) -> Option<Result<Bytes, EngineError>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        match self.rest.recv().await {
            Some(Piece::Content(bytes)) => Some(Ok(bytes)),
            Some(Piece::Failed(error)) => Some(Err(error)),
            Some(Piece::End) => None,
            None => Some(Err(EngineError::ShuttingDown)),
        }
    }
}

/// Starts to export; returns with the first bytes, when all is there and what must be known first was checked.
pub(super) async fn start(
    shared: &Arc<Shared>,
    record: Snapshot,
    lease: Lease,
) -> Result<SnapshotExport, EngineError> {
    let (sender, rest) = mpsc::channel(WAITING);
    let mut export = SnapshotExport {
        snapshot: Arc::clone(&record),
        first: None,
        rest,
    };
    let shared = Arc::clone(shared);
    let tasks = shared.tasks.clone();
    tasks.spawn(async move {
        let image = record.source.image_digest.clone();
        shared.images.retain(&image);
        let memory = record
            .memory
            .as_ref()
            .map(|memory| shared.vault.hold(&memory.image));
        let last = match send(&shared, record, &sender).await {
            Ok(()) => Piece::End,
            Err(error) => {
                tracing::warn!(snapshot = lease.id(), %error, "export ended early");
                Piece::Failed(error)
            }
        };
        drop((memory, lease));
        shared.images.release(&image);
        shared.images.collect_unused(&image).await;
        tokio::select! {
            _ = tokio::time::timeout(STALL, sender.send(last)) => {}
            () = shared.closing.cancelled() => {}
        }
    });
    export.first = export.next().await.transpose()?;
    Ok(export)
}

/// Sends all of a snapshot whose parts are held.
async fn send(
    shared: &Arc<Shared>,
    record: Snapshot,
    sender: &mpsc::Sender<Piece>,
) -> Result<(), EngineError> {
    // Still there after its parts were held: whoever deletes it from here on leaves them.
    super::rows::get(shared, &record.id)?;
    let _turn = tokio::select! {
        turn = shared.transfers.acquire() => turn.map_err(|_| EngineError::ShuttingDown)?,
        () = shared.closing.cancelled() => return Err(EngineError::ShuttingDown),
        () = sender.closed() => return Ok(()),
    };
    let cancel = Arc::new(AtomicBool::new(false));
    let pieces = Pieces {
        sender: sender.clone(),
        closing: shared.closing.clone(),
        runtime: Handle::current(),
        buffer: Vec::new(),
    };
    let (working, watched) = (Arc::clone(shared), Arc::clone(&cancel));
    let work = blocking(move || write(&working, &record, pieces, &watched));
    tokio::pin!(work);
    tokio::select! {
        outcome = &mut work => return outcome,
        () = sender.closed() => {}
        () = shared.closing.cancelled() => {}
    }
    cancel.store(true, Ordering::Release);
    work.await
}

fn write(
    shared: &Shared,
    record: &Snapshot,
    mut pieces: Pieces,
    cancel: &AtomicBool,
) -> Result<(), EngineError> {
    let directory = shared.layout.snapshot(&record.id);
    let disk = directory.join(disks::SNAPSHOT_DISK);
    let source = &record.source;
    let image = shared.images.bootable(&source.image_digest)?;
    let root_disk = shared.layout.root_disk(&source.image_digest);
    // What changes after it was sealed is noticed while it is exported.
    let digest = portable::disk::seal(&disk, cancel)?;
    let root_digest = portable::disk::seal(&root_disk, cancel)?;
    if digest.seal().to_hex().as_str() != record.disk_digest {
        return Err(EngineError::damaged("the captured disk"));
    }
    let recorded = shared.images.recorded_seal(&source.image_digest);
    if recorded.is_some_and(|seal| root_digest.seal().to_hex().as_str() != seal) {
        return Err(EngineError::damaged(&format!(
            "the root disk of image {}",
            source.image_digest
        )));
    }
    let mut manifest = portable::Manifest {
        kind: match record.kind {
            SnapshotKind::Standby => portable::SnapshotKind::Standby,
            SnapshotKind::Stopped => portable::SnapshotKind::Stopped,
        },
        vmm: portable::Vmm {
            name: format!("{:?}", source.hypervisor),
            version: String::new(),
            machine: String::new(),
        },
        kernel: source.boot_artifacts.clone(),
        cpu_features: String::new(),
        memory_bytes: source.memory_bytes,
        vcpus: source.vcpus,
        disks: DISKS,
        network: source.network.is_some(),
        memory: None,
        device_state: None,
        disk: Some(digest.seal()),
        root_disk: Some(root_digest.seal()),
        parent: None,
    };
    let mut identity = None;
    if let Some(memory) = &record.memory {
        let (state::Manifest { facts, .. }, devices) = state::read(&directory, &record.manifest)?;
        let id = vault::parse(&memory.image)?;
        let digest = shared.vault.store().digest(id)?;
        if digest.to_hex().as_str() != facts.memory_digest {
            return Err(EngineError::damaged("the memory image"));
        }
        manifest.memory = Some(portable::MemoryPart { id, digest });
        manifest.device_state = Some(portable::Blob::of(&devices));
        manifest.vmm.version.clone_from(&facts.identity.version);
        manifest.vmm.machine.clone_from(&facts.identity.machine);
        manifest.cpu_features.clone_from(&facts.identity.cpu);
        identity = Some(facts.identity);
    }
    let description = Papers::of(record, image, identity).seal()?;
    let devices = directory.join(state::DEVICES);
    let parts = portable::Export {
        manifest: &manifest,
        description: &description,
        device_state: manifest.device_state.map(|_| devices.as_path()),
        disk: Some((&disk, &digest)),
        root_disk: Some((&root_disk, &root_digest)),
    };
    portable::export(shared.vault.store(), &parts, &mut pieces, cancel, &|_, _| {})?;
    pieces
        .flush()
        .map_err(|error| EngineError::io("hand on the exported snapshot", error))
}

/// Hands on what is written to it, in pieces.
struct Pieces {
    sender: mpsc::Sender<Piece>,
    closing: CancellationToken,
    runtime: Handle,
    buffer: Vec<u8>,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let piece = Piece::Content(std::mem::take(&mut self.buffer).into());
        let sent = self.runtime.block_on(async {
            tokio::select! {
                sent = tokio::time::timeout(STALL, self.sender.send(piece)) => sent.is_ok_and(|sent| sent.is_ok()),
                () = self.closing.cancelled() => false,
            }
        });
        if sent {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::BrokenPipe,
            "nobody takes it any more",
        ))
    }
}
