//! The envelope of every small file here: what it is, its version, and a BLAKE3 over all of it.
//!
//! ```text
//!  0  magic     8 bytes
//!  8  version   u32, little endian as all numbers
//! 12  zero      u32
//! 16  length    u64, bytes of the body
//! 24  seal      BLAKE3 of the 24 bytes before it and of the body
//! 56  body
//! ```

use blake3::{Hash, Hasher};

/// What a sealed file is.
pub(crate) struct Kind {
    pub(crate) magic: &'static [u8; 8],
    pub(crate) version: u32,
}

/// Why a sealed file was refused.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Cut short, changed, or something else altogether.
    Damaged(&'static str),
    /// Intact, and of another release.
    Version(u32),
}

const HEADER: usize = 24;
const BODY: usize = HEADER + blake3::OUT_LEN;

/// Puts a body into its envelope; returns the bytes and their seal.
pub(crate) fn seal(kind: &Kind, body: &[u8]) -> (Vec<u8>, Hash) {
    let mut bytes = Vec::with_capacity(BODY + body.len());
    bytes.extend_from_slice(kind.magic);
    bytes.extend_from_slice(&kind.version.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    let seal = hash(&bytes, body);
    bytes.extend_from_slice(seal.as_bytes());
    bytes.extend_from_slice(body);
    (bytes, seal)
}

/// Takes a body out of its envelope, with its seal.
pub(crate) fn open<'a>(kind: &Kind, bytes: &'a [u8]) -> Result<(&'a [u8], Hash), Refusal> {
    let Some((header, rest)) = bytes.split_at_checked(HEADER) else {
        return Err(Refusal::Damaged("it is cut short"));
    };
    let Some((stored, body)) = rest.split_first_chunk::<{ blake3::OUT_LEN }>() else {
        return Err(Refusal::Damaged("it is cut short"));
    };
    let seal = hash(header, body);
    if seal != Hash::from_bytes(*stored) {
        return Err(Refusal::Damaged("its seal does not match"));
    }
    let mut fields = Fields(header);
    if fields.take::<8>() != Some(*kind.magic) {
        return Err(Refusal::Damaged("it is something else"));
    }
    let version = fields.u32().unwrap_or_default();
    if version != kind.version {
        return Err(Refusal::Version(version));
    }
    if fields.u32() != Some(0) || fields.u64() != Some(body.len() as u64) {
        return Err(Refusal::Damaged("its header contradicts it"));
    }
    Ok((body, seal))
}

fn hash(header: &[u8], body: &[u8]) -> Hash {
    let mut hasher = Hasher::new();
    hasher.update(header);
    hasher.update(body);
    hasher.finalize()
}

/// Reads numbers one after the other, never past the end.
pub(crate) struct Fields<'a>(pub(crate) &'a [u8]);

impl Fields<'_> {
    pub(crate) fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    pub(crate) fn hash(&mut self) -> Option<Hash> {
        self.take().map(Hash::from_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KIND: Kind = Kind {
        magic: b"hypeTEST",
        version: 3,
    };

    proptest! {
        #[test]
        fn a_body_comes_out_as_it_went_in_and_no_flipped_bit_passes(body: Vec<u8>, bit: prop::sample::Index) {
            let (mut bytes, seal) = super::seal(&KIND, &body);
            prop_assert_eq!(open(&KIND, &bytes), Ok((&body[..], seal)));
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(open(&KIND, &bytes).is_err());
        }

        #[test]
        fn any_bytes_are_refused_without_harm(bytes: Vec<u8>) {
            prop_assert!(open(&KIND, &bytes).is_err());
        }
    }

    #[test]
    fn another_version_is_told_from_damage() {
        let (bytes, _) = super::seal(&Kind { version: 4, ..KIND }, b"later");
        assert_eq!(open(&KIND, &bytes), Err(Refusal::Version(4)));
    }
}
