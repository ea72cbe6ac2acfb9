//! The image file: an append cursor with a buffer, and writes at known places behind it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::BLOCK_SIZE;
use crate::error::Error;

const BUFFER: usize = 1 << 20;

/// Zero ranges from this size on become holes of the host's file instead of written zeros.
const SKIP_THRESHOLD: u64 = 64 << 10;

/// Append-mostly access to the image file. Whatever is skipped reads as zero.
pub(crate) struct Output<'a> {
    file: &'a File,
    /// Offset in the file of the first byte of `buffer`.
    flushed: u64,
    buffer: Vec<u8>,
}

impl<'a> Output<'a> {
    /// Empties the file and starts at its first byte.
    pub(crate) fn new(file: &'a File) -> io::Result<Self> {
        file.set_len(0)?;
        Ok(Self {
            file,
            flushed: 0,
            buffer: Vec::with_capacity(BUFFER),
        })
    }

    /// Where the next appended byte goes.
    pub(crate) fn position(&self) -> u64 {
        self.flushed + self.buffer.len() as u64
    }

    /// The block that the next appended byte goes to, which must be its first.
    pub(crate) fn block(&self) -> Result<u32, Error> {
        debug_assert_eq!(self.position() % BLOCK_SIZE as u64, 0);
        // The highest address means "none", so it is never given out.
        match u32::try_from(self.position() / BLOCK_SIZE as u64) {
            Ok(block) if block < u32::MAX => Ok(block),
            _ => Err(Error::TooLarge),
        }
    }

    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush()?;
            if bytes.len() >= BUFFER {
                self.file.write_all_at(bytes, self.flushed)?;
                self.flushed += bytes.len() as u64;
                return Ok(());
            }
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// Moves on over `count` zero bytes.
    pub(crate) fn skip(&mut self, count: u64) -> io::Result<()> {
        if count < SKIP_THRESHOLD {
            if self.buffer.len() as u64 + count > BUFFER as u64 {
                self.flush()?;
            }
            self.buffer.resize(self.buffer.len() + count as usize, 0);
        } else {
            self.flush()?;
            self.flushed += count;
        }
        Ok(())
    }

    /// Fills the current block up with zeros.
    pub(crate) fn align(&mut self) -> io::Result<()> {
        let rest = self.position().next_multiple_of(BLOCK_SIZE as u64) - self.position();
        self.skip(rest)
    }

    /// Writes at an offset before the cursor.
    pub(crate) fn write_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if offset >= self.flushed {
            let start = (offset - self.flushed) as usize;
            self.buffer[start..start + bytes.len()].copy_from_slice(bytes);
            return Ok(());
        }
        if offset + bytes.len() as u64 > self.flushed {
            self.flush()?;
        }
        self.file.write_all_at(bytes, offset)
    }

    /// Gives back the end of the file that nothing was written to.
    pub(crate) fn shrink_to(&mut self, position: u64) -> io::Result<()> {
        self.flush()?;
        debug_assert!(position <= self.flushed);
        self.flushed = position;
        Ok(())
    }

    /// Returns written blocks to the host as a hole where its file system can; their content no longer matters.
    pub(crate) fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        self.flush()?;
        // Failure only costs space.
        let _ = fallocate(
            self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            length,
        );
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.flushed)?;
        self.flushed += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Writes what is pending and sets the length of the file.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        self.flush()?;
        self.file.set_len(self.flushed)
    }
}
