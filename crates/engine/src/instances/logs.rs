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
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    async fn opened(path: &Path, tail: usize) -> Result<LogFollower, EngineError> {
        LogFollower::open(path, 1, tail, None).await
    }

    /// What keeps a log being followed: dropped, the instance is gone.
    struct Life(LogWatcher, #[allow(dead_code)] tokio::sync::oneshot::Sender<()>);

    async fn followed(path: &Path) -> Result<(LogFollower, Life), EngineError> {
        let (sender, gone) = tokio::sync::oneshot::channel();
        let life = Life(LogWatcher::default(), sender);
        let gone = Box::pin(async move { drop(gone.await) });
        let follower = LogFollower::open(path, 1, 10, Some((&life.0, gone))).await?;
        Ok((follower, life))
    }

    async fn lines(follower: &mut LogFollower) -> Vec<String> {
        let mut all = Vec::new();
        while let Some(line) = follower.next().await.unwrap() {
            all.push(String::from_utf8(line).unwrap());
        }
        all
    }

    #[tokio::test]
    async fn the_tail_reaches_back_into_rotated_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.log");
        std::fs::write(rotated(&path, 1), "one\ntwo\nthree\n").unwrap();
        std::fs::write(&path, "four\r\nfive").unwrap();
        let mut follower = opened(&path, 3).await.unwrap();
        assert_eq!(lines(&mut follower).await, ["three", "four", "five"]);
        let mut all = opened(&path, 100).await.unwrap();
        assert_eq!(lines(&mut all).await, ["one", "two", "three", "four", "five"]);
    }

    #[tokio::test]
    async fn a_log_that_was_never_written_is_not_found() {
        let directory = tempfile::tempdir().unwrap();
        let missing = opened(&directory.path().join("app.log"), 10).await;
        assert!(matches!(missing, Err(EngineError::LogNotFound)));
    }

    #[tokio::test]
    async fn following_ends_when_the_instance_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let logs = directory.path().join("instance/logs");
        std::fs::create_dir_all(&logs).unwrap();
        let path = logs.join("app.log");
        let early = followed(&logs.join("none/app.log")).await;
        assert!(matches!(early, Err(EngineError::LogNotFound)));
        std::fs::write(&path, "one\nlast").unwrap();
        let (mut follower, life) = followed(&path).await.unwrap();
        assert_eq!(follower.next().await.unwrap().unwrap(), b"one");
        std::fs::remove_dir_all(&logs).unwrap();
        drop(life);
        assert_eq!(lines(&mut follower).await, ["last"]);
    }

    #[tokio::test]
    async fn a_follower_that_comes_in_the_middle_of_a_rotation_sees_no_line_twice() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.log");
        std::fs::write(rotated(&path, 1), "one\n").unwrap();
        let (mut follower, _life) = followed(&path).await.unwrap();
        assert_eq!(follower.next().await.unwrap().unwrap(), b"one");
        std::fs::write(&path, "two\n").unwrap();
        assert_eq!(follower.next().await.unwrap().unwrap(), b"two");
    }

    #[tokio::test]
    async fn a_long_line_survives_whole() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.log");
        let long = "x".repeat(1 << 20);
        std::fs::write(&path, format!("a\n{long}\nb\n")).unwrap();
        let mut follower = opened(&path, 2).await.unwrap();
        assert_eq!(lines(&mut follower).await, [long, "b".into()]);
    }

    #[tokio::test]
    async fn a_follower_sees_each_line_once_while_the_log_rotates_under_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("app.log");
        let mut writer = std::fs::File::create(&path).unwrap();
        let (mut follower, _life) = followed(&path).await.unwrap();
        let (progress, reached) = std::sync::mpsc::channel();
        let writing = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || {
                for number in 0..3_000 {
                    if number % 500 == 499 {
                        // One rotated file is kept: the reader must have opened the one that goes now.
                        let oldest_kept = number - 999;
                        while oldest_kept > 0 && reached.recv().unwrap() < oldest_kept {}
                        std::fs::rename(&path, rotated(&path, 1)).unwrap();
                        // The old file still gets a line after its rename, as a VMM's would.
                        writeln!(writer, "{number}").unwrap();
                        writer = std::fs::File::create(&path).unwrap();
                    } else {
                        writeln!(writer, "{number}").unwrap();
                    }
                }
                writer
            })
        };
        for expected in 0..3_000 {
            let line = follower.next().await.unwrap().unwrap();
            assert_eq!(String::from_utf8(line).unwrap(), expected.to_string());
            let _ = progress.send(expected);
        }
        writing.await.unwrap();
    }

    #[tokio::test]
    async fn a_follower_keeps_its_place_when_the_front_of_a_file_moves_to_the_rotated_one() {
        for read_before in [1, 3] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("vmm.log");
            std::fs::write(&path, "one\ntwo\nthree\n").unwrap();
            let (mut follower, _life) = followed(&path).await.unwrap();
            for expected in ["one", "two", "three"].into_iter().take(read_before) {
                assert_eq!(follower.next().await.unwrap().unwrap(), expected.as_bytes());
            }
            // The same file as before, without its first two lines.
            std::fs::write(rotated(&path, 1), "one\ntwo\n").unwrap();
            std::fs::write(&path, "three\n").unwrap();
            let mut file = std::fs::File::options().append(true).open(&path).unwrap();
            for expected in ["one", "two", "three"].into_iter().skip(read_before) {
                assert_eq!(follower.next().await.unwrap().unwrap(), expected.as_bytes());
            }
            let next = tokio::spawn(async move { follower.next().await.unwrap().unwrap() });
            tokio::task::yield_now().await;
            writeln!(file, "four").unwrap();
            assert_eq!(next.await.unwrap(), b"four");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_tail_is_what_splitting_the_whole_would_give(
            text in prop::collection::vec("[a-z]{0,9}", 0..30),
            ends_with_newline in any::<bool>(),
            tail in 0_usize..40,
        ) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("app.log");
            let mut content = text.join("\n");
            if ends_with_newline && !content.is_empty() {
                content.push('\n');
            }
            std::fs::write(&path, &content).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let found = runtime.block_on(async {
                lines(&mut opened(&path, tail).await.unwrap()).await
            });
            let all: Vec<&str> = content.lines().collect();
            prop_assert_eq!(found, all[all.len().saturating_sub(tail)..].to_vec());
        }
    }
}
