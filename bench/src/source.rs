//! Guest memory that an offload daemon hands out: a raw file, or frames; read chunk by chunk, or all of it by all cores.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use hypeman_snapshots::{CHUNK_BYTES, MemoryReader, PAGE_BYTES, PieceBuffers};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Where memory comes from.
#[derive(Debug)]
pub enum Source {
    /// A sparse file with each page at its own offset.
    Raw(File),
    /// An image of a store; what is read is verified.
    Framed(Box<MemoryReader>),
}

/// What one thread needs to read chunks.
pub struct Room {
    /// The chunk that was read last.
    pub bytes: Vec<u8>,
    pieces: PieceBuffers,
}

impl Room {
    /// Fresh room.
    pub fn new() -> Self {
        Self {
            bytes: vec![0; CHUNK_BYTES],
            pieces: PieceBuffers::new(),
        }
    }
}

impl Source {
    /// Reads a chunk; returns which of its pages may be other than zero.
    ///
    /// # Errors
    /// There is no such chunk, or it is damaged.
    pub fn chunk(&self, number: u64, room: &mut Room) -> io::Result<u64> {
        match self {
            Self::Raw(file) => {
                file.read_exact_at(&mut room.bytes, number * CHUNK_BYTES as u64)?;
                Ok(u64::MAX)
            }
            Self::Framed(reader) => {
                let number = u32::try_from(number).map_err(io::Error::other)?;
                let piece = reader.read(number, &mut room.pieces).map_err(io::Error::other)?;
                room.bytes.fill(0);
                let places = (0..64_usize).filter(|page| (piece.nonzero >> *page) & 1 == 1);
                for (place, page) in places.zip(piece.pages.chunks_exact(PAGE_BYTES)) {
                    room.bytes[place * PAGE_BYTES..(place + 1) * PAGE_BYTES].copy_from_slice(page);
                }
                Ok(piece.nonzero)
            }
        }
    }

    /// Fills empty memory with all that is not zero, on all cores.
    ///
    /// # Errors
    /// Something is damaged, or there is no room.
    pub fn fill(&self, memory: &File) -> io::Result<()> {
        let reader = match self {
            Self::Raw(file) => return copy(file, memory),
            Self::Framed(reader) => reader,
        };
        let chunks: Vec<u32> = (0..reader.chunks())
            .filter(|chunk| reader.nonzero(*chunk) != 0)
            .collect();
        on_all_cores(chunks.len(), Room::new, |number, room| {
            let chunk = u64::from(chunks[number]);
            let nonzero = self.chunk(chunk, room)?;
            for run in runs(nonzero) {
                let range = run.start * PAGE_BYTES..run.end * PAGE_BYTES;
                let offset = chunk * CHUNK_BYTES as u64 + range.start as u64;
                memory.write_all_at(&room.bytes[range], offset)?;
            }
            Ok(())
        })
    }
}

/// Copies what is not a hole of a file, on all cores.
///
/// # Errors
/// Those of the file system.
pub fn copy(from: &File, to: &File) -> io::Result<()> {
    let step = CHUNK_BYTES as u64;
    let mut pieces = Vec::new();
    for extent in extents(from)? {
        let starts = (extent.start..extent.end).step_by(CHUNK_BYTES);
        pieces.extend(starts.map(|start| start..extent.end.min(start + step)));
    }
    let buffer = || vec![0_u8; CHUNK_BYTES];
    on_all_cores(pieces.len(), buffer, |number, buffer| {
        let Range { start, end } = pieces[number];
        let buffer = &mut buffer[..(end - start) as usize];
        from.read_exact_at(buffer, start)?;
        to.write_all_at(buffer, start)
    })
}

/// Where a file has something, ascending.
///
/// # Errors
/// Its file system cannot tell.
pub fn extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    loop {
        let at = found.last().map_or(0, |extent| extent.end);
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(found),
            Err(error) => return Err(error.into()),
        };
        found.push(start..seek(file, SeekFrom::Hole(start))?);
    }
}

/// Runs of set bits.
fn runs(bits: u64) -> Vec<Range<usize>> {
    let mut found: Vec<Range<usize>> = Vec::new();
    for place in (0..64_usize).filter(|place| (bits >> *place) & 1 == 1) {
        match found.last_mut() {
            Some(run) if run.end == place => run.end += 1,
            _ => found.push(place..place + 1),
        }
    }
    found
}

/// Does `count` pieces of work, each thread with a state of its own.
fn on_all_cores<State>(
    count: usize,
    start: impl Fn() -> State + Sync,
    work: impl Fn(usize, &mut State) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let running: Vec<_> = (0..cores.min(count))
            .map(|_| {
                scope.spawn(|| -> io::Result<()> {
                    let mut state = start();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= count {
                            return Ok(());
                        }
                        work(number, &mut state)?;
                    }
                })
            })
            .collect();
        running
            .into_iter()
            .map(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
            })
            .collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_has_the_bytes_and_the_holes_of_its_source() {
        let [from, to] = [(), ()].map(|()| tempfile::tempfile().unwrap());
        for file in [&from, &to] {
            file.set_len(4 << 20).unwrap();
        }
        from.write_all_at(&[7; 8192], 1 << 20).unwrap();
        from.write_all_at(&[8; 300_000], 3 << 20).unwrap();
        copy(&from, &to).unwrap();
        let [mut one, mut other] = [vec![0; 4 << 20], vec![1; 4 << 20]];
        from.read_exact_at(&mut one, 0).unwrap();
        to.read_exact_at(&mut other, 0).unwrap();
        assert!(one == other);
        assert_eq!(extents(&from).unwrap(), extents(&to).unwrap());
    }

    #[test]
    fn bits_that_follow_each_other_are_one_run() {
        assert!(runs(0).is_empty());
        assert_eq!(runs(0b1_0110), [1..3, 4..5]);
        assert_eq!(runs(u64::MAX).len(), 1);
    }
}
