//! Checks of the data directory: writable, room, and what its file system can do.

use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{XattrFlags, fsetxattr, ioctl_ficlone, statvfs};

use super::Check;
use crate::config::Values;
use crate::output::bytes;

/// Below this nothing useful fits.
const TOO_LITTLE: u64 = 1 << 30;

/// A hole of this size shows whether files can have holes.
const HOLE: u64 = 8 << 20;

pub(super) fn examine(values: &Values, data: &Path) -> Vec<Check> {
    let existing = nearest_existing(data);
    let mut checks = vec![room(values, data, &existing)];
    let scratch = match tempfile::Builder::new()
        .prefix(".hypeman-doctor-")
        .tempdir_in(&existing)
    {
        Ok(scratch) => scratch,
        Err(failure) => {
            checks.push(Check::fail(
                "data directory",
                format!("{} cannot be written: {failure}", existing.display()),
                "run this as the user that runs the server, or choose another --data-dir",
            ));
            return checks;
        }
    };
    let state = if data == existing {
        "writable"
    } else {
        "does not exist yet and can be made"
    };
    checks.push(Check::ok("data directory", format!("{} {state}", data.display())));
    checks.push(sparse(scratch.path()));
    checks.push(extended_attributes(scratch.path()));
    checks.push(reflink(scratch.path()));
    checks
}

/// The directory itself, or the nearest one above it that is there.
fn nearest_existing(data: &Path) -> PathBuf {
    data.ancestors()
        .find(|path| path.is_dir())
        .unwrap_or(Path::new("/"))
        .to_owned()
}

fn room(values: &Values, data: &Path, existing: &Path) -> Check {
    let space = match statvfs(existing) {
        Ok(space) => space,
        Err(errno) => {
            return Check::fail(
                "disk space",
                format!("{}: {errno}", existing.display()),
                "choose another --data-dir",
            );
        }
    };
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    let total = space.f_blocks.saturating_mul(space.f_frsize);
    let found = format!("{} of {} free for {}", bytes(free), bytes(total), data.display());
    let wanted = values.size("limits.min_free_disk").unwrap_or(0);
    let fix = "free some, choose another --data-dir, or lower limits.min_free_disk";
    if free < TOO_LITTLE {
        Check::fail("disk space", found, fix)
    } else if free < wanted {
        Check::warn(
            "disk space",
            format!("{found}; pulls are refused below {}", bytes(wanted)),
            fix,
        )
    } else {
        Check::ok("disk space", found)
    }
}

fn sparse(directory: &Path) -> Check {
    let made = (|| {
        let path = directory.join("sparse");
        let mut file = File::create(&path)?;
        file.seek(SeekFrom::Start(HOLE))?;
        file.write_all(b"x")?;
        file.sync_all()?;
        Ok::<u64, std::io::Error>(fs::metadata(&path)?.blocks() * 512)
    })();
    match made {
        Ok(used) if used < HOLE => Check::ok("sparse files", "holes take no room"),
        Ok(_) => Check::warn(
            "sparse files",
            "holes are filled: each writable disk takes its whole size",
            "use ext4, XFS or btrfs for the data directory",
        ),
        Err(failure) => Check::fail(
            "sparse files",
            failure.to_string(),
            "use ext4, XFS or btrfs for the data directory",
        ),
    }
}

fn extended_attributes(directory: &Path) -> Check {
    let set = File::create(directory.join("xattr"))
        .map_err(|failure| failure.to_string())
        .and_then(|file| {
            fsetxattr(&file, "user.hypeman", b"1", XattrFlags::empty()).map_err(|errno| errno.to_string())
        });
    match set {
        Ok(()) => Check::ok("extended attributes", "kept"),
        Err(failure) => Check::warn(
            "extended attributes",
            failure,
            "images keep theirs inside their disks all the same; ext4, XFS and btrfs have them",
        ),
    }
}

fn reflink(directory: &Path) -> Check {
    let cloned = (|| {
        fs::write(directory.join("source"), vec![1; 65_536])?;
        let source = File::open(directory.join("source"))?;
        let clone = File::create(directory.join("clone"))?;
        ioctl_ficlone(&clone, &source)?;
        Ok::<(), std::io::Error>(())
    })();
    match cloned {
        Ok(()) => Check::ok("reflink", "disks are cloned without copying"),
        Err(_) => Check::warn(
            "reflink",
            "not on this file system: cloning a disk copies its data",
            "XFS (made with reflink=1) or btrfs for the data directory; needed by nothing, faster for snapshots",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn a_good_directory_is_examined_and_left_as_it_was() {
        let temporary = tempfile::tempdir().unwrap();
        let data = temporary.path().join("not/yet");
        let checks = examine(&Values::default(), &data);
        let names: Vec<_> = checks.iter().map(|check| check.name).collect();
        assert_eq!(
            names,
            [
                "disk space",
                "data directory",
                "sparse files",
                "extended attributes",
                "reflink"
            ]
        );
        assert!(checks[1].found.contains("can be made"), "{checks:?}");
        assert_eq!(fs::read_dir(temporary.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_cannot_be_written_fails_with_a_way_out() {
        let checks = examine(&Values::default(), Path::new("/proc/hypeman"));
        let last = checks.last().unwrap();
        assert_eq!((last.name, last.verdict), ("data directory", Verdict::Fail));
        assert!(last.fix.is_some());
    }
}
