//! The frame table of a memory image: where the content of each of its chunks lies in compressed form.
//!
//! ```text
//! body   image         16 bytes
//!        index seal    32 bytes: the index that the frames are for; zero when only other images use them
//!        donors        u32
//!        zero          u32
//!        frames        u64
//!        donors        16 bytes each: images in whose `frames.dat` frames lie, this one among them
//!        frames        one for each entry of the index with pages that are not zero, in the same order:
//!            donor     u32, number of the donor
//!            encoding  u32
//!            stored    u32, bytes in the file
//!            content   u32, bytes when expanded
//!            offset    u64, where it begins in the file
//!            digest    BLAKE3 of the content: the same as in the index
//! ```

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use blake3::Hash;

use crate::codec::{Decoder, Encoding};
use crate::error::Part;
use crate::layout::{CHUNK_BYTES, PAGE_BYTES};
use crate::sealed::{self, Fields, Kind, Refusal};
use crate::{Error, MemoryId, Result};

const KIND: Kind = Kind {
    magic: b"hypemFRM",
    version: 1,
};
const HEADER: usize = 16 + 32 + 4 + 4 + 8;
const FRAME: usize = 4 * 4 + 8 + 32;

/// Where one frame lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Number in the table's list of donors.
    pub(crate) donor: u32,
    pub(crate) encoding: Encoding,
    pub(crate) stored: u32,
    pub(crate) content: u32,
    pub(crate) offset: u64,
    pub(crate) digest: Hash,
}

/// The frames of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FrameTable {
    pub(crate) image: MemoryId,
    /// `None` when the image itself is gone and only its frames are still needed.
    pub(crate) index_seal: Option<Hash>,
    pub(crate) donors: Vec<MemoryId>,
    pub(crate) frames: Vec<Frame>,
}

impl FrameTable {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(HEADER + self.donors.len() * 16 + self.frames.len() * FRAME);
        body.extend_from_slice(&self.image.0);
        body.extend_from_slice(self.index_seal.unwrap_or(Hash::from_bytes([0; 32])).as_bytes());
        body.extend_from_slice(&u32::try_from(self.donors.len()).unwrap_or(u32::MAX).to_le_bytes());
        body.extend_from_slice(&[0; 4]);
        body.extend_from_slice(&(self.frames.len() as u64).to_le_bytes());
        self.donors
            .iter()
            .for_each(|donor| body.extend_from_slice(&donor.0));
        for frame in &self.frames {
            for number in [frame.donor, frame.encoding.number(), frame.stored, frame.content] {
                body.extend_from_slice(&number.to_le_bytes());
            }
            body.extend_from_slice(&frame.offset.to_le_bytes());
            body.extend_from_slice(frame.digest.as_bytes());
        }
        sealed::seal(&KIND, &body).0
    }

    /// Reads the table of the image `id`, checking every property that the rest relies on.
    pub(crate) fn parse(id: MemoryId, bytes: &[u8]) -> Result<Self> {
        let damaged = |reason| Error::Damaged {
            part: Part::FrameTable(id),
            reason,
        };
        let (body, _) = sealed::open(&KIND, bytes).map_err(|refusal| match refusal {
            Refusal::Damaged(reason) => damaged(reason),
            Refusal::Version(found) => Error::Version {
                part: Part::FrameTable(id),
                found,
                known: KIND.version,
            },
        })?;
        let table = Self::decode(body).ok_or_else(|| damaged("its fields contradict each other"))?;
        if table.image != id {
            return Err(damaged("it belongs to another image"));
        }
        Ok(table)
    }

    fn decode(body: &[u8]) -> Option<Self> {
        let mut fields = Fields(body);
        let image = MemoryId(fields.take()?);
        let seal = fields.hash()?;
        let index_seal = (*seal.as_bytes() != [0; 32]).then_some(seal);
        let (donor_count, zero, frame_count) = (fields.u32()?, fields.u32()?, fields.u64()?);
        let expected = u64::from(donor_count) * 16;
        let expected = expected.checked_add(frame_count.checked_mul(FRAME as u64)?)?;
        if zero != 0 || fields.0.len() as u64 != expected {
            return None;
        }
        let donors: Vec<_> = (0..donor_count)
            .map_while(|_| fields.take().map(MemoryId))
            .collect();
        let mut frames = Vec::with_capacity(usize::try_from(frame_count).ok()?);
        for _ in 0..frame_count {
            let (donor, encoding) = (fields.u32()?, Encoding::of(fields.u32()?)?);
            let (stored, content, offset) = (fields.u32()?, fields.u32()?, fields.u64()?);
            let frame = Frame {
                donor,
                encoding,
                stored,
                content,
                offset,
                digest: fields.hash()?,
            };
            let plausible = donor < donor_count
                && (1..=CHUNK_BYTES).contains(&(content as usize))
                && (content as usize).is_multiple_of(PAGE_BYTES)
                && (1..=content).contains(&stored)
                && (encoding != Encoding::Plain || stored == content)
                && offset.checked_add(u64::from(stored)).is_some();
            if !plausible {
                return None;
            }
            frames.push(frame);
        }
        Some(Self {
            image,
            index_seal,
            donors,
            frames,
        })
    }
}

/// Reads a frame from the file of its donor and expands it into `content`. `false` when the bytes are not those
/// that were stored.
pub(crate) fn read(
    file: &File,
    frame: &Frame,
    stored: &mut Vec<u8>,
    content: &mut [u8],
    decoder: &mut Decoder,
) -> io::Result<bool> {
    stored.resize(frame.stored as usize, 0);
    match file.read_exact_at(stored, frame.offset) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
        Err(error) => return Err(error),
    }
    Ok(decoder.decode(frame.encoding, stored, content) && blake3::hash(content) == frame.digest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table() -> impl Strategy<Value = FrameTable> {
        let frame = (
            0_u32..3,
            0_u32..3,
            1_u32..=64,
            1_u32..4096,
            0_u64..1 << 40,
            any::<[u8; 32]>(),
        );
        let frame = frame.prop_map(|(donor, encoding, pages, stored, offset, digest)| {
            let encoding = Encoding::of(encoding).unwrap();
            let content = pages * 4096;
            let stored = if encoding == Encoding::Plain {
                content
            } else {
                stored
            };
            Frame {
                donor,
                encoding,
                stored,
                content,
                offset,
                digest: Hash::from_bytes(digest),
            }
        });
        (any::<bool>(), prop::collection::vec(frame, 0..20)).prop_map(|(own, frames)| FrameTable {
            image: MemoryId([9; 16]),
            index_seal: own.then_some(Hash::from_bytes([7; 32])),
            donors: vec![MemoryId([1; 16]), MemoryId([9; 16]), MemoryId([3; 16])],
            frames,
        })
    }

    proptest! {
        #[test]
        fn a_table_is_read_as_it_was_written(table in table()) {
            prop_assert_eq!(FrameTable::parse(table.image, &table.to_bytes()).unwrap(), table);
        }

        #[test]
        fn a_well_sealed_lie_is_refused_or_means_what_it_says(table in table(), at: prop::sample::Index, value: u8) {
            let mut body = table.to_bytes()[56..].to_vec();
            let at = at.index(body.len());
            body[at] = value;
            if let Ok(table) = FrameTable::parse(table.image, &sealed::seal(&KIND, &body).0) {
                for frame in &table.frames {
                    prop_assert!((frame.donor as usize) < table.donors.len());
                    prop_assert!(frame.content as usize <= CHUNK_BYTES && frame.stored <= frame.content);
                }
            }
        }
    }
}
