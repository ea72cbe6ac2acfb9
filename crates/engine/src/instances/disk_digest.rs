//! The digest of a sparse disk: what it holds, whatever of it the file system stores as holes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{SeekFrom, seek};

use crate::EngineError;

/// Unit in which zeros are left out.
const BLOCK: usize = 64 << 10;

/// BLAKE3, hex, of the length and of each block that is not zero, with its place.
pub(crate) fn digest(path: &Path) -> io::Result<String> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&length.to_le_bytes());
    let mut block = vec![0; BLOCK];
    let mut position = 0;
    while position < length {
        // Holes are skipped; whether some zeros are a hole or data makes no difference to the digest.
        let data = match seek(&file, SeekFrom::Data(position)) {
            Ok(data) => data / BLOCK as u64 * BLOCK as u64,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let start = data.max(position);
        let end = seek(&file, SeekFrom::Hole(data.max(start)))?.max(start + 1);
        position = start;
        while position < end {
            let left = usize::try_from(length - position).unwrap_or(BLOCK).min(BLOCK);
            let part = &mut block[..left];
            file.read_exact_at(part, position)?;
            if part.iter().any(|byte| *byte != 0) {
                hasher.update(&position.to_le_bytes());
                hasher.update(part);
            }
            position += left as u64;
        }
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// Refuses a disk that is not what was captured.
pub(crate) fn check(path: &Path, expected: &str) -> Result<(), EngineError> {
    let found = digest(path).map_err(|error| EngineError::io("read the captured disk", error))?;
    if found == expected {
        Ok(())
    } else {
        Err(EngineError::damaged("the captured disk"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_count_the_same_as_holes_and_each_bit_counts() {
        let directory = tempfile::tempdir().unwrap();
        let make = |name: &str, dense: bool, byte: u8| {
            let path = directory.path().join(name);
            let file = File::create(&path).unwrap();
            file.set_len(3 << 20).unwrap();
            if dense {
                file.write_all_at(&vec![0; 1 << 20], 1 << 20).unwrap();
            }
            file.write_all_at(&[byte], 100_000).unwrap();
            file.write_all_at(b"end", (3 << 20) - 3).unwrap();
            digest(&path).unwrap()
        };
        let sparse = make("sparse", false, 7);
        assert_eq!(sparse, make("dense", true, 7));
        assert_ne!(sparse, make("flipped", false, 6));
    }
}
