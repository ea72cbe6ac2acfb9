//! Maps of sparse files: which parts of a file the stored bytes are.
//!
//! GNU's first format has them in the header and in blocks behind it, PAX formats 0.0 and 0.1 in the extended header,
//! 1.0 as text at the start of the data. All of them end as the parts of the entry being read, which are bounded in
//! number here and checked against the sizes by the reader.

use std::io::BufRead;
use std::ops::Range;

use super::TarReader;
use crate::layers::error::EntryProblem;
use crate::layers::tar::TarError;
use crate::layers::tar::header::{BLOCK, Header, size};
use crate::layers::tar::pax::{PaxSparse, decimal};
use crate::layers::tar::sparse::Part;

/// The block of a 1.0 map that is being read.
struct MapText {
    block: [u8; BLOCK],
    at: usize,
}

impl<R: BufRead> TarReader<'_, R> {
    /// GNU's first format: four parts in the header, more in blocks between it and the data.
    pub(super) fn old_sparse_map(&mut self, header: &Header<'_>) -> Result<u64, TarError> {
        let (table, mut more, real_size) = header.old_sparse();
        self.parts.clear();
        self.old_sparse_parts(table)?;
        while more {
            let mut block = [0; BLOCK];
            if self.read_block(&mut block)? < BLOCK {
                return Err(self.problem(EntryProblem::Truncated));
            }
            self.old_sparse_parts(&block[..504])?;
            more = block[504] != 0;
        }
        real_size.map_err(|problem| self.problem(problem))
    }

    fn old_sparse_parts(&mut self, table: &[u8]) -> Result<(), TarError> {
        for entry in table.chunks_exact(24) {
            if entry[0] == 0 {
                break;
            }
            let field = |range: Range<usize>| {
                size(&entry[range], "sparse map").map_err(|problem| self.problem(problem))
            };
            let part = Part {
                offset: field(0..12)?,
                length: field(12..24)?,
            };
            self.push_part(part)?;
        }
        Ok(())
    }

    pub(super) fn pax_sparse_map(&mut self, sparse: PaxSparse) -> Result<u64, TarError> {
        let fault = |text| EntryProblem::SparseMap(text);
        let real_size = sparse
            .real_size
            .ok_or_else(|| self.problem(fault("the full size is missing")))?;
        match sparse.version {
            None | Some((0, 0 | 1)) => {
                if sparse
                    .announced_parts
                    .is_some_and(|count| count != sparse.parts.len() as u64)
                {
                    return Err(self.problem(fault("its number of parts is wrong")));
                }
                self.parts = sparse.parts.into();
            }
            Some((1, 0)) => {
                self.parts.clear();
                let mut map = MapText {
                    block: [0; BLOCK],
                    at: BLOCK,
                };
                let count = self.map_number(&mut map)?;
                for _ in 0..count {
                    let offset = self.map_number(&mut map)?;
                    let length = self.map_number(&mut map)?;
                    self.push_part(Part { offset, length })?;
                }
            }
            Some(_) => return Err(self.problem(fault("its version is not known"))),
        }
        Ok(real_size)
    }

    fn push_part(&mut self, part: Part) -> Result<(), TarError> {
        if self.parts.len() >= self.limits.sparse_parts {
            return Err(self.problem(EntryProblem::SparseMap("it has too many parts")));
        }
        self.parts.push_back(part);
        Ok(())
    }

    /// The next line of a 1.0 map, which fills whole blocks at the start of the stored data.
    fn map_number(&mut self, map: &mut MapText) -> Result<u64, TarError> {
        let mut digits = Vec::new();
        loop {
            if map.at == BLOCK {
                if self.stored < BLOCK as u64 || self.read_block(&mut map.block)? < BLOCK {
                    return Err(self.problem(EntryProblem::SparseMap("it is cut short")));
                }
                self.stored -= BLOCK as u64;
                map.at = 0;
            }
            let byte = map.block[map.at];
            map.at += 1;
            if byte == b'\n' {
                let number = decimal(&digits);
                return number.ok_or_else(|| self.problem(EntryProblem::SparseMap("a number is malformed")));
            }
            digits.push(byte);
            if digits.len() > 20 {
                return Err(self.problem(EntryProblem::SparseMap("a number is malformed")));
            }
        }
    }
}
