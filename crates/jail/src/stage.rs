//! Puts a thread where its child is to be born: into a copy of the shell with what one machine needs, and into empty
//! namespaces.
//!
//! ```text
//!  the host's view              the shell's copy
//!  hold each file, grant it ─►  an empty file system at each top ─► places ─► each file at its place ─► devices
//! ```
//!
//! Invariant: places are made in file systems of this jail alone, never in a directory that it shows.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::mount::MountAttrFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::shell::{Shell, attach, hold, is_system, make_place, temporary, top_of};
use crate::system::unshare;
use crate::user::{Ids, User};
use crate::{Access, Grant, Item, JailError, JailSpec, Show};

/// Devices that every process may have.
const COMMON: [&str; 5] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
];
/// What a jail sees as the name of its host.
const HOST_NAME: &[u8] = b"hypeman";

/// Something that was taken from the host's view.
pub(crate) struct Held {
    pub(crate) path: PathBuf,
    pub(crate) tree: OwnedFd,
    pub(crate) is_directory: bool,
}

/// A device that the host has.
struct Device {
    path: PathBuf,
    number: u64,
    everybody: bool,
}

/// The directories at the top that a specification needs.
pub(crate) fn tops(spec: &JailSpec) -> Vec<PathBuf> {
    let mut tops: Vec<PathBuf> = spec
        .show
        .iter()
        .map(|show| top_of(&show.path))
        .filter(|top| !is_system(top))
        .collect();
    tops.sort();
    tops.dedup();
    tops
}

/// Takes the calling thread there for good. `items`: the namespaces that this host has.
pub(crate) fn enter(shell: &Shell, spec: &JailSpec, user: &User, items: &[Item]) -> Result<(), JailError> {
    let mut shown: Vec<&Show> = spec
        .show
        .iter()
        .filter(|show| show.access == Access::Write || !shell.shows(&show.path))
        .collect();
    // What contains comes before what it contains.
    shown.sort_by_key(|show| show.path.components().count());
    let held = shown
        .into_iter()
        .map(|show| take(show, user.ids()))
        .collect::<Result<Vec<_>, _>>()?;
    let devices = devices(&spec.devices)?;

    let namespace = |what: &str| {
        let context = format!("cannot enter {what}");
        move |error: io::Error| JailError::io(context, error)
    };
    unshare(UnshareFlags::FS).map_err(namespace("a place of its own"))?;
    move_into_link_name_space(shell.namespace(), Some(LinkNameSpaceType::Mount))
        .map_err(|error| namespace("the shell")(error.into()))?;
    unshare(UnshareFlags::NEWNS).map_err(namespace("a mount namespace"))?;
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    place(shell, spec, &held)?;
    place_devices(&devices, user)?;

    let mut flags = UnshareFlags::empty();
    for (item, flag) in [
        (Item::NetworkNamespace, UnshareFlags::NEWNET),
        (Item::IpcNamespace, UnshareFlags::NEWIPC),
        (Item::UtsNamespace, UnshareFlags::NEWUTS),
    ] {
        if items.contains(&item) {
            flags |= flag;
        }
    }
    unshare(flags).map_err(namespace("empty namespaces"))?;
    if flags.contains(UnshareFlags::NEWUTS) {
        rustix::system::sethostname(HOST_NAME).map_err(|error| namespace("a host name")(error.into()))?;
    }
    Ok(())
}

/// Gives the jail's user its rights and takes hold of what is shown.
pub(crate) fn take(show: &Show, user: Ids) -> Result<Held, JailError> {
    let failed = |error| JailError::io(format!("cannot show {}", show.path.display()), error);
    grant(show, user).map_err(failed)?;
    let tree = hold(&show.path, show.access).map_err(failed)?;
    let about = rustix::fs::fstat(&tree).map_err(|error| failed(error.into()))?;
    Ok(Held {
        path: show.path.clone(),
        tree,
        is_directory: FileType::from_raw_mode(about.st_mode) == FileType::Directory,
    })
}

fn grant(show: &Show, user: Ids) -> io::Result<()> {
    if show.grant == Grant::Nothing {
        return Ok(());
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(&show.path, flags, Mode::empty())?;
    let about = rustix::fs::fstat(&file)?;
    let mode = Mode::from_raw_mode(about.st_mode);
    let is_directory = FileType::from_raw_mode(about.st_mode) == FileType::Directory;
    let everybody = if is_directory {
        Mode::ROTH | Mode::XOTH
    } else {
        Mode::ROTH
    };
    if show.grant == Grant::Group && mode.contains(everybody) {
        return Ok(());
    }
    let (uid, gid, wanted) = match show.grant {
        Grant::Owner => (Some(user.uid), None, mode),
        _ => {
            let search = if is_directory { Mode::XGRP } else { Mode::empty() };
            (None, Some(user.gid), mode | Mode::RGRP | search)
        }
    };
    // Only what differs is changed: a change voids what is remembered of a file's content.
    if uid.is_some_and(|uid| uid != about.st_uid) || gid.is_some_and(|gid| gid != about.st_gid) {
        let (uid, gid) = (uid.map(Uid::from_raw), gid.map(Gid::from_raw));
        rustix::fs::chownat(&file, "", uid, gid, AtFlags::EMPTY_PATH)?;
    }
    if wanted != mode {
        // Modes are changed by name only; this one cannot be another file's.
        rustix::fs::chmod(format!("/proc/thread-self/fd/{}", number(&file)), wanted)?;
    }
    Ok(())
}

fn number(file: &OwnedFd) -> i32 {
    std::os::fd::AsRawFd::as_raw_fd(file)
}

fn devices(wanted: &[PathBuf]) -> Result<Vec<Device>, JailError> {
    let mut devices = Vec::new();
    for path in COMMON.iter().map(PathBuf::from).chain(wanted.iter().cloned()) {
        let about = match rustix::fs::stat(&path) {
            Ok(about) => about,
            Err(rustix::io::Errno::NOENT) => continue,
            Err(error) => return Err(JailError::io(format!("cannot look at {}", path.display()), error)),
        };
        if FileType::from_raw_mode(about.st_mode) == FileType::CharacterDevice {
            devices.push(Device {
                everybody: COMMON.iter().any(|common| path == Path::new(common)),
                number: about.st_rdev,
                path,
            });
        }
    }
    Ok(devices)
}

fn place(shell: &Shell, spec: &JailSpec, held: &[Held]) -> Result<(), JailError> {
    for top in tops(spec) {
        if !shell.tops().contains(&top) {
            return Err(JailError::Invalid(format!("the shell has no {}", top.display())));
        }
        let empty = temporary(
            "256k",
            MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC,
        )?;
        attach(empty.as_fd(), &top)
            .map_err(|error| JailError::io(format!("cannot mount {}", top.display()), error))?;
    }
    for (at, held_one) in held.iter().enumerate() {
        let path = &held_one.path;
        let failed = |error| JailError::io(format!("cannot place {}", path.display()), error);
        let contained = held[..at].iter().any(|other| path.starts_with(&other.path));
        // What lies in something shown is there already.
        if !contained && !is_system(&top_of(path)) {
            make_place(path, held_one.is_directory).map_err(failed)?;
        }
        attach(held_one.tree.as_fd(), path).map_err(failed)?;
    }
    Ok(())
}

fn place_devices(devices: &[Device], user: &User) -> Result<(), JailError> {
    let empty = temporary("64k", MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
    attach(empty.as_fd(), Path::new("/dev")).map_err(|error| JailError::io("cannot mount /dev", error))?;
    for device in devices {
        let make = || -> io::Result<()> {
            if let Some(parent) = device.path.parent() {
                fs::create_dir_all(parent)?;
            }
            let mode = Mode::from_raw_mode(if device.everybody { 0o666 } else { 0o600 });
            rustix::fs::mknodat(CWD, &device.path, FileType::CharacterDevice, mode, device.number)?;
            rustix::fs::chmod(&device.path, mode)?;
            if !device.everybody {
                let (uid, gid) = (Some(Uid::from_raw(user.uid)), Some(Gid::from_raw(user.gid)));
                rustix::fs::chown(&device.path, uid, gid)?;
            }
            Ok(())
        };
        make().map_err(|error| JailError::io(format!("cannot make {}", device.path.display()), error))?;
    }
    Ok(())
}
