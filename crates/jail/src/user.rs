//! User ids: one for each live process.
//!
//! Each id has a lock file. The process inherits its descriptor and so holds the lock exactly as long as it lives,
//! whoever started it and whatever became of that server: nothing is recorded, nothing can be wrong after a crash.
//!
//! A hostile process can let go of its lock. Its id may then be another's too, who is behind other namespaces and sees
//! none of its files; it gains nothing by that.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::JailError;

/// User and group of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// A user for one process.
#[derive(Debug)]
pub(crate) struct User {
    pub(crate) uid: u32,
    /// The group of all jails.
    pub(crate) gid: u32,
    /// To be inherited by the process.
    pub(crate) lock: OwnedFd,
}

impl User {
    pub(crate) fn ids(&self) -> Ids {
        Ids {
            uid: self.uid,
            gid: self.gid,
        }
    }
}

/// The range of ids.
#[derive(Debug)]
pub(crate) struct Users {
    first: u32,
    count: u32,
    /// Where the search begins, so that an id that was just given back rests.
    next: AtomicU32,
}

impl Users {
    /// Users of `count` ids from `first` on; the first is the group's.
    pub(crate) fn new(first: u32, count: u32) -> Self {
        Self {
            first,
            count,
            next: AtomicU32::new(0),
        }
    }

    /// Whether no live process has this id, as long as the answer is held.
    pub(crate) fn reserve(&self, state: &Path, uid: u32) -> Option<OwnedFd> {
        let lock = open_lock(&state.join(uid.to_string())).ok()?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).ok()?;
        Some(lock.into())
    }

    /// Takes an id that no live process has.
    pub(crate) fn take(&self, state: &Path) -> Result<User, JailError> {
        make_private(state)
            .map_err(|error| JailError::io(format!("cannot use {}", state.display()), error))?;
        let users = self.count - 1;
        for _ in 0..users {
            let uid = self.first + 1 + self.next.fetch_add(1, Ordering::Relaxed) % users;
            let path = state.join(uid.to_string());
            let lock = open_lock(&path)
                .map_err(|error| JailError::io(format!("cannot open {}", path.display()), error))?;
            match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    return Ok(User {
                        uid,
                        gid: self.first,
                        lock: lock.into(),
                    });
                }
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                Err(error) => return Err(JailError::io(format!("cannot lock {}", path.display()), error)),
            }
        }
        Err(JailError::NoUser(users))
    }
}

fn open_lock(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
}

/// A directory that only we enter: a stranger's locks would keep us from all ids.
fn make_private(directory: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let about = std::fs::symlink_metadata(directory)?;
    if about.is_dir() && about.uid() == rustix::process::geteuid().as_raw() {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it belongs to another user",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_has_one_owner_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let users = Users::new(200_000, 4);
        let mut held: Vec<User> = (0..3).map(|_| users.take(directory.path()).unwrap()).collect();
        let mut ids: Vec<u32> = held.iter().map(|user| user.uid).collect();
        ids.sort_unstable();
        assert_eq!(ids, [200_001, 200_002, 200_003]);
        assert!(held.iter().all(|user| user.gid == 200_000));
        // Another server of this host counts for itself and meets the same locks.
        let other = Users::new(200_000, 4);
        assert!(matches!(other.take(directory.path()), Err(JailError::NoUser(3))));
        let back = held.remove(1).uid;
        assert_eq!(other.take(directory.path()).unwrap().uid, back);
    }

    #[test]
    fn who_inherits_the_lock_keeps_the_id() {
        let directory = tempfile::tempdir().unwrap();
        let users = Users::new(200_000, 2);
        let user = users.take(directory.path()).unwrap();
        let mut heir = std::process::Command::new("sleep")
            .arg("600")
            .stdin(user.lock.try_clone().unwrap())
            .spawn()
            .unwrap();
        drop(user);
        assert!(users.take(directory.path()).is_err());
        heir.kill().unwrap();
        heir.wait().unwrap();
        users.take(directory.path()).unwrap();
    }
}
