//! Where in the guest's stream a log ends, exactly, whenever the server was killed.
//!
//! ```text
//!   record:  token, file, length then, offset then        written before the bytes that it speaks of
//!   file:    ──────────┬──────────────┬ length now
//!                length then          └─► offset now = offset then + (length now - length then)
//! ```
//!
//! It holds for all that is appended from then on, so it is written anew only where it foretells something else:
//! for another connection, another file, or after somebody changed the file's length.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use hypeman_guest_api::workload_log::{Position, TOKEN, Token};

use crate::files::beside;

const MARK: [u8; 16] = *b"hypeman-logpos1\n";
const BYTES: usize = 64;

/// A file, whatever its name becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(super) fn of(metadata: &Metadata) -> FileId {
        FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) token: Token,
    pub(super) file: FileId,
    pub(super) length: u64,
    pub(super) offset: u64,
}

impl Record {
    /// What is written when the file has this length.
    pub(super) fn position(&self, length: u64) -> Position {
        let more = length.saturating_sub(self.length);
        Position {
            token: self.token,
            offset: self.offset.saturating_add(more),
        }
    }

    /// Whether it is true for this instant too.
    pub(super) fn foretells(&self, now: &Record) -> bool {
        self.file == now.file
            && self.length <= now.length
            && self.position(now.length) == now.position(now.length)
    }

    fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let numbers = [self.file.device, self.file.inode, self.length, self.offset];
        bytes[..MARK.len()].copy_from_slice(&MARK);
        bytes[MARK.len()..][..TOKEN].copy_from_slice(&self.token);
        for (place, number) in bytes[MARK.len() + TOKEN..].chunks_exact_mut(8).zip(numbers) {
            place.copy_from_slice(&number.to_be_bytes());
        }
        bytes
    }

    fn decode(bytes: &[u8; BYTES]) -> Option<Record> {
        let rest = bytes.strip_prefix(&MARK)?;
        let (token, rest) = rest.split_first_chunk()?;
        let number = |index: usize| {
            let (bytes, _) = rest.get(index * 8..)?.split_first_chunk()?;
            Some(u64::from_be_bytes(*bytes))
        };
        Some(Record {
            token: *token,
            file: FileId {
                device: number(0)?,
                inode: number(1)?,
            },
            length: number(2)?,
            offset: number(3)?,
        })
    }
}

/// The file that holds a record.
#[derive(Debug)]
pub(super) struct RecordFile(File);

impl RecordFile {
    /// Opens the one that belongs to a log, or makes it.
    pub(super) fn open(log: &Path) -> io::Result<RecordFile> {
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(beside(log, ".position"))?;
        Ok(RecordFile(file))
    }

    /// `None` where none was written.
    pub(super) fn read(&self) -> io::Result<Option<Record>> {
        let mut bytes = [0; BYTES];
        match self.0.read_exact_at(&mut bytes, 0) {
            Ok(()) => Ok(Record::decode(&bytes)),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// One call within one page: whoever kills us finds the old record or the new one.
    pub(super) fn write(&self, record: &Record) -> io::Result<()> {
        self.0.write_all_at(&record.encode(), 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn record() -> impl Strategy<Value = Record> {
        (
            any::<Token>(),
            any::<u64>(),
            any::<u64>(),
            any::<u64>(),
            any::<u64>(),
        )
            .prop_map(|(token, device, inode, length, offset)| Record {
                token,
                file: FileId { device, inode },
                length,
                offset,
            })
    }

    proptest! {
        #[test]
        fn a_record_comes_back_as_it_was(record in record(), broken in 0..MARK.len()) {
            let mut bytes = record.encode();
            prop_assert_eq!(Record::decode(&bytes), Some(record));
            bytes[broken] ^= 1;
            prop_assert_eq!(Record::decode(&bytes), None);
        }

        #[test]
        fn a_record_holds_for_all_that_is_appended_and_for_nothing_else(
            record in record(),
            more in any::<u32>(),
            odd in 1..u64::MAX,
        ) {
            let length = record.length.saturating_add(more.into());
            let now = Record { length, offset: record.position(length).offset, ..record };
            prop_assert!(record.foretells(&now));
            let elsewhere = Record { offset: now.offset.wrapping_add(odd), ..now };
            let other_token = Record { token: now.token.map(|byte| !byte), ..now };
            let other_file = Record { file: FileId { inode: now.file.inode ^ odd, ..now.file }, ..now };
            for other in [elsewhere, other_token, other_file] {
                prop_assert!(!record.foretells(&other));
            }
            // Somebody emptied the file: what is there now says nothing about the stream.
            prop_assert_eq!(record.position(0).offset, record.offset);
        }
    }

    #[test]
    fn a_file_without_a_record_is_no_error() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("app.log");
        assert_eq!(RecordFile::open(&log).unwrap().read().unwrap(), None);
        std::fs::write(beside(&log, ".position"), [0; BYTES]).unwrap();
        assert_eq!(RecordFile::open(&log).unwrap().read().unwrap(), None);
    }
}
