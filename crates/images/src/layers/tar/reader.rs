//! From a stream of bytes to entries and pieces of their content.

use std::collections::VecDeque;
use std::io::BufRead;

use hypeman_erofs::Xattr;

use super::super::error::EntryProblem;
use super::super::limits::Limits;
use super::entry::{Entry, Kind, Piece, TarError};
use super::header::{BLOCK, Header};
use super::pax::Pax;
use super::sparse::{self, Part};

mod maps;

/// Reads one archive.
pub(crate) struct TarReader<'l, R> {
    input: R,
    limits: &'l Limits,
    globals: Pax,
    /// Name of the entry being read, for errors.
    name: Vec<u8>,
    /// Stored bytes of the current entry that were not read yet.
    stored: u64,
    /// Zero to 511 bytes after them.
    padding: u64,
    /// Parts of the current entry that were not read to their end.
    parts: VecDeque<Part>,
    /// Offset in the current file.
    position: u64,
    size: u64,
    /// Bytes handed out but not consumed.
    lent: usize,
}

/// What precedes an entry.
#[derive(Default)]
struct Preface {
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<'l, R: BufRead> TarReader<'l, R> {
    pub(crate) fn new(input: R, limits: &'l Limits) -> Self {
        Self {
            input,
            limits,
            globals: Pax::default(),
            name: Vec::new(),
            stored: 0,
            padding: 0,
            parts: VecDeque::new(),
            position: 0,
            size: 0,
            lent: 0,
        }
    }

    /// The stream below, to ask it why it failed.
    pub(crate) fn input_mut(&mut self) -> &mut R {
        &mut self.input
    }

    /// The stream below.
    pub(crate) fn into_input(self) -> R {
        self.input
    }

    /// Moves to the next entry; what was not read of the one before is skipped.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_rest()?;
        let mut preface = Preface::default();
        let mut block = [0; BLOCK];
        loop {
            if !self.read_header(&mut block, preface.is_empty())? {
                return if preface.is_empty() {
                    Ok(None)
                } else {
                    Err(TarError::Truncated)
                };
            }
            let header = Header::parse(&block).map_err(|problem| self.problem(problem))?;
            self.name = header.name();
            let kind = header.kind();
            if !matches!(kind, b'L' | b'K' | b'x' | b'X' | b'g') {
                return self.entry(&block, preface).map(Some);
            }
            let length = header.size().map_err(|problem| self.problem(problem))?;
            let bytes = self.read_extension(length)?;
            let result = match kind {
                b'L' => once(&mut preface.long_name, until_nul(bytes)),
                b'K' => once(&mut preface.long_link, until_nul(bytes)),
                b'g' => self.global(&bytes),
                _ => {
                    let mut pax = self.globals.clone();
                    pax.parse(&bytes, self.limits)
                        .and_then(|()| once(&mut preface.pax, pax))
                }
            };
            result.map_err(|problem| self.problem(problem))?;
        }
    }

    /// The next piece of the current file's content.
    pub(crate) fn piece(&mut self) -> Result<Option<Piece<'_>>, TarError> {
        self.input.consume(std::mem::take(&mut self.lent));
        while self.parts.front().is_some_and(|part| part.length == 0) {
            self.parts.pop_front();
        }
        let Some(part) = self.parts.front_mut() else {
            let hole = self.size - self.position;
            self.position = self.size;
            return Ok((hole > 0).then_some(Piece::Hole(hole)));
        };
        if part.offset > self.position {
            let hole = part.offset - self.position;
            self.position = part.offset;
            return Ok(Some(Piece::Hole(hole)));
        }
        let available = self.input.fill_buf()?;
        if available.is_empty() {
            return Err(TarError::Entry {
                name: self.name.clone(),
                problem: EntryProblem::Truncated,
            });
        }
        let taken = available
            .len()
            .min(usize::try_from(part.length).unwrap_or(usize::MAX));
        part.offset += taken as u64;
        part.length -= taken as u64;
        self.position += taken as u64;
        self.stored -= taken as u64;
        self.lent = taken;
        Ok(Some(Piece::Data(&available[..taken])))
    }

    fn problem(&self, problem: EntryProblem) -> TarError {
        TarError::Entry {
            name: self.name.clone(),
            problem,
        }
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        self.input.consume(std::mem::take(&mut self.lent));
        let mut left = self.stored + self.padding;
        self.stored = 0;
        self.padding = 0;
        self.parts.clear();
        while left > 0 {
            let available = self.input.fill_buf()?.len() as u64;
            if available == 0 {
                return Err(self.problem(EntryProblem::Truncated));
            }
            let step = available.min(left);
            self.input.consume(step as usize);
            left -= step;
        }
        Ok(())
    }

    /// Fills the buffer, or tells how many bytes there were before the stream ended.
    fn read_block(&mut self, block: &mut [u8]) -> Result<usize, TarError> {
        let mut filled = 0;
        while filled < block.len() {
            let available = self.input.fill_buf()?;
            if available.is_empty() {
                break;
            }
            let step = available.len().min(block.len() - filled);
            block[filled..filled + step].copy_from_slice(&available[..step]);
            self.input.consume(step);
            filled += step;
        }
        Ok(filled)
    }

    /// Reads a header block; false at the end of the archive. Some archivers leave the end marker out.
    fn read_header(&mut self, block: &mut [u8; BLOCK], between_entries: bool) -> Result<bool, TarError> {
        match self.read_block(block)? {
            0 => return Ok(false),
            BLOCK => {}
            _ => return Err(TarError::Truncated),
        }
        if block.iter().any(|byte| *byte != 0) {
            return Ok(true);
        }
        if !between_entries {
            return Err(TarError::Truncated);
        }
        loop {
            let available = self.input.fill_buf()?;
            if available.is_empty() {
                return Ok(false);
            }
            if available.iter().any(|byte| *byte != 0) {
                return Err(TarError::TrailingData);
            }
            let length = available.len();
            self.input.consume(length);
        }
    }

    /// Reads the data of an extended header or long name.
    fn read_extension(&mut self, length: u64) -> Result<Vec<u8>, TarError> {
        let limit = self.limits.header_bytes;
        let length = usize::try_from(length).ok().filter(|length| *length <= limit);
        let length = length.ok_or_else(|| self.problem(EntryProblem::ExtendedHeader("it is too long")))?;
        let mut bytes = vec![0; length.next_multiple_of(BLOCK)];
        if self.read_block(&mut bytes)? < bytes.len() {
            return Err(self.problem(EntryProblem::Truncated));
        }
        bytes.truncate(length);
        Ok(bytes)
    }

    fn global(&mut self, bytes: &[u8]) -> Result<(), EntryProblem> {
        self.globals.parse(bytes, self.limits)?;
        if self.globals.has_structure() {
            // Readers disagree about whether these apply; no honest archiver writes them.
            return Err(EntryProblem::ExtendedHeader(
                "a global header names a path, size or sparse map",
            ));
        }
        Ok(())
    }

    /// Makes an entry of its own header and what preceded it, and stops before its data.
    fn entry(&mut self, block: &[u8; BLOCK], preface: Preface) -> Result<Entry, TarError> {
        let header = Header::parse(block).map_err(|problem| self.problem(problem))?;
        let pax = preface.pax.unwrap_or_else(|| self.globals.clone());
        let (pax_name, pax_link) = (pax.path.clone(), pax.link_path.clone());
        let sparse_name = pax.sparse.as_ref().and_then(|sparse| sparse.name.clone());
        let name = match agree(preface.long_name, pax_name) {
            Ok(name) => sparse_name.or(name).unwrap_or_else(|| header.name()),
            Err(problem) => return Err(self.problem(problem)),
        };
        self.name.clone_from(&name);
        self.described(&header, name, pax, preface.long_link, pax_link)
            .map_err(|error| match error {
                TarError::Entry { problem, .. } => self.problem(problem),
                other => other,
            })
    }

    fn described(
        &mut self,
        header: &Header<'_>,
        mut name: Vec<u8>,
        mut pax: Pax,
        long_link: Option<Vec<u8>>,
        pax_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let fault = |problem| TarError::Entry {
            name: Vec::new(),
            problem,
        };
        let device = |kind: fn(u64, u64) -> Kind| header.device().map(|(major, minor)| kind(major, minor));
        let kind = match header.kind() {
            // The first format knew directories by the end of their names.
            0 if name.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => device(|major, minor| Kind::CharacterDevice { major, minor }).map_err(fault)?,
            b'4' => device(|major, minor| Kind::BlockDevice { major, minor }).map_err(fault)?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(fault(EntryProblem::Type(char::from(other)))),
        };
        if name.contains(&0) {
            return Err(fault(EntryProblem::Nul));
        }
        if kind != Kind::File {
            while name.len() > 1 && name.ends_with(b"/") {
                name.pop();
            }
        }
        let link = agree(long_link, pax_link)
            .map_err(fault)?
            .unwrap_or_else(|| header.link_name().to_vec());
        let (mtime, mtime_nanoseconds) = match pax.mtime {
            Some(time) => time,
            None => (header.mtime().map_err(fault)?, 0),
        };
        // Only files have data; others may carry a size that means nothing.
        self.stored = match (kind, pax.size) {
            (Kind::File, Some(size)) => size,
            (Kind::File, None) => header.size().map_err(fault)?,
            _ => 0,
        };
        self.padding = self.stored.next_multiple_of(BLOCK as u64) - self.stored;
        self.position = 0;
        self.size = self.stored;
        self.parts = VecDeque::from([Part {
            offset: 0,
            length: self.stored,
        }]);
        let sparse = kind == Kind::File && (header.kind() == b'S' || pax.sparse.is_some());
        if sparse {
            let real_size = match (header.kind(), pax.sparse.take()) {
                (b'S', _) => self.old_sparse_map(header)?,
                (_, Some(sparse)) => self.pax_sparse_map(sparse)?,
                _ => self.stored,
            };
            self.parts.make_contiguous();
            sparse::check(self.parts.as_slices().0, real_size, self.stored).map_err(fault)?;
            self.size = real_size;
        }
        if self.size > self.limits.entry_bytes || self.stored > self.limits.entry_bytes {
            return Err(fault(EntryProblem::TooLarge(self.limits.entry_bytes)));
        }
        let or_header = |value: Option<u32>, header: Result<u32, EntryProblem>| match value {
            Some(value) => Ok(value),
            None => header.map_err(fault),
        };
        Ok(Entry {
            name,
            kind,
            link,
            mode: header.mode().map_err(fault)?,
            uid: or_header(pax.uid, header.uid())?,
            gid: or_header(pax.gid, header.gid())?,
            mtime,
            mtime_nanoseconds,
            size: self.size,
            sparse,
            xattrs: pax
                .xattrs
                .into_iter()
                .map(|(name, value)| Xattr {
                    name: name.into(),
                    value: value.into(),
                })
                .collect(),
        })
    }
}

impl Preface {
    fn is_empty(&self) -> bool {
        self.pax.is_none() && self.long_name.is_none() && self.long_link.is_none()
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

fn once<T>(place: &mut Option<T>, value: T) -> Result<(), EntryProblem> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(EntryProblem::ExtendedHeader("there are two for one entry")),
    }
}

/// A name that GNU's and PAX's extensions both give must be the same in both.
fn agree(gnu: Option<Vec<u8>>, pax: Option<Vec<u8>>) -> Result<Option<Vec<u8>>, EntryProblem> {
    match (gnu, pax) {
        (Some(gnu), Some(pax)) if gnu != pax => {
            Err(EntryProblem::ExtendedHeader("two names for one entry differ"))
        }
        (gnu, pax) => Ok(gnu.or(pax)),
    }
}
