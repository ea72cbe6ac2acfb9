//! Copies of disks that keep their holes, and digests of what disks hold.
//!
//! A digest does not depend on where a file has holes: a block of zeros and a hole are the same disk.
//!
//! ```text
//! body   length   u64, bytes of the disk
//!        blocks   u64, then as many of
//!            number   u64, strictly ascending; block n begins at n MiB
//!            digest   BLAKE3 of the block; the last one may be shorter
//! ```
//! Blocks that are not listed hold nothing but zeros.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blake3::Hash;

use crate::error::{Part, at};
use crate::sealed::{self, Fields, Kind, Refusal};
use crate::{Error, Result, files, memo, parallel};

const KIND: Kind = Kind {
    magic: b"hypemDSK",
    version: 1,
};
const ENTRY: usize = 8 + 32;
/// Bytes that are hashed together.
pub(crate) const BLOCK: usize = 1 << 20;
/// What the kernel cannot store less than: zeros of this size become holes.
const SMALLEST: usize = 4096;
/// The largest disk that is accepted, bytes: no digest that is read may ask for more.
pub(crate) const MAX_DISK: u64 = 64 << 40;

/// What a copy took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Bytes that were written; none after a reflink.
    pub bytes: u64,
    /// Whether the file system shares the blocks of both files.
    pub reflinked: bool,
}

/// Copies a disk to a new file, durable when this returns: by reflink where the file system can, else only what is not
/// zero. Its directory is the caller's to sync.
///
/// # Errors
/// [`Error::Invalid`] when the target exists, [`Error::Cancelled`], and those of the file system. The target is removed.
pub fn copy(source: &Path, target: &Path, cancel: &AtomicBool) -> Result<Copied> {
    let from = File::open(source).map_err(at("open", source))?;
    let to = match File::create_new(target) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(Error::Invalid(format!("{} exists already", target.display())));
        }
        other => other.map_err(at("create", target))?,
    };
    let copied = copy_into(&from, source, &to, target, cancel);
    if copied.is_err() {
        files::remove(target)?;
    }
    copied
}

fn copy_into(from: &File, source: &Path, to: &File, target: &Path, cancel: &AtomicBool) -> Result<Copied> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        to.sync_all().map_err(at("sync", target))?;
        return Ok(Copied {
            bytes: 0,
            reflinked: true,
        });
    }
    let length = from.metadata().map_err(at("inspect", source))?.len();
    to.set_len(length).map_err(at("extend", target))?;
    let blocks = blocks_with_data(from).map_err(at("read", source))?;
    let written = AtomicU64::new(0);
    parallel::each(blocks.len(), buffer, |buffer, number| {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let range = range_of(blocks[number], length);
        let block = &mut buffer[..(range.end - range.start) as usize];
        from.read_exact_at(block, range.start)
            .map_err(at("read", source))?;
        for part in parts_with_data(block) {
            written.fetch_add(part.len() as u64, Ordering::Relaxed);
            to.write_all_at(&block[part.clone()], range.start + part.start as u64)
                .map_err(at("write", target))?;
        }
        Ok(())
    })?;
    to.sync_all().map_err(at("sync", target))?;
    Ok(Copied {
        bytes: written.into_inner(),
        reflinked: false,
    })
}

fn buffer() -> Result<Vec<u8>> {
    Ok(vec![0; BLOCK])
}

/// Where a block lies in a disk of a length.
pub(crate) fn range_of(block: u64, length: u64) -> Range<u64> {
    let start = block * BLOCK as u64;
    start.min(length)..(start + BLOCK as u64).min(length)
}

/// The blocks of a file that are not holes, ascending.
pub(crate) fn blocks_with_data(file: &File) -> io::Result<Vec<u64>> {
    let block = BLOCK as u64;
    let extents = files::data_extents(file)?;
    let numbers = extents
        .iter()
        .flat_map(|extent| extent.start / block..extent.end.div_ceil(block));
    let mut numbers: Vec<u64> = numbers.collect();
    numbers.dedup();
    Ok(numbers)
}

/// The parts of a block that are not zero.
pub(crate) fn parts_with_data(block: &[u8]) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    for (number, piece) in block.chunks(SMALLEST).enumerate() {
        if crate::layout::is_zero(piece) {
            continue;
        }
        let start = number * SMALLEST;
        let end = start + piece.len();
        match parts.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => parts.push(start..end),
        }
    }
    parts
}

/// What a disk holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskDigest {
    length: u64,
    blocks: Vec<(u64, Hash)>,
}

impl DiskDigest {
    pub(crate) fn new(length: u64, blocks: Vec<(u64, Hash)>) -> Self {
        Self { length, blocks }
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The BLAKE3 of the digest: whoever knows it knows every byte of the disk.
    #[must_use]
    pub fn seal(&self) -> Hash {
        sealed::seal(&KIND, &self.body()).1
    }

    /// What to store beside the disk.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        sealed::seal(&KIND, &self.body()).0
    }

    fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(16 + self.blocks.len() * ENTRY);
        body.extend_from_slice(&self.length.to_le_bytes());
        body.extend_from_slice(&(self.blocks.len() as u64).to_le_bytes());
        for (number, digest) in &self.blocks {
            body.extend_from_slice(&number.to_le_bytes());
            body.extend_from_slice(digest.as_bytes());
        }
        body
    }

    /// Reads what was stored.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Version`]
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let damaged = |reason| Error::Damaged {
            part: Part::DiskDigest,
            reason,
        };
        let (body, _) = sealed::open(&KIND, bytes).map_err(|refusal| match refusal {
            Refusal::Damaged(reason) => damaged(reason),
            Refusal::Version(found) => Error::Version {
                part: Part::DiskDigest,
                found,
                known: KIND.version,
            },
        })?;
        Self::decode(body).ok_or_else(|| damaged("its fields contradict each other"))
    }

    fn decode(body: &[u8]) -> Option<Self> {
        let mut fields = Fields(body);
        let (length, count) = (fields.u64()?, fields.u64()?);
        if length > MAX_DISK || fields.0.len() as u64 != count.checked_mul(ENTRY as u64)? {
            return None;
        }
        let mut blocks: Vec<(u64, Hash)> = Vec::with_capacity(usize::try_from(count).ok()?);
        for _ in 0..count {
            let (number, digest) = (fields.u64()?, fields.hash()?);
            let ascending = blocks.last().is_none_or(|(last, _)| *last < number);
            if !ascending || number >= length.div_ceil(BLOCK as u64) {
                return None;
            }
            blocks.push((number, digest));
        }
        Some(Self { length, blocks })
    }

    /// The blocks that are not zero, ascending.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = u64> {
        self.blocks.iter().map(|(number, _)| *number)
    }

    /// The digest of a block; `None` for zeros.
    pub(crate) fn block(&self, number: u64) -> Option<&Hash> {
        let at = self
            .blocks
            .binary_search_by_key(&number, |(number, _)| *number)
            .ok()?;
        Some(&self.blocks[at].1)
    }
}

/// Reads a disk that nobody writes to and says what it holds.
///
/// # Errors
/// [`Error::Cancelled`], [`Error::Invalid`] for a disk that is too large, and those of the file system.
pub fn seal(path: &Path, cancel: &AtomicBool) -> Result<DiskDigest> {
    let file = File::open(path).map_err(at("open", path))?;
    let length = file.metadata().map_err(at("inspect", path))?.len();
    if length > MAX_DISK {
        return Err(Error::Invalid(format!(
            "{} has more than {MAX_DISK} bytes",
            path.display()
        )));
    }
    let numbers = blocks_with_data(&file).map_err(at("read", path))?;
    let found = each_block(&file, path, length, &numbers, cancel, |number, block| {
        Ok((!parts_with_data(block).is_empty()).then(|| (number, blake3::hash(block))))
    })?;
    Ok(DiskDigest {
        length,
        blocks: found,
    })
}

/// Says what a disk holds, as [`DiskDigest::seal`], and remembers in `memo` that this was looked at: see [`check_seal`].
///
/// # Errors
/// As [`seal`].
pub fn seal_and_remember(path: &Path, memo: &Path, cancel: &AtomicBool) -> Result<Hash> {
    let file = File::open(path).map_err(at("open", path))?;
    let sealed = seal(path, cancel)?.seal();
    memo::remember(memo, &file, &sealed);
    Ok(sealed)
}

/// Compares a disk with the seal of its digest. With `memo`, as [`check`].
///
/// # Errors
/// [`Error::Damaged`] naming the disk, [`Error::Cancelled`], and those of the file system.
pub fn check_seal(path: &Path, expected: &Hash, memo: Option<&Path>, cancel: &AtomicBool) -> Result<()> {
    let file = File::open(path).map_err(at("open", path))?;
    if memo.is_some_and(|memo| memo::recalls(memo, &file, expected)) {
        return Ok(());
    }
    let found = seal(path, cancel)?;
    if found.seal() != *expected {
        return Err(Error::Damaged {
            part: Part::Disk(0..found.length),
            reason: "it differs from what was captured",
        });
    }
    if let Some(memo) = memo {
        memo::remember(memo, &file, expected);
    }
    Ok(())
}

/// Compares a disk with its digest. With `memo`, the name of a small file for that purpose, a disk that was compared
/// since the host booted and did not change since is not read again.
///
/// # Errors
/// [`Error::Damaged`] naming the range, [`Error::Cancelled`], and those of the file system.
pub fn check(path: &Path, digest: &DiskDigest, memo: Option<&Path>, cancel: &AtomicBool) -> Result<()> {
    let file = File::open(path).map_err(at("open", path))?;
    let seal = digest.seal();
    let damaged = |range, reason| Error::Damaged {
        part: Part::Disk(range),
        reason,
    };
    if file.metadata().map_err(at("inspect", path))?.len() != digest.length {
        return Err(damaged(0..digest.length, "the file has another length"));
    }
    if memo.is_some_and(|memo| memo::recalls(memo, &file, &seal)) {
        return Ok(());
    }
    let mut numbers = blocks_with_data(&file).map_err(at("read", path))?;
    numbers.extend(digest.numbers());
    numbers.sort_unstable();
    numbers.dedup();
    each_block(&file, path, digest.length, &numbers, cancel, |number, block| {
        if intact(digest, number, block) {
            return Ok(None::<(u64, Hash)>);
        }
        Err(damaged(
            range_of(number, digest.length),
            "it differs from what was captured",
        ))
    })?;
    if let Some(memo) = memo {
        memo::remember(memo, &file, &seal);
    }
    Ok(())
}

/// Whether a block is the one that the digest names.
pub(crate) fn intact(digest: &DiskDigest, number: u64, block: &[u8]) -> bool {
    match digest.block(number) {
        Some(expected) => blake3::hash(block) == *expected,
        None => parts_with_data(block).is_empty(),
    }
}

/// Reads blocks by all cores; returns what `work` made of them, in order.
fn each_block(
    file: &File,
    path: &Path,
    length: u64,
    numbers: &[u64],
    cancel: &AtomicBool,
    work: impl Fn(u64, &[u8]) -> Result<Option<(u64, Hash)>> + Sync,
) -> Result<Vec<(u64, Hash)>> {
    let start = || Ok((buffer()?, Vec::new()));
    let found = parallel::each(numbers.len(), start, |(buffer, found), at_number| {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        let number = numbers[at_number];
        let range = range_of(number, length);
        let block = &mut buffer[..(range.end - range.start) as usize];
        file.read_exact_at(block, range.start).map_err(at("read", path))?;
        found.extend(work(number, block)?);
        Ok(())
    })?;
    let mut found: Vec<_> = found.into_iter().flat_map(|(_, found)| found).collect();
    found.sort_unstable_by_key(|(number, _)| *number);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_seal_tells_each_bit_and_is_not_compared_twice() {
        let directory = tempfile::tempdir().unwrap();
        let (path, memo) = (directory.path().join("disk"), directory.path().join("memo"));
        let write = |byte: u8| {
            let file = File::create(&path).unwrap();
            file.set_len(3 << 20).unwrap();
            file.write_all_at(&[byte], 100_000).unwrap();
        };
        let never = AtomicBool::new(false);
        write(7);
        let sealed = seal_and_remember(&path, &memo, &never).unwrap();
        // Looked at already: not even a wish to stop matters.
        check_seal(&path, &sealed, Some(&memo), &AtomicBool::new(true)).unwrap();
        assert!(matches!(
            check_seal(&path, &sealed, None, &AtomicBool::new(true)),
            Err(Error::Cancelled)
        ));
        check_seal(&path, &sealed, None, &never).unwrap();
        write(6);
        for memo in [None, Some(memo.as_path())] {
            assert!(matches!(
                check_seal(&path, &sealed, memo, &never),
                Err(Error::Damaged { .. })
            ));
        }
        write(7);
        check_seal(&path, &sealed, Some(&memo), &never).unwrap();
    }

    proptest! {
        #[test]
        fn a_digest_is_read_as_it_was_written(
            blocks in prop::collection::btree_map(0_u64..100, any::<[u8; 32]>(), 0..20),
            flip: prop::sample::Index,
        ) {
            let blocks = blocks.into_iter().map(|(number, digest)| (number, Hash::from_bytes(digest))).collect();
            let digest = DiskDigest { length: 100 << 20, blocks };
            let mut bytes = digest.to_bytes();
            prop_assert_eq!(DiskDigest::parse(&bytes).unwrap(), digest);
            let bit = flip.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(DiskDigest::parse(&bytes).is_err());
        }

        #[test]
        fn sealed_nonsense_is_refused_without_harm(body in prop::collection::vec(any::<u8>(), 1..300)) {
            let parsed = DiskDigest::parse(&sealed::seal(&KIND, &body).0);
            prop_assert!(parsed.is_err() || parsed.unwrap().blocks.len() < 8);
        }
    }
}
