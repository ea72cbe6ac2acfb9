//! Received entries become files and directories of this machine.
//!
//! Every directory on the way is opened from its parent's descriptor without following links, so neither a link
//! that the guest sent before nor one that somebody swaps in meanwhile can redirect a write. A file appears under
//! its name only when it is whole; a broken copy leaves no half of one.

use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chownat, fchmod, fchown, futimens, mkdirat,
    openat, renameat, symlinkat, unlinkat, utimensat,
};
use rustix::io::Errno;

use super::{Entry, EntryKind, EntrySink};
use crate::error::CliError;

/// Writes a received tree at one place.
#[derive(Debug)]
pub struct LocalTree {
    place: Place,
    /// For messages.
    shown: PathBuf,
    owners: bool,
    open: Option<OpenFile>,
    /// Modes and times of directories are set at the end: a read-only directory must first be filled.
    directories: Vec<(Vec<String>, Entry)>,
}

#[derive(Debug)]
enum Place {
    /// The top entry becomes `name` in this directory.
    Named { parent: OwnedFd, name: String },
    /// The top entry is this directory itself, which exists.
    Merged { directory: OwnedFd },
}

#[derive(Debug)]
struct OpenFile {
    directory: OwnedFd,
    temporary: String,
    name: String,
    file: std::fs::File,
    entry: Entry,
}

impl LocalTree {
    /// The top entry becomes `name` in `parent`, which must exist. `owners` keeps user and group.
    ///
    /// # Errors
    /// When `parent` cannot be opened as a directory.
    pub fn named(parent: &Path, name: &str, owners: bool) -> Result<Self, CliError> {
        let place = Place::Named {
            parent: directory(parent)?,
            name: name.to_owned(),
        };
        Ok(Self {
            place,
            shown: parent.join(name),
            owners,
            open: None,
            directories: Vec::new(),
        })
    }

    /// What is below the top entry goes into `existing`.
    ///
    /// # Errors
    /// When `existing` cannot be opened as a directory.
    pub fn merged(existing: &Path, owners: bool) -> Result<Self, CliError> {
        let place = Place::Merged {
            directory: directory(existing)?,
        };
        Ok(Self {
            place,
            shown: existing.to_owned(),
            owners,
            open: None,
            directories: Vec::new(),
        })
    }

    /// The names from the place's descriptor to the entry. Empty: the existing directory itself.
    fn names(&self, entry: &Entry) -> Vec<String> {
        let mut names = Vec::with_capacity(entry.path.parts().len());
        if let Place::Named { name, .. } = &self.place {
            names.push(name.clone());
        }
        names.extend_from_slice(entry.path.below());
        names
    }

    fn failure(&self, names: &[String], errno: Errno) -> CliError {
        let mut path = self.shown.clone();
        path.extend(
            names
                .iter()
                .skip(usize::from(matches!(self.place, Place::Named { .. }))),
        );
        match errno {
            Errno::LOOP | Errno::NOTDIR => CliError::failed(format!(
                "{}: a link or file stands where a directory belongs",
                path.display()
            )),
            errno => CliError::io(format!("cannot write {}", path.display()), errno.into()),
        }
    }

    /// Opens the directory that holds the last name, one step at a time, following nothing.
    fn holder(&self, names: &[String]) -> Result<OwnedFd, Errno> {
        let base = match &self.place {
            Place::Named { parent, .. } => parent,
            Place::Merged { directory } => directory,
        };
        let mut here = base
            .try_clone()
            .map_err(|failure| Errno::from_io_error(&failure).unwrap_or(Errno::IO))?;
        for name in names.iter().take(names.len().saturating_sub(1)) {
            here = openat(&here, name.as_str(), DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
        }
        Ok(here)
    }

    fn make_directory(&mut self, names: Vec<String>, entry: &Entry) -> Result<(), CliError> {
        if let Some(name) = names.last() {
            let made = self.holder(&names).and_then(|holder| {
                match mkdirat(&holder, name.as_str(), Mode::RWXU) {
                    Err(Errno::EXIST) | Ok(()) => {}
                    Err(errno) => return Err(errno),
                }
                openat(
                    &holder,
                    name.as_str(),
                    DIRECTORY | OFlags::NOFOLLOW,
                    Mode::empty(),
                )
                .map(drop)
            });
            made.map_err(|errno| self.failure(&names, errno))?;
            self.directories.push((names, entry.clone()));
        }
        Ok(())
    }

    fn make_link(&self, names: &[String], target: &str, entry: &Entry) -> Result<(), CliError> {
        let name = names.last().ok_or_else(|| self.failure(names, Errno::ISDIR))?;
        let temporary = temporary_name();
        let made = self.holder(names).and_then(|holder| {
            symlinkat(target, &holder, temporary.as_str())?;
            let placed = (|| {
                if self.owners {
                    let (uid, gid) = owner(entry);
                    chownat(&holder, temporary.as_str(), uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
                }
                utimensat(
                    &holder,
                    temporary.as_str(),
                    &times(entry),
                    AtFlags::SYMLINK_NOFOLLOW,
                )?;
                renameat(&holder, temporary.as_str(), &holder, name.as_str())
            })();
            if placed.is_err() {
                let _ = unlinkat(&holder, temporary.as_str(), AtFlags::empty());
            }
            placed
        });
        made.map_err(|errno| self.failure(names, errno))
    }

    fn open_file(&mut self, names: &[String], entry: &Entry) -> Result<(), CliError> {
        let name = names.last().ok_or_else(|| self.failure(names, Errno::ISDIR))?;
        let temporary = temporary_name();
        let opened = self.holder(names).and_then(|holder| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = openat(&holder, temporary.as_str(), flags, Mode::RUSR | Mode::WUSR)?;
            Ok((holder, file))
        });
        let (holder, file) = opened.map_err(|errno| self.failure(names, errno))?;
        self.open = Some(OpenFile {
            directory: holder,
            temporary,
            name: name.clone(),
            file: file.into(),
            entry: entry.clone(),
        });
        Ok(())
    }
}

impl EntrySink for LocalTree {
    fn begin(&mut self, entry: &Entry) -> Result<(), CliError> {
        let names = self.names(entry);
        match &entry.kind {
            EntryKind::Directory => self.make_directory(names, entry),
            EntryKind::Link { target } => self.make_link(&names, target, entry),
            EntryKind::File { .. } => self.open_file(&names, entry),
        }
    }

    fn data(&mut self, bytes: &[u8]) -> Result<(), CliError> {
        let Some(open) = self.open.as_mut() else {
            return Err(CliError::Protocol(
                "content for something that is not a file".to_owned(),
            ));
        };
        open.file.write_all(bytes).map_err(|failure| {
            CliError::io(
                format!("cannot write {} below {}", open.name, self.shown.display()),
                failure,
            )
        })
    }

    fn end(&mut self) -> Result<(), CliError> {
        let Some(open) = self.open.as_ref() else {
            return Ok(());
        };
        let placed = (|| {
            let (file, entry) = (open.file.as_fd(), &open.entry);
            if self.owners {
                let (uid, gid) = owner(entry);
                fchown(file, uid, gid)?;
            }
            fchmod(file, Mode::from_raw_mode(entry.mode))?;
            futimens(file, &times(entry))?;
            renameat(
                &open.directory,
                open.temporary.as_str(),
                &open.directory,
                open.name.as_str(),
            )
        })();
        let name = open.name.clone();
        placed.map_err(|errno| {
            CliError::io(
                format!("cannot write {name} below {}", self.shown.display()),
                errno.into(),
            )
        })?;
        self.open = None;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), CliError> {
        // Deepest first: setting a mode or time inside changes the directory above.
        for (names, entry) in std::mem::take(&mut self.directories).into_iter().rev() {
            let Some(name) = names.last() else { continue };
            let set = self.holder(&names).and_then(|holder| {
                let here = openat(
                    &holder,
                    name.as_str(),
                    DIRECTORY | OFlags::NOFOLLOW,
                    Mode::empty(),
                )?;
                if self.owners {
                    let (uid, gid) = owner(&entry);
                    fchown(&here, uid, gid)?;
                }
                fchmod(&here, Mode::from_raw_mode(entry.mode))?;
                futimens(&here, &times(&entry))
            });
            set.map_err(|errno| self.failure(&names, errno))?;
        }
        Ok(())
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        // After the rename this name is gone and the call does nothing.
        let _ = unlinkat(&self.directory, self.temporary.as_str(), AtFlags::empty());
    }
}

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

fn directory(path: &Path) -> Result<OwnedFd, CliError> {
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    openat(CWD, path, DIRECTORY, Mode::empty()).map_err(|errno| {
        CliError::io(
            format!("cannot open the directory {}", path.display()),
            errno.into(),
        )
    })
}

fn temporary_name() -> String {
    format!(".hypeman-cp-{:016x}", rand::random::<u64>())
}

fn owner(entry: &Entry) -> (Option<Uid>, Option<Gid>) {
    (Some(Uid::from_raw(entry.uid)), Some(Gid::from_raw(entry.gid)))
}

fn times(entry: &Entry) -> Timestamps {
    let time = Timespec {
        tv_sec: entry.mtime,
        tv_nsec: 0,
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}
