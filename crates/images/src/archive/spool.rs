//! Compressed or unseekable archives, made into a plain file without a name.

use std::fs::File;
use std::io::{self, BufReader, Cursor, Read, Write as _};
use std::os::unix::fs::FileExt as _;

use super::{ArchiveOptions, WHAT};
use crate::error::{ImageError, Result};

/// How an archive is compressed as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    Gzip,
    Zstd,
}

/// Largest zstd window as a power of two: 64 MiB, so that an archive cannot ask for gigabytes of memory.
const MAX_WINDOW_LOG: u32 = 26;

/// Tells the compression by the first bytes; `None` for a plain tar or anything else.
pub(super) fn sniff(first: &[u8]) -> Option<Compression> {
    match first {
        [0x1f, 0x8b, ..] => Some(Compression::Gzip),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
        _ => None,
    }
}

pub(super) fn compression_of(file: &File) -> io::Result<Option<Compression>> {
    let mut first = [0; 4];
    let count = file.read_at(&mut first, 0)?;
    Ok(sniff(&first[..count]))
}

/// Copies a stream, uncompressed, into a file without a name. The file vanishes with its last handle.
pub(super) fn spool(mut stream: Box<dyn Read + Send>, options: &ArchiveOptions) -> Result<File> {
    let reading = |error| ImageError::io("read an archive", error);
    let mut first = Vec::new();
    stream.by_ref().take(4).read_to_end(&mut first).map_err(reading)?;
    let compression = sniff(&first);
    let whole = BufReader::with_capacity(256 << 10, Cursor::new(first).chain(stream));
    let mut plain: Box<dyn Read> = match compression {
        None => Box::new(whole),
        Some(Compression::Gzip) => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        Some(Compression::Zstd) => {
            let mut decoder = zstd::Decoder::with_buffer(whole).map_err(reading)?;
            decoder.window_log_max(MAX_WINDOW_LOG).map_err(reading)?;
            Box::new(decoder)
        }
    };
    let mut file = tempfile::tempfile_in(&options.spool_dir)
        .map_err(|error| ImageError::io("create a temporary file", error))?;
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let count = match plain.read(&mut buffer) {
            Ok(0) => return Ok(file),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if compression.is_some() => {
                return Err(ImageError::document(
                    WHAT,
                    format!("it cannot be decompressed: {error}"),
                ));
            }
            Err(error) => return Err(reading(error)),
        };
        total += count as u64;
        if total > options.max_spooled_bytes {
            return Err(ImageError::TooLarge {
                what: WHAT.to_owned(),
                limit: options.max_spooled_bytes,
            });
        }
        file.write_all(&buffer[..count])
            .map_err(|error| ImageError::io("spool an archive", error))?;
    }
}
