//! Rotation of a log whose writer cannot be told to open another file.
//!
//! A process appends to a file through a descriptor that only it could change. The caller has renamed that file; now
//! its content stays under the new name, and the file itself gets its old name back:
//!
//! ```text
//! renamed     vmm.log.1 ─► the file that grows        vmm.log      absent
//! copied      vmm.log.1 ─► the file                   vmm.log.new  its whole blocks so far
//! named       vmm.log   ─► the file                   vmm.log.1    the copy
//! cut         vmm.log   ─► the file, without what was copied
//! ```
//!
//! Invariants:
//! - Cutting whole blocks off the front of a file is one step of the file system: what is appended meanwhile is neither
//!   lost nor doubled. Where the file system cannot do that, the writer must stand still.
//! - Whenever it is broken off, nothing is lost; lines may then stand in both files.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

use crate::VmmError;
use crate::blocking::blocking;
use crate::files::{beside, io_error};

/// Where a VMM writes its console.
const STANDARD_OUTPUT: i32 = 1;

/// Gives the console's file of process `pid` its name back and moves what can be moved while it is written to. `None`:
/// nothing is left to be done.
pub(crate) async fn begin(pid: u32, path: &Path) -> Result<Option<Turn>, VmmError> {
    let name = path.to_owned();
    let moving = move || -> io::Result<Option<Turn>> {
        let Some(mut turn) = Turn::begin(pid, STANDARD_OUTPUT, &name)? else {
            return Ok(None);
        };
        Ok((!turn.move_blocks()?).then_some(turn))
    };
    blocking(moving).await.map_err(io_error("cannot rotate", path))
}

/// Moves the rest, of a machine that stands still.
pub(crate) async fn finish(turn: Turn, path: &Path) -> Result<(), VmmError> {
    blocking(move || turn.finish())
        .await
        .map_err(io_error("cannot rotate", path))
}

/// A rotation under way.
#[derive(Debug)]
pub(crate) struct Turn {
    /// The file that grows.
    live: File,
    /// Its own name.
    name: PathBuf,
    /// The name that it was given by the caller, which its content shall have.
    rotated: PathBuf,
    /// How much of it was copied.
    copied: u64,
}

impl Turn {
    /// Finds the file that process `pid` has as descriptor `number`. `None`: it has its name, nothing is to be done.
    pub(crate) fn begin(pid: u32, number: i32, name: &Path) -> io::Result<Option<Self>> {
        let link = format!("/proc/{pid}/fd/{number}");
        let rotated = fs::read_link(&link)?;
        if rotated == name {
            return Ok(None);
        }
        let meant = fs::metadata(&link)?;
        if rotated.parent() != name.parent() {
            // It was removed and not renamed: what is written to it cannot be read by anybody.
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("the file behind {} has no name any more", name.display()),
            ));
        }
        let live = File::options().read(true).write(true).open(&rotated)?;
        let found = live.metadata()?;
        if (found.dev(), found.ino()) != (meant.dev(), meant.ino()) {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("{} is another file by now", rotated.display()),
            ));
        }
        Ok(Some(Self {
            live,
            name: name.to_owned(),
            rotated,
            copied: 0,
        }))
    }

    /// Moves the whole blocks to the rotated file. `false`: this file system cannot, [`Turn::finish`] will, as soon
    /// as the writer stands still.
    pub(crate) fn move_blocks(&mut self) -> io::Result<bool> {
        let about = self.live.metadata()?;
        let block = about.blksize().max(1);
        // A file cannot lose all of its blocks this way.
        let whole = about.len().saturating_sub(1) / block * block;
        let fresh = self.fresh();
        {
            let mut copy = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&fresh)?;
            self.copied = copy_range(&mut self.live, 0, whole, &mut copy)?;
        }
        fs::rename(&self.rotated, &self.name)?;
        fs::rename(&fresh, &self.rotated)?;
        if self.copied == 0 {
            return Ok(true);
        }
        match fallocate(&self.live, FallocateFlags::COLLAPSE_RANGE, 0, self.copied) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Moves what is left, of a file that nobody writes to.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        let mut copy = File::options().append(true).open(&self.rotated)?;
        let length = self.live.metadata()?.len();
        copy_range(
            &mut self.live,
            self.copied,
            length - self.copied.min(length),
            &mut copy,
        )?;
        self.live.set_len(0)
    }

    fn fresh(&self) -> PathBuf {
        beside(&self.name, ".new")
    }
}

fn copy_range(from: &mut File, offset: u64, length: u64, to: &mut File) -> io::Result<u64> {
    from.seek(SeekFrom::Start(offset))?;
    io::copy(&mut from.take(length), to)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    struct Log {
        directory: tempfile::TempDir,
        writer: File,
    }

    impl Log {
        fn new() -> Self {
            // Beside the sources and not in /tmp, which may be in memory.
            let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
            let writer = File::options()
                .append(true)
                .create(true)
                .open(directory.path().join("vmm.log"))
                .unwrap();
            Self { directory, writer }
        }

        fn path(&self, name: &str) -> PathBuf {
            self.directory.path().join(name)
        }

        fn rename(&self, number: u32) {
            fs::rename(self.path("vmm.log"), self.path(&format!("vmm.log.{number}"))).unwrap();
        }

        fn begin(&self) -> Option<Turn> {
            Turn::begin(std::process::id(), self.writer.as_raw_fd(), &self.path("vmm.log")).unwrap()
        }

        fn text(&self, number: u32) -> String {
            fs::read_to_string(self.path(&format!("vmm.log.{number}"))).unwrap()
        }
    }

    #[test]
    fn nothing_is_lost_or_doubled_while_the_writer_goes_on() {
        let log = Log::new();
        let mut writer = log.writer.try_clone().unwrap();
        let stop = std::sync::atomic::AtomicBool::new(false);
        let (mut parts, written) = std::thread::scope(|scope| {
            let writing = scope.spawn(|| {
                let mut count = 0;
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    writeln!(writer, "line {count}").unwrap();
                    count += 1;
                }
                count
            });
            let mut parts = String::new();
            for number in 0..10 {
                while fs::metadata(log.path("vmm.log")).unwrap().len() < 20_000 {
                    std::thread::yield_now();
                }
                log.rename(number);
                let mut turn = log.begin().unwrap();
                if !turn.move_blocks().unwrap() {
                    println!("SKIPPED: this file system cannot cut the front off a file");
                    break;
                }
                parts += &log.text(number);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
            (parts, writing.join().unwrap())
        });
        parts += &fs::read_to_string(log.path("vmm.log")).unwrap();
        let expected: String = (0..written).map(|count| format!("line {count}\n")).collect();
        assert!(
            parts == expected,
            "{} bytes instead of {}",
            parts.len(),
            expected.len()
        );
        assert!(!log.path("vmm.log.new").exists());
    }

    #[test]
    fn a_writer_that_stands_still_serves_where_the_file_system_cannot_cut() {
        let mut log = Log::new();
        let first = "one\n".repeat(5000);
        log.writer.write_all(first.as_bytes()).unwrap();
        log.rename(1);
        let mut turn = log.begin().unwrap();
        // As if the file system had refused.
        let whole = turn.copied_without_cut();
        assert!(whole > 0);
        log.writer.write_all(b"two\n").unwrap();
        turn.finish().unwrap();
        log.writer.write_all(b"three\n").unwrap();
        assert_eq!(log.text(1), format!("{first}two\n"));
        assert_eq!(fs::read_to_string(log.path("vmm.log")).unwrap(), "three\n");
    }

    #[test]
    fn a_file_that_kept_its_name_is_left_alone_and_a_lost_one_is_told() {
        let log = Log::new();
        assert!(log.begin().is_none());
        fs::remove_file(log.path("vmm.log")).unwrap();
        let name = log.path("vmm.log");
        assert!(Turn::begin(std::process::id(), log.writer.as_raw_fd(), &name).is_err());
    }

    impl Turn {
        fn copied_without_cut(&mut self) -> u64 {
            let whole = self.live.metadata().unwrap().len() / 4096 * 4096;
            let mut copy = File::create(self.fresh()).unwrap();
            self.copied = copy_range(&mut self.live, 0, whole, &mut copy).unwrap();
            fs::rename(&self.rotated, &self.name).unwrap();
            fs::rename(self.fresh(), &self.rotated).unwrap();
            self.copied
        }
    }
}
