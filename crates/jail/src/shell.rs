//! What all jails have in common: a mount namespace with the system's programs and libraries in it, and nothing else.
//!
//! Made once and kept by its descriptor. A start enters it and takes a copy. So no start has to let go of the host's
//! root, which makes it wait until all processors have noticed: up to 20 ms on a busy host.
//!
//! Invariant: nothing in it can be written to, and from nothing in it does a path lead to the host's root.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::thread::UnshareFlags;

use crate::system::{set_mount_attributes, unshare};
use crate::{Access, JailError};

/// Directories of programs and libraries; some are links into others.
const SYSTEM: [&str; 7] = ["/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin"];
/// What the dynamic linker looks at, and where distributions without `/usr` keep everything.
const BESIDE: [&str; 4] = [
    "/etc/ld.so.cache",
    "/etc/alternatives",
    "/nix/store",
    "/gnu/store",
];

/// The shell, and the directories at the top of it that a jail may fill.
#[derive(Debug)]
pub(crate) struct Shell {
    namespace: OwnedFd,
    tops: Vec<PathBuf>,
    shown: Vec<PathBuf>,
}

impl Shell {
    /// Makes one with empty directories at `tops`. `scratch` is a directory of ours to make it at.
    pub(crate) fn make(tops: &[PathBuf], scratch: &Path) -> Result<Self, JailError> {
        let (tops, scratch) = (tops.to_vec(), scratch.to_owned());
        // A thread of its own, because it never comes back from where it goes.
        let builder = std::thread::Builder::new().name("jail-shell".to_owned());
        let thread = builder
            .spawn(move || build(tops, &scratch))
            .map_err(|error| JailError::io("cannot start a thread", error))?;
        thread.join().unwrap_or_else(|_| {
            Err(JailError::Unavailable(
                "the jail's shell could not be made".to_owned(),
            ))
        })
    }

    /// Its mount namespace.
    pub(crate) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Whether jails may have files below these directories.
    pub(crate) fn has_tops(&self, tops: &[PathBuf]) -> bool {
        tops.iter().all(|top| self.tops.contains(top))
    }

    /// Whether this path is in it already, for reading and executing.
    pub(crate) fn shows(&self, path: &Path) -> bool {
        self.shown.iter().any(|shown| path.starts_with(shown))
    }

    /// The directories at the top that it offers.
    pub(crate) fn tops(&self) -> &[PathBuf] {
        &self.tops
    }
}

/// The first directory of a path, `/srv` of `/srv/a/b`.
pub(crate) fn top_of(path: &Path) -> PathBuf {
    let first = path
        .components()
        .find(|part| matches!(part, Component::Normal(_)));
    Path::new("/").join(first.map_or(Path::new(""), |part| Path::new(part.as_os_str())))
}

/// Whether everything below a top is the system's anyway.
pub(crate) fn is_system(top: &Path) -> bool {
    SYSTEM.iter().any(|system| top == Path::new(system))
}

fn build(tops: Vec<PathBuf>, scratch: &Path) -> Result<Shell, JailError> {
    let failed = |context: &str| {
        let context = context.to_owned();
        move |error: rustix::io::Errno| JailError::io(context, error)
    };
    unshare(UnshareFlags::FS | UnshareFlags::NEWNS)
        .map_err(|error| JailError::io("cannot make a mount namespace", error))?;
    // Before /proc is out of sight.
    let namespace = File::open("/proc/thread-self/ns/mnt")
        .map_err(|error| JailError::io("cannot hold a mount namespace", error))?;
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(failed("cannot make mounts private"))?;

    let root = temporary("1m", MountAttrFlags::MOUNT_ATTR_NODEV)?;
    attach(root.as_fd(), scratch).map_err(|error| JailError::io("cannot mount an empty root", error))?;
    let inside = |path: &Path| scratch.join(path.strip_prefix("/").unwrap_or(path));
    let mut shown = Vec::new();
    for path in SYSTEM.iter().map(Path::new) {
        let Ok(about) = fs::symlink_metadata(path) else {
            continue;
        };
        let target = inside(path);
        let copied = if about.is_symlink() {
            fs::read_link(path).and_then(|link| std::os::unix::fs::symlink(link, &target))
        } else {
            fs::create_dir(&target).and_then(|()| show(path, &target, Access::Run))
        };
        copied.map_err(|error| JailError::io(format!("cannot show {}", path.display()), error))?;
        shown.push(path.to_owned());
    }
    for path in BESIDE.iter().map(Path::new).filter(|path| path.exists()) {
        let target = inside(path);
        make_place(&target, path.is_dir())
            .and_then(|()| show(path, &target, Access::Run))
            .map_err(|error| JailError::io(format!("cannot show {}", path.display()), error))?;
        shown.push(path.to_owned());
    }
    let places = ["/proc", "/dev"].map(Path::new);
    let free = tops.iter().map(PathBuf::as_path).filter(|top| !is_system(top));
    for top in places.into_iter().chain(free) {
        fs::create_dir_all(inside(top))
            .map_err(|error| JailError::io(format!("cannot make {}", top.display()), error))?;
    }
    rustix::mount::mount_remount(
        scratch,
        rustix::mount::MountFlags::BIND
            | rustix::mount::MountFlags::RDONLY
            | rustix::mount::MountFlags::NODEV
            | rustix::mount::MountFlags::NOSUID,
        c"",
    )
    .map_err(failed("cannot make the root read-only"))?;

    rustix::process::chdir(scratch).map_err(failed("cannot enter the root"))?;
    rustix::process::pivot_root(".", ".").map_err(failed("cannot change the root"))?;
    rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(failed("cannot let go of the host's root"))?;
    Ok(Shell {
        namespace: namespace.into(),
        tops,
        shown,
    })
}

/// An empty file system in memory, mounted nowhere yet.
pub(crate) fn temporary(size: &str, attributes: MountAttrFlags) -> Result<OwnedFd, JailError> {
    let make = || -> rustix::io::Result<OwnedFd> {
        let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        rustix::mount::fsconfig_set_string(context.as_fd(), "size", size)?;
        rustix::mount::fsconfig_set_string(context.as_fd(), "mode", "0755")?;
        rustix::mount::fsconfig_create(context.as_fd())?;
        rustix::mount::fsmount(
            context.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            attributes | MountAttrFlags::MOUNT_ATTR_NOSUID,
        )
    };
    make().map_err(|error| JailError::io("cannot make a file system in memory", error))
}

/// Puts a mount at its place.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: &Path) -> io::Result<()> {
    Ok(rustix::mount::move_mount(
        mount,
        "",
        CWD,
        target,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?)
}

/// Takes hold of a file or directory, to be shown with this access wherever it is attached.
pub(crate) fn hold(path: &Path, access: Access) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let tree = rustix::mount::open_tree(CWD, path, flags)?;
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&tree)?.st_mode);
    if kind == FileType::Symlink {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is a symbolic link",
        ));
    }
    let always = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    set_mount_attributes(
        tree.as_fd(),
        always
            | match access {
                Access::Read => libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC,
                Access::Run => libc::MOUNT_ATTR_RDONLY,
                Access::Write => libc::MOUNT_ATTR_NOEXEC,
            },
    )?;
    Ok(tree)
}

fn show(path: &Path, target: &Path, access: Access) -> io::Result<()> {
    attach(hold(path, access)?.as_fd(), target)
}

/// Makes a file or directory to mount on, and what leads to it.
pub(crate) fn make_place(target: &Path, is_directory: bool) -> io::Result<()> {
    if is_directory {
        return fs::create_dir_all(target);
    }
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    File::options().create(true).append(true).open(target).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_of_a_path_is_its_first_directory() {
        assert_eq!(top_of(Path::new("/srv/a/b")), Path::new("/srv"));
        assert_eq!(top_of(Path::new("/run")), Path::new("/run"));
        assert!(is_system(Path::new("/usr")) && !is_system(Path::new("/srv")));
    }
}
