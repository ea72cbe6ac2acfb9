//! Copies of disks, all of one instant, for VMMs that cannot copy beside the guest's writes.
//!
//! ```text
//! prepare (running)   first pass: everything is copied, of no instant in particular
//! begin   (paused)    second pass: what differs by now is copied again; an untouched disk is not even looked at
//! finish  (running)   synced
//! ```
//!
//! Both passes read what the host has cached of the disk; the VMM writes through the same cache.
//!
//! Invariant: after `begin` the copy equals the disk, holes included, as long as nothing writes while it runs.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::blocking::blocking;
use crate::files::io_error;
use crate::ranges::{PIECE, each_piece, without};
use crate::{Disk, DiskCopies, DiskCopy, VmmError};

/// File systems stamp changes with a clock this coarse at worst: a stamp younger than this proves nothing.
const COARSENESS: Duration = Duration::from_millis(50);

/// Copies that are prepared or made.
#[derive(Debug)]
pub(crate) struct TwoPassCopies {
    copies: Vec<Arc<Copy>>,
}

#[derive(Debug)]
struct Copy {
    source: File,
    target: File,
    path: PathBuf,
    /// When the disk was last written before the first pass, where that was long enough ago to tell.
    untouched_since: Option<(i64, i64)>,
}

/// Makes the targets and copies what is there now.
pub(crate) async fn prepare(disks: &[Disk], copies: &[DiskCopy]) -> Result<TwoPassCopies, VmmError> {
    let mut wanted = Vec::with_capacity(copies.len());
    for copy in copies {
        let disk = disks
            .get(copy.disk)
            .filter(|disk| !disk.read_only)
            .ok_or_else(|| VmmError::InvalidSpec(format!("disk {} is no writable disk", copy.disk)))?;
        wanted.push((disk.path.clone(), copy.target.clone()));
    }
    blocking(move || {
        let mut made = TwoPassCopies { copies: Vec::new() };
        for (source, target) in wanted {
            let outcome = Copy::open(&source, &target).and_then(|copy| {
                copy.bring_up()?;
                Ok(copy)
            });
            match outcome {
                Ok(copy) => made.copies.push(Arc::new(copy)),
                Err(source) => {
                    let _ = fs::remove_file(&target);
                    made.remove();
                    return Err(failed(&target, source));
                }
            }
        }
        Ok(made)
    })
    .await
}

impl TwoPassCopies {
    fn remove(&self) {
        for copy in &self.copies {
            let _ = fs::remove_file(&copy.path);
        }
    }

    async fn each(&self, work: fn(&Copy) -> io::Result<()>) -> Result<(), VmmError> {
        for copy in &self.copies {
            let copy = Arc::clone(copy);
            blocking(move || work(&copy).map_err(|error| failed(&copy.path, error))).await?;
        }
        Ok(())
    }
}

#[async_trait]
impl DiskCopies for TwoPassCopies {
    async fn begin(&mut self) -> Result<(), VmmError> {
        self.each(|copy| {
            if copy.is_untouched()? {
                Ok(())
            } else {
                copy.bring_up()
            }
        })
        .await
    }

    async fn finish(self: Box<Self>) -> Result<(), VmmError> {
        self.each(|copy| copy.target.sync_all()).await
    }

    async fn cancel(self: Box<Self>) {}
}

impl Copy {
    fn open(source: &Path, target: &Path) -> io::Result<Self> {
        let source = File::open(source)?;
        let about = source.metadata()?;
        let modified = about.modified()?;
        let settled = SystemTime::now()
            .duration_since(modified)
            .is_ok_and(|age| age > COARSENESS);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(target)?;
        file.set_len(about.len())?;
        Ok(Self {
            source,
            target: file,
            path: target.to_owned(),
            untouched_since: settled.then(|| (about.mtime(), about.mtime_nsec())),
        })
    }

    fn is_untouched(&self) -> io::Result<bool> {
        let about = self.source.metadata()?;
        Ok(self.untouched_since == Some((about.mtime(), about.mtime_nsec())))
    }

    /// Makes the copy equal to the disk.
    fn bring_up(&self) -> io::Result<()> {
        let length = self.source.metadata()?.len();
        if self.target.metadata()?.len() != length {
            self.target.set_len(length)?;
        }
        let data = extents(&self.source, length)?;
        let had = extents(&self.target, length)?;
        for hole in without(&had, &data) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&self.target, flags, hole.start, hole.end - hole.start)?;
        }
        each_piece(
            &data,
            || (vec![0; PIECE as usize], vec![0; PIECE as usize]),
            |(ours, theirs), piece| {
                let count = (piece.end - piece.start) as usize;
                let (ours, theirs) = (&mut ours[..count], &mut theirs[..count]);
                self.source.read_exact_at(theirs, piece.start)?;
                self.target.read_exact_at(ours, piece.start)?;
                if ours == theirs {
                    return Ok(());
                }
                self.target.write_all_at(theirs, piece.start)
            },
        )
    }
}

/// Where a file has data, in order.
fn extents(file: &File, length: u64) -> io::Result<Vec<Range<u64>>> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < length {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = seek(file, SeekFrom::Hole(start))?.min(length);
        extents.push(start..end);
        at = end;
    }
    Ok(extents)
}

fn failed(target: &Path, source: io::Error) -> VmmError {
    io_error("cannot copy a disk to", target)(source)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BLOCK: u64 = 4096;
    const LENGTH: u64 = 600 * BLOCK;

    #[derive(Debug, Clone)]
    enum Change {
        Write(u64, u8),
        Hole(u64, u64),
    }

    fn changes() -> impl Strategy<Value = Vec<Change>> {
        let change = prop_oneof![
            (0_u64..600, any::<u8>()).prop_map(|(block, byte)| Change::Write(block, byte)),
            (0_u64..590, 1_u64..10).prop_map(|(block, count)| Change::Hole(block, count)),
        ];
        proptest::collection::vec(change, 0..30)
    }

    fn apply(file: &File, changes: &[Change]) {
        for change in changes {
            match change {
                Change::Write(block, byte) => {
                    file.write_all_at(&[*byte; BLOCK as usize], block * BLOCK)
                        .unwrap();
                }
                Change::Hole(block, count) => {
                    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    fallocate(file, flags, block * BLOCK, count * BLOCK).unwrap();
                }
            }
        }
    }

    fn disk(path: &Path, read_only: bool) -> Disk {
        Disk {
            path: path.to_owned(),
            read_only,
            limit: None,
        }
    }

    fn copy_to(target: &Path) -> DiskCopy {
        DiskCopy {
            disk: 0,
            target: target.to_owned(),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn the_copy_is_the_disk_of_the_second_pass(before in changes(), between in changes(), after in changes()) {
            let directory = tempfile::tempdir().unwrap();
            let (source, target) = (directory.path().join("disk"), directory.path().join("copy"));
            let file = File::create_new(&source).unwrap();
            file.set_len(LENGTH).unwrap();
            apply(&file, &before);
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let instant = runtime.block_on(async {
                let mut copies = prepare(&[disk(&source, false)], &[copy_to(&target)]).await.unwrap();
                apply(&file, &between);
                copies.begin().await.unwrap();
                let instant = fs::read(&source).unwrap();
                apply(&file, &after);
                Box::new(copies).finish().await.unwrap();
                instant
            });
            prop_assert!(fs::read(&target).unwrap() == instant);
            let (copied, allowed) = (fs::metadata(&target).unwrap(), fs::metadata(&source).unwrap());
            prop_assert!(copied.blocks() <= allowed.blocks() + 2 * 30 * BLOCK / 512, "holes stay holes");
        }
    }

    #[tokio::test]
    async fn nothing_is_left_of_copies_that_cannot_be_made() {
        let directory = tempfile::tempdir().unwrap();
        let (source, target) = (directory.path().join("disk"), directory.path().join("copy"));
        fs::write(&source, "content").unwrap();
        assert!(
            prepare(&[disk(&source, true)], &[copy_to(&target)])
                .await
                .is_err()
        );
        let missing = [disk(&source, false), disk(&directory.path().join("none"), false)];
        let second = DiskCopy {
            disk: 1,
            target: directory.path().join("second"),
        };
        assert!(prepare(&missing, &[copy_to(&target), second]).await.is_err());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
