//! Reading logs: the last lines, then what is added, across rotations.
//!
//! ```text
//!   app.log.2   app.log.1   app.log          rotation renames the current file away; the writer then
//!   (older) ───────────────► (now)           opens a new one under the old name
//! ```
//!
//! Invariants:
//! - No line is lost or shown twice by a rotation: a follower leaves a file only after a newer one exists under
//!   the name *and* the old one was read to its end after that. Where a writer cannot open a new file, its old one gets
//!   the name back and is cut at its front; what was cut is in the rotated file, so both together go on as before.
//! - Memory is bounded: lines are found by scanning backwards in blocks and then streamed; a line longer than
//!   [`MAX_LINE`] is handed out in pieces.
//! - Following waits for inotify (see `log_watch`), it never polls.

use std::io::{self, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use futures::future::BoxFuture;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};

use super::log_watch::{LogWatcher, Watched};
use crate::EngineError;

/// Longest piece of a line that is handed out at once, in bytes.
const MAX_LINE: usize = 4 << 20;

/// Read at a time, in bytes.
const BLOCK: usize = 64 << 10;

/// The lines of one log, as a client reads them.
pub struct LogFollower {
    path: PathBuf,
    max_files: u32,
    /// Older files still to be read, oldest last.
    pending: Vec<(File, u64)>,
    current: Option<File>,
    inode: u64,
    following: Option<Following>,
    buffer: Vec<u8>,
    /// Bytes of `buffer` known to hold no line end.
    scanned: usize,
    /// Bytes of `buffer` already handed out.
    consumed: usize,
}

/// What a follower waits for.
struct Following {
    watched: Watched,
    gone: BoxFuture<'static, ()>,
}

impl std::fmt::Debug for LogFollower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogFollower")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl LogFollower {
    /// Opens the log at `path` so that the last `tail` lines come first. To follow it takes the watcher, and what
    /// resolves when nothing can come any more because the instance is gone.
    ///
    /// # Errors
    /// [`EngineError::LogNotFound`] when it was never written.
    pub(crate) async fn open(
        path: &Path,
        max_files: u32,
        tail: usize,
        follow: Option<(&LogWatcher, BoxFuture<'static, ()>)>,
    ) -> Result<Self, EngineError> {
        // The watch comes first: what is written between the two is seen by one of them.
        let following = match follow {
            Some((watcher, gone)) => {
                let watched = watcher.watch(path.parent().unwrap_or(Path::new("/")));
                let watched = watched.map_err(|error| match error.kind() {
                    // The instance is just being made, or removed.
                    io::ErrorKind::NotFound => EngineError::LogNotFound,
                    _ => read_error(error),
                })?;
                Some(Following { watched, gone })
            }
            None => None,
        };
        let mut files = Vec::new();
        let mut inode = 0;
        for segment in
            std::iter::once(path.to_owned()).chain((1..=max_files).map(|number| rotated(path, number)))
        {
            match File::open(&segment).await {
                Ok(file) => {
                    // Right after a rotation the newest file is one that has lost its name already.
                    if files.is_empty() {
                        inode = file.metadata().await.map_err(read_error)?.ino();
                    }
                    files.push(file);
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(read_error(error)),
            }
        }
        if files.is_empty() {
            return Err(EngineError::LogNotFound);
        }
        let mut pending = Vec::new();
        let mut wanted = tail;
        for mut file in files {
            let (offset, found) = last_lines(&mut file, wanted).await.map_err(read_error)?;
            pending.push((file, offset));
            wanted -= found.min(wanted);
            if wanted == 0 {
                break;
            }
        }
        Ok(Self {
            path: path.to_owned(),
            max_files,
            pending,
            current: None,
            inode,
            following,
            buffer: Vec::new(),
            scanned: 0,
            consumed: 0,
        })
    }

    /// The next line without its line end; `None` at the end. A follower waits instead.
    ///
    /// # Errors
    /// The log can't be read.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, EngineError> {
        loop {
            if let Some(line) = self.take_line() {
                return Ok(Some(line));
            }
            if self.fill().await.map_err(read_error)? {
                continue;
            }
            if self.advance().await.map_err(read_error)? {
                continue;
            }
            let Some(following) = self.following.as_mut() else {
                return Ok(self.take_rest());
            };
            let more = tokio::select! {
                more = following.watched.changed() => more,
                () = &mut following.gone => false,
            };
            if !more {
                // The instance is gone: what is left in open files is all that will ever come.
                self.following = None;
            }
        }
    }

    fn take_line(&mut self) -> Option<Vec<u8>> {
        let unseen = &self.buffer[self.scanned.max(self.consumed)..];
        let start = self.scanned.max(self.consumed);
        let line = if let Some(length) = unseen.iter().position(|&byte| byte == b'\n') {
            let end = start + length;
            let line = self.buffer[self.consumed..end].to_vec();
            self.consumed = end + 1;
            line
        } else if self.buffer.len() - self.consumed >= MAX_LINE {
            let line = self.buffer[self.consumed..].to_vec();
            self.consumed = self.buffer.len();
            line
        } else {
            self.scanned = self.buffer.len();
            return None;
        };
        self.scanned = self.consumed;
        if self.consumed == self.buffer.len() {
            self.buffer.clear();
            (self.consumed, self.scanned) = (0, 0);
        }
        Some(without_carriage_return(line))
    }

    fn take_rest(&mut self) -> Option<Vec<u8>> {
        let rest = self.buffer.split_off(self.consumed.min(self.buffer.len()));
        self.buffer.clear();
        (self.consumed, self.scanned) = (0, 0);
        (!rest.is_empty()).then(|| without_carriage_return(rest))
    }

    /// Reads more of the current file. `false` at its present end.
    async fn fill(&mut self) -> io::Result<bool> {
        if self.current.is_none() {
            let Some((mut file, offset)) = self.pending.pop() else {
                return Ok(false);
            };
            file.seek(SeekFrom::Start(offset)).await?;
            self.current = Some(file);
        }
        let Some(file) = self.current.as_mut() else {
            return Ok(false);
        };
        if self.consumed > 0 {
            self.buffer.drain(..self.consumed);
            self.scanned -= self.consumed;
            self.consumed = 0;
        }
        let length = self.buffer.len();
        self.buffer.reserve(BLOCK);
        let read = file.take(BLOCK as u64).read_buf(&mut self.buffer).await?;
        debug_assert_eq!(self.buffer.len(), length + read);
        Ok(read > 0)
    }

    /// Goes on to the next file, if there is one.
    async fn advance(&mut self) -> io::Result<bool> {
        if !self.pending.is_empty() {
            self.current = None;
            return Ok(true);
        }
        if self.following.is_none() {
            return Ok(false);
        }
        let newer = newer_files(&self.path, self.max_files, self.inode).await?;
        if newer.is_empty() {
            return self.find_place_after_cut().await;
        }
        // The writer has moved on; whatever it wrote to the old file is there now.
        if self.current.is_some() && self.fill().await? {
            return Ok(true);
        }
        self.inode = newer.first().map_or(self.inode, |(_, inode)| *inode);
        self.pending = newer.into_iter().map(|(file, _)| (file, 0)).collect();
        self.current = None;
        Ok(true)
    }
    /// Goes on where it was in a file that was cut at its front since. `false`: it was not.
    async fn find_place_after_cut(&mut self) -> io::Result<bool> {
        let Some(file) = self.current.as_mut() else {
            return Ok(false);
        };
        let place = file.stream_position().await?;
        if file.metadata().await?.len() >= place {
            return Ok(false);
        }
        let front = File::open(rotated(&self.path, 1)).await?;
        let cut = front.metadata().await?.len();
        let rest = File::open(&self.path).await?;
        self.pending = vec![(rest, place.saturating_sub(cut))];
        if place < cut {
            self.pending.push((front, place));
        }
        self.current = None;
        Ok(true)
    }
}

/// Files that came after the one with this inode, newest first, with their inodes.
async fn newer_files(path: &Path, max_files: u32, current: u64) -> io::Result<Vec<(File, u64)>> {
    let mut newer: Vec<(File, u64)> = Vec::new();
    for number in 0..=max_files {
        let name = if number == 0 {
            path.to_owned()
        } else {
            rotated(path, number)
        };
        let file = match File::open(&name).await {
            Ok(file) => file,
            // Just renamed, and its successor not there yet: the next event tells.
            Err(error) if error.kind() == io::ErrorKind::NotFound => break,
            Err(error) => return Err(error),
        };
        let inode = file.metadata().await?.ino();
        if inode == current {
            break;
        }
        // A rotation in the middle of this loop shows a file under two names.
        if newer.iter().all(|(_, other)| *other != inode) {
            newer.push((file, inode));
        }
    }
    Ok(newer)
}

/// Name of the `number`-th rotated file.
pub(crate) fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

fn read_error(error: io::Error) -> EngineError {
    EngineError::io("read the log", error)
}

/// Serial consoles end lines with CR LF.
fn without_carriage_return(mut line: Vec<u8>) -> Vec<u8> {
    if line.last() == Some(&b'\r') {
        line.pop();
    }
    line
}

/// Offset of the last `wanted` lines of `file`, and how many there are.
async fn last_lines(file: &mut File, wanted: usize) -> io::Result<(u64, usize)> {
    let length = file.metadata().await?.len();
    if wanted == 0 {
        return Ok((length, 0));
    }
    let mut position = length;
    let mut found = 0;
    let mut block = vec![0; BLOCK];
    while position > 0 {
        let size = position.min(BLOCK as u64);
        position -= size;
        let bytes = &mut block[..usize::try_from(size).unwrap_or(BLOCK)];
        file.seek(SeekFrom::Start(position)).await?;
        file.read_exact(bytes).await?;
        for (index, &byte) in bytes.iter().enumerate().rev() {
            let offset = position + index as u64;
            // The end of the last line ends nothing before it.
            if byte == b'\n' && offset + 1 != length {
                found += 1;
                if found == wanted {
                    return Ok((offset + 1, found));
                }
            }
        }
    }
    Ok((0, if length > 0 { found + 1 } else { 0 }))
}

#[cfg(test)]
mod tests;
