//! The compressions that distributions use for kernels and modules, told apart by their first bytes.

use std::io::{self, Read};

const GZIP: &[u8] = &[0x1f, 0x8b];
const XZ: &[u8] = &[0xfd, b'7', b'z', b'X', b'Z', 0];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
const LZMA: &[u8] = &[0x5d, 0, 0];
const BZIP2: &[u8] = b"BZh";
const LZO: &[u8] = &[0x89, b'L', b'Z', b'O'];
/// The legacy LZ4 format has blocks of this size, but for the last.
const LZ4_BLOCK: usize = 8 * 1024 * 1024;
/// The kernel's own Makefile asks xz for a dictionary of 128 MiB at most.
const LZMA_MEMORY_KIB: u32 = 192 * 1024;

/// Expands `bytes`, whatever they are packed with; what is not packed is returned as it is. Bytes after the end
/// of the packed data are ignored: kernels append their size. More than `limit` bytes of output is an error.
pub(crate) fn decompress(bytes: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    let begins = |magic: &[u8]| bytes.starts_with(magic);
    if begins(GZIP) {
        read_bounded(flate2::read::GzDecoder::new(bytes), limit)
    } else if begins(XZ) {
        read_bounded(lzma_rust2::XzReader::new(bytes, false), limit)
    } else if begins(ZSTD) {
        read_bounded(zstd::stream::read::Decoder::new(bytes)?.single_frame(), limit)
    } else if begins(LZ4_LEGACY) {
        lz4_legacy(&bytes[LZ4_LEGACY.len()..], limit)
    } else if begins(LZMA) {
        read_bounded(
            lzma_rust2::LzmaReader::new_mem_limit(bytes, LZMA_MEMORY_KIB, None)?,
            limit,
        )
    } else if begins(BZIP2) || begins(LZO) {
        Err(invalid(
            "it is packed with bzip2 or LZO, which no distribution uses any more",
        ))
    } else if bytes.len() > limit {
        Err(too_large())
    } else {
        Ok(bytes.to_vec())
    }
}

fn read_bounded(reader: impl Read, limit: usize) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    reader.take(limit as u64 + 1).read_to_end(&mut output)?;
    if output.len() > limit {
        Err(too_large())
    } else {
        Ok(output)
    }
}

fn lz4_legacy(mut bytes: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    let mut block = vec![0; LZ4_BLOCK];
    // Every block but the last is full; what follows the last one is the size that the kernel appends.
    while let Some((length, rest)) = bytes.split_first_chunk::<4>() {
        let length = u32::from_le_bytes(*length) as usize;
        if length == 0 || length > rest.len() {
            break;
        }
        let written = lz4_flex::block::decompress_into(&rest[..length], &mut block)
            .map_err(|error| invalid(&error.to_string()))?;
        if output.len() + written > limit {
            return Err(too_large());
        }
        output.extend_from_slice(&block[..written]);
        bytes = &rest[length..];
        if written < LZ4_BLOCK {
            break;
        }
    }
    if output.is_empty() {
        Err(invalid("truncated LZ4 data"))
    } else {
        Ok(output)
    }
}

fn invalid(message: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.to_owned())
}

fn too_large() -> io::Error {
    invalid("it is larger than any kernel")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn sample() -> Vec<u8> {
        (0..3_000_000_u32)
            .flat_map(|number| (number / 7).to_le_bytes())
            .collect()
    }

    #[test]
    fn each_format_gives_back_what_was_packed_and_ignores_what_follows() {
        let plain = sample();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&plain).unwrap();
        let zstd = zstd::encode_all(plain.as_slice(), 1).unwrap();
        let mut lz4 = LZ4_LEGACY.to_vec();
        for block in plain.chunks(LZ4_BLOCK) {
            let packed = lz4_flex::block::compress(block);
            lz4.extend_from_slice(&(packed.len() as u32).to_le_bytes());
            lz4.extend_from_slice(&packed);
        }
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
        xz.write_all(&plain).unwrap();
        let packed = [
            gzip.finish().unwrap(),
            zstd,
            lz4,
            xz.finish().unwrap(),
            plain.clone(),
        ];
        for (number, mut bytes) in packed.into_iter().enumerate() {
            if number < 4 {
                bytes.extend_from_slice(&(plain.len() as u32).to_le_bytes());
            }
            assert!(
                decompress(&bytes, plain.len()).unwrap() == plain,
                "format {number}"
            );
            assert!(decompress(&bytes, plain.len() - 1).is_err(), "format {number}");
        }
    }

    proptest! {
        #[test]
        fn noise_never_panics(magic in 0_usize..6, noise in proptest::collection::vec(any::<u8>(), 0..400)) {
            let mut bytes = [GZIP, XZ, ZSTD, LZ4_LEGACY, LZMA, BZIP2][magic].to_vec();
            bytes.extend(noise);
            let _ = decompress(&bytes, 1 << 20);
        }
    }
}
