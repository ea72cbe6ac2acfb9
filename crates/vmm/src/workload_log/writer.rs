//! The file behind a workload's log, and what of the guest's stream is in it.
//!
//! Invariants:
//! - Only the newest connection writes; what an older one still had on its way to the file is refused.
//! - Every append is preceded by a record that says what it is, see [`super::record`].
//! - A new file gets its name only after the first byte could go there: a reader that sees the name knows that the
//!   old file is complete.

use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use hypeman_guest_api::workload_log::{self, Hello, Position, START, Token};
use rustix::rand::{GetRandomFlags, getrandom};

use super::record::{FileId, Record, RecordFile};
use crate::VmmError;
use crate::files::{append_only, beside, io_error, make_directory_of};

/// What became of bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Appended {
    /// So many are in the file, which is now at this offset of the stream.
    Written { count: usize, offset: u64 },
    /// None: their connection counts no more.
    Superseded,
}

/// The connection that counts.
#[derive(Debug)]
struct Turn {
    number: u64,
    /// Where the next of its bytes belongs.
    position: Position,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Writer {
    path: PathBuf,
    log: File,
    records: RecordFile,
    record: Option<Record>,
    written: Option<Position>,
    turn: Option<Turn>,
    turns: u64,
    closed: bool,
}

impl Writer {
    /// Goes on where another process has stopped, or begins.
    pub(super) fn open(path: &Path) -> Result<Writer, VmmError> {
        let unusable = |error| io_error("cannot use the record of", path)(error);
        make_directory_of(path)?;
        let records = RecordFile::open(path).map_err(unusable)?;
        let record = records.read().map_err(unusable)?;
        let found = match &record {
            Some(record) => find(path, record.file).map_err(unusable)?,
            None => None,
        };
        let written = record.map(|record| match &found {
            Some((_, length)) => record.position(*length),
            // Its file is gone, and with it what may have been appended since.
            None => record.position(record.length),
        });
        // A server ended just before the new file got its name.
        let fresh = beside(path, ".new");
        if found.is_some_and(|(name, _)| name == fresh) && !path.exists() {
            fs::rename(&fresh, path).map_err(io_error("cannot rename", &fresh))?;
        }
        Ok(Writer {
            path: path.to_owned(),
            log: append_only(path)?,
            records,
            record,
            written,
            turn: None,
            turns: 0,
            closed: false,
        })
    }

    /// Makes a connection the one that counts: its number, and the answer to its guest.
    pub(super) fn begin(&mut self, hello: &Hello) -> io::Result<(u64, [u8; START])> {
        if self.closed {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let token = fresh_token()?;
        let offset = workload_log::resume(self.written, hello);
        self.turns += 1;
        self.turn = Some(Turn {
            number: self.turns,
            position: Position { token, offset },
        });
        Ok((self.turns, workload_log::start(token, offset)))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Nothing is written from here on: the file is another's.
    pub(super) fn close(&mut self) {
        self.closed = true;
        self.turn = None;
    }

    /// Appends what came by a connection, as much as the host takes.
    pub(super) fn append(&mut self, turn: u64, bytes: &[u8]) -> io::Result<Appended> {
        let position = match &self.turn {
            Some(current) if current.number == turn => current.position,
            _ => return Ok(Appended::Superseded),
        };
        // No guest prints so much: it has lied about where its stream is.
        if position.offset.checked_add(bytes.len() as u64).is_none() {
            self.turn = None;
            return Ok(Appended::Superseded);
        }
        self.announce(&self.log.metadata()?, position)?;
        let count = loop {
            match self.log.write(bytes) {
                Ok(0) if !bytes.is_empty() => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        let offset = position.offset + count as u64;
        let position = Position { offset, ..position };
        self.turn = Some(Turn {
            number: turn,
            position,
        });
        self.written = Some(position);
        Ok(Appended::Written { count, offset })
    }

    /// Continues in a fresh file, after the caller renamed the old one.
    pub(super) fn reopen(&mut self) -> Result<(), VmmError> {
        if self.closed {
            return Err(VmmError::Gone);
        }
        let fresh = beside(&self.path, ".new");
        let log = append_only(&fresh)?;
        if let Some(written) = self.written {
            log.metadata()
                .and_then(|metadata| self.announce(&metadata, written))
                .map_err(io_error("cannot write the record of", &self.path))?;
        }
        self.log = log;
        fs::rename(&fresh, &self.path).map_err(io_error("cannot rename", &fresh))
    }

    /// Records that what is appended to a file now is of this position.
    fn announce(&mut self, log: &Metadata, position: Position) -> io::Result<()> {
        let now = Record {
            token: position.token,
            file: FileId::of(log),
            length: log.len(),
            offset: position.offset,
        };
        if self.record.is_some_and(|record| record.foretells(&now)) {
            return Ok(());
        }
        // Should only a part be written, the next attempt must not believe that there is a record.
        self.record = None;
        self.records.write(&now)?;
        self.record = Some(now);
        Ok(())
    }
}

/// The name and length of a file that was a log's, among its successors.
fn find(log: &Path, file: FileId) -> io::Result<Option<(PathBuf, u64)>> {
    let (Some(directory), Some(name)) = (log.parent(), log.file_name()) else {
        return Ok(None);
    };
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let other = entry.file_name();
        if !other.as_encoded_bytes().starts_with(name.as_encoded_bytes()) {
            continue;
        }
        match entry.metadata() {
            Ok(metadata) if FileId::of(&metadata) == file => return Ok(Some((entry.path(), metadata.len()))),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Never zeros, which say that there is none.
fn fresh_token() -> io::Result<Token> {
    let mut token = Token::default();
    while token == Token::default() {
        // So few bytes come at once or not at all.
        getrandom(&mut token, GetRandomFlags::empty())?;
    }
    Ok(token)
}
