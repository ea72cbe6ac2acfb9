//! Compression of one frame.

use zstd::bulk::{Compressor, Decompressor};

use crate::{Error, Result};

/// How to compress, with the levels that the command-line tools know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Codec {
    /// Zstandard, level 1 to 19.
    Zstd(i32),
    /// LZ4, level 0 to 9; from 3 on the high-compression variant.
    Lz4(i32),
}

impl Codec {
    pub(crate) fn check(self) -> Result<()> {
        match self {
            Self::Zstd(1..=19) | Self::Lz4(0..=9) => Ok(()),
            Self::Zstd(level) => Err(Error::Invalid(format!("zstd has levels 1 to 19, not {level}"))),
            Self::Lz4(level) => Err(Error::Invalid(format!("lz4 has levels 0 to 9, not {level}"))),
        }
    }
}

/// How a stored frame is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// As it is, because compression did not make it smaller.
    Plain,
    Zstd,
    Lz4,
}

impl Encoding {
    pub(crate) fn number(self) -> u32 {
        match self {
            Self::Plain => 0,
            Self::Zstd => 1,
            Self::Lz4 => 2,
        }
    }

    pub(crate) fn of(number: u32) -> Option<Self> {
        [Self::Plain, Self::Zstd, Self::Lz4]
            .into_iter()
            .find(|encoding| encoding.number() == number)
    }
}

/// Compresses frames on one thread.
pub(crate) struct Encoder {
    codec: Codec,
    zstd: Option<Compressor<'static>>,
    output: Vec<u8>,
}

impl Encoder {
    /// For frames of at most `largest` bytes.
    pub(crate) fn new(codec: Codec, largest: usize) -> Result<Self> {
        let zstd = match codec {
            Codec::Zstd(level) => Some(Compressor::new(level).map_err(unusable)?),
            Codec::Lz4(_) => None,
        };
        let bound = zstd::zstd_safe::compress_bound(largest)
            .max(lz4::block::compress_bound(largest).map_err(unusable)?);
        Ok(Self {
            codec,
            zstd,
            output: vec![0; bound],
        })
    }

    /// The shortest form of a frame: compressed, or the frame itself.
    pub(crate) fn encode<'a>(&'a mut self, frame: &'a [u8]) -> Result<(Encoding, &'a [u8])> {
        let (encoding, length) = match (&mut self.zstd, self.codec) {
            (Some(zstd), _) => (
                Encoding::Zstd,
                zstd.compress_to_buffer(frame, &mut self.output[..])
                    .map_err(unusable)?,
            ),
            (None, Codec::Lz4(level) | Codec::Zstd(level)) => {
                use lz4::block::CompressionMode::{DEFAULT, HIGHCOMPRESSION};
                let mode = if level < 3 {
                    DEFAULT
                } else {
                    HIGHCOMPRESSION(level)
                };
                let length = lz4::block::compress_to_buffer(frame, Some(mode), false, &mut self.output);
                (Encoding::Lz4, length.map_err(unusable)?)
            }
        };
        match self.output.get(..length) {
            Some(output) if length < frame.len() => Ok((encoding, output)),
            _ => Ok((Encoding::Plain, frame)),
        }
    }
}

fn unusable(error: std::io::Error) -> Error {
    Error::Invalid(format!("the compressor does not work: {error}"))
}

/// Expands frames on one thread.
pub(crate) struct Decoder(Option<Decompressor<'static>>);

impl Decoder {
    pub(crate) fn new() -> Self {
        Self(None)
    }

    /// Expands `stored` so that it fills `frame` exactly; says whether it did. Never writes past `frame`.
    pub(crate) fn decode(&mut self, encoding: Encoding, stored: &[u8], frame: &mut [u8]) -> bool {
        match encoding {
            Encoding::Plain => {
                let fits = stored.len() == frame.len();
                if fits {
                    frame.copy_from_slice(stored);
                }
                fits
            }
            Encoding::Zstd => {
                if self.0.is_none() {
                    self.0 = Decompressor::new().ok();
                }
                let Some(zstd) = &mut self.0 else {
                    return false;
                };
                matches!(zstd.decompress_to_buffer(stored, frame), Ok(length) if length == frame.len())
            }
            Encoding::Lz4 => {
                let Ok(length) = i32::try_from(frame.len()) else {
                    return false;
                };
                let expanded = lz4::block::decompress_to_buffer(stored, Some(length), frame);
                matches!(expanded, Ok(length) if length == frame.len())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn codec() -> impl Strategy<Value = Codec> {
        prop_oneof![(1..=19).prop_map(Codec::Zstd), (0..=9).prop_map(Codec::Lz4)]
    }

    proptest! {
        #[test]
        fn frames_survive(codec in codec(), word: Vec<u8>, repeat in 1_usize..50) {
            let frame = word.repeat(repeat);
            prop_assume!(!frame.is_empty());
            let mut encoder = Encoder::new(codec, frame.len()).unwrap();
            let (encoding, stored) = encoder.encode(&frame).unwrap();
            prop_assert!(stored.len() <= frame.len());
            let mut expanded = vec![1; frame.len()];
            prop_assert!(Decoder::new().decode(encoding, stored, &mut expanded));
            prop_assert_eq!(expanded, frame);
        }

        #[test]
        fn hostile_frames_do_no_harm(stored: Vec<u8>, length in 0_usize..5000, number in 0_u32..3) {
            let mut frame = vec![0; length];
            Decoder::new().decode(Encoding::of(number).unwrap(), &stored, &mut frame);
        }
    }

    #[test]
    fn levels_are_those_of_the_tools() {
        assert!(Codec::Zstd(0).check().is_err() && Codec::Zstd(20).check().is_err());
        assert!(Codec::Lz4(-1).check().is_err() && Codec::Lz4(10).check().is_err());
    }
}
