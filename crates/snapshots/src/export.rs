//! Writing a snapshot as one portable stream. Memory is flattened: the reader needs none of its ancestors.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::archive::{BlockKind, Encoded, LARGEST, Writer};
use crate::codec::Encoder;
use crate::disk::{self, BLOCK, DiskDigest};
use crate::error::{Part, at};
use crate::layout::{CHUNK_BYTES, bytes, bytes_of, chunk_offset, runs};
use crate::reader::{self, Chain, Scratch};
use crate::{Codec, Error, Manifest, MemoryStore, Result, files, parallel};

/// Blocks that are prepared together before they are written in order.
const BATCH: usize = 32;
/// The largest device state, bytes. Those of the known VMMs have some hundred thousand.
const MAX_DEVICE_STATE: u64 = 256 << 20;

/// What to export.
#[derive(Clone, Copy)]
pub struct Export<'a> {
    /// Names memory, device state and disk by their digests: what is exported is compared with them.
    pub manifest: &'a Manifest,
    /// Whatever else the reader is to get.
    pub description: &'a [u8],
    /// The file of the device state, if the manifest names one.
    pub device_state: Option<&'a Path>,
    /// The writable disk and its digest, if the manifest names one.
    pub disk: Option<(&'a Path, &'a DiskDigest)>,
    /// The root disk and its digest, if the manifest names one.
    pub root_disk: Option<(&'a Path, &'a DiskDigest)>,
}

/// Writes a snapshot; returns the bytes that were written. What went out before an error is of no use to anybody: a
/// reader refuses it.
///
/// `progress` is told bytes of content done and in all.
///
/// # Errors
/// [`Error::Damaged`] when a part is not what the manifest names, [`Error::Cancelled`], [`Error::Stream`] from
/// `output`, and those of the file system.
pub fn export(
    store: &MemoryStore,
    parts: &Export<'_>,
    output: &mut dyn Write,
    cancel: &AtomicBool,
    progress: &dyn Fn(u64, u64),
) -> Result<u64> {
    let Export {
        manifest,
        description,
        device_state,
        disk,
        root_disk,
    } = *parts;
    let manifest_bytes = manifest.seal()?;
    if description.len() > LARGEST {
        return Err(Error::Invalid(format!(
            "a description has at most {LARGEST} bytes"
        )));
    }
    let seal = |disk: Option<(_, &DiskDigest)>| disk.map(|(_, digest)| digest.seal());
    if manifest.disk != seal(disk) || manifest.root_disk != seal(root_disk) {
        return Err(Error::Damaged {
            part: Part::DiskDigest,
            reason: "it is not the one that the manifest names",
        });
    }
    let hold = manifest.memory.map(|memory| store.hold(memory.id)).transpose()?;
    let chain = hold
        .as_ref()
        .map(|hold| Chain::open(&store.shared, hold.id()))
        .transpose()?;
    if let (Some(chain), Some(memory)) = (&chain, &manifest.memory)
        && chain.top().seal != memory.digest
    {
        let part = Part::Index(memory.id);
        return Err(Error::Damaged {
            part,
            reason: "it is not the one that the manifest names",
        });
    }
    let devices = read_devices(manifest, device_state)?;
    let chunks = chain.as_ref().map(Chain::chunks).unwrap_or_default();
    let disk = disk.map(Opened::open).transpose()?;
    let root_disk = root_disk.map(Opened::open).transpose()?;
    let blocks = |disk: &Option<Opened<'_>>| disk.as_ref().map_or(0, |disk| disk.blocks.len());
    let blocks = blocks(&disk) + blocks(&root_disk);

    let mut job = Job {
        writer: Writer::begin(output).map_err(Error::Stream)?,
        cancel,
        progress,
        done: 0,
        total: chunks.len() as u64 * CHUNK_BYTES as u64 + blocks as u64 * BLOCK as u64,
    };
    job.writer
        .plain(BlockKind::Manifest, 0, &manifest_bytes)
        .map_err(Error::Stream)?;
    job.writer
        .plain(BlockKind::Description, 0, description)
        .map_err(Error::Stream)?;
    for (number, piece) in devices.chunks(LARGEST).enumerate() {
        job.writer
            .plain(BlockKind::Devices, (number * LARGEST) as u64, piece)
            .map_err(Error::Stream)?;
    }
    if let Some(chain) = &chain {
        job.run(&chunks, CHUNK_BYTES, |tools, chunk| {
            memory_block(chain, tools, chunk)
        })?;
    }
    for (disk, length, kind) in [
        (&disk, BlockKind::DiskLength, BlockKind::Disk),
        (&root_disk, BlockKind::RootLength, BlockKind::Root),
    ] {
        let Some(disk) = disk else { continue };
        job.writer
            .plain(length, 0, &disk.digest.length().to_le_bytes())
            .map_err(Error::Stream)?;
        job.run(&disk.blocks, BLOCK, |tools, block| disk.block(kind, tools, block))?;
    }
    job.writer.end().map_err(Error::Stream)
}

fn read_devices(manifest: &Manifest, path: Option<&Path>) -> Result<Vec<u8>> {
    let missing = Error::Damaged {
        part: Part::DeviceState,
        reason: "it is missing",
    };
    let Some(expected) = &manifest.device_state else {
        return Ok(Vec::new());
    };
    let Some(bytes) = path
        .map(|path| files::read(path, MAX_DEVICE_STATE))
        .transpose()?
        .flatten()
    else {
        return Err(missing);
    };
    expected.check(&bytes)?;
    Ok(bytes)
}

/// A disk on its way out.
struct Opened<'a> {
    file: File,
    path: &'a Path,
    digest: &'a DiskDigest,
    /// Those that hold anything, or should.
    blocks: Vec<u64>,
}

impl<'a> Opened<'a> {
    fn open((path, digest): (&'a Path, &'a DiskDigest)) -> Result<Self> {
        let file = File::open(path).map_err(at("open", path))?;
        if file.metadata().map_err(at("inspect", path))?.len() != digest.length() {
            let part = Part::Disk(0..digest.length());
            return Err(Error::Damaged {
                part,
                reason: "the file has another length",
            });
        }
        let mut blocks = disk::blocks_with_data(&file).map_err(at("read", path))?;
        blocks.extend(digest.numbers());
        blocks.sort_unstable();
        blocks.dedup();
        Ok(Self {
            file,
            path,
            digest,
            blocks,
        })
    }

    fn block(&self, kind: BlockKind, tools: &mut Tools, number: u64) -> Result<Option<Encoded>> {
        let range = disk::range_of(number, self.digest.length());
        let block = &mut tools.buffer[..(range.end - range.start) as usize];
        self.file
            .read_exact_at(block, range.start)
            .map_err(at("read", self.path))?;
        if !disk::intact(self.digest, number, block) {
            return Err(Error::Damaged {
                part: Part::Disk(range),
                reason: "it differs from what was captured",
            });
        }
        if self.digest.block(number).is_none() {
            return Ok(None);
        }
        encode(&mut tools.encoder, kind, range.start, block).map(Some)
    }
}

/// Buffers of one thread.
struct Tools {
    scratch: Scratch,
    encoder: Encoder,
    buffer: Vec<u8>,
    packed: Vec<u8>,
    ready: Vec<(usize, Option<Encoded>)>,
}

struct Job<'a> {
    writer: Writer<'a>,
    cancel: &'a AtomicBool,
    progress: &'a dyn Fn(u64, u64),
    done: u64,
    total: u64,
}

impl Job<'_> {
    /// Prepares blocks by all cores and writes them in order.
    fn run<Number: Copy + Sync>(
        &mut self,
        numbers: &[Number],
        size: usize,
        prepare: impl Fn(&mut Tools, Number) -> Result<Option<Encoded>> + Sync,
    ) -> Result<()> {
        for batch in numbers.chunks(BATCH) {
            let start = || {
                Ok(Tools {
                    scratch: Scratch::new(),
                    encoder: Encoder::new(Codec::Zstd(1), LARGEST)?,
                    buffer: vec![0; LARGEST],
                    packed: Vec::new(),
                    ready: Vec::new(),
                })
            };
            let cancel = self.cancel;
            let workers = parallel::each(batch.len(), start, |tools, at| {
                if cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let block = prepare(tools, batch[at])?;
                tools.ready.push((at, block));
                Ok(())
            })?;
            let mut ready: Vec<_> = workers.into_iter().flat_map(|tools| tools.ready).collect();
            ready.sort_unstable_by_key(|(at, _)| *at);
            for block in ready.iter().filter_map(|(_, block)| block.as_ref()) {
                self.writer.put(block).map_err(Error::Stream)?;
            }
            self.done += (batch.len() * size) as u64;
            (self.progress)(self.done, self.total);
        }
        Ok(())
    }
}

/// What the guest has in a chunk: a mask and the pages that are not zero.
fn memory_block(chain: &Chain, tools: &mut Tools, chunk: u32) -> Result<Option<Encoded>> {
    let Tools {
        scratch,
        encoder,
        buffer,
        packed,
        ..
    } = tools;
    let nonzero = reader::fill(
        &chain.layers,
        chunk,
        u64::MAX,
        &mut buffer[..CHUNK_BYTES],
        scratch,
    )?;
    if nonzero == 0 {
        return Ok(None);
    }
    packed.clear();
    packed.reserve(8 + bytes_of(nonzero));
    packed.extend_from_slice(&nonzero.to_le_bytes());
    runs(nonzero).for_each(|run| packed.extend_from_slice(&buffer[bytes(&run)]));
    encode(encoder, BlockKind::Memory, chunk_offset(chunk), packed).map(Some)
}

fn encode(encoder: &mut Encoder, kind: BlockKind, offset: u64, content: &[u8]) -> Result<Encoded> {
    let (encoding, stored) = encoder.encode(content)?;
    Ok(Encoded {
        kind,
        encoding,
        content: content.len(),
        offset,
        stored: stored.to_vec(),
    })
}
