//! Shows a process that is in its jail one more thing, and hides it again: a disk that is attached while its machine runs,
//! and taken away.
//!
//! ```text
//!  show: hold it in the host's view ─► a thread goes into the jail's view ─► a place ─► attached there
//!  hide:                               a thread goes into the jail's view ─► detached; the place stays, empty
//! ```
//!
//! The thread never comes back. The process has no part in it.
//!
//! Invariant: nothing is removed. A place may lie in a directory that is shown, where its name is a file of the host.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::Mode;
use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::shell::{attach, make_place};
use crate::stage::take;
use crate::system::unshare;
use crate::user::Ids;
use crate::{JailError, Show};

/// Shows it to the process, unless that sees the host's files anyway. The caller makes sure that the number is still
/// the process's, before and after.
///
/// # Errors
/// The thing cannot be shown, or the process is gone.
pub fn show_to(process: u32, show: &Show) -> Result<(), JailError> {
    let failed = |error: io::Error| JailError::io(format!("cannot show {}", show.path.display()), error);
    let Some(view) = view_of(process).map_err(failed)? else {
        return Ok(());
    };
    let about = std::fs::metadata(format!("/proc/{process}")).map_err(failed)?;
    let ids = Ids {
        uid: about.uid(),
        gid: about.gid(),
    };
    let held = take(show, ids)?;
    let work = move || -> io::Result<()> {
        // The process must get through what is made here, whatever the mask that the server was started with.
        rustix::process::umask(Mode::WGRP | Mode::WOTH);
        make_place(&held.path, held.is_directory)?;
        attach(held.tree.as_fd(), &held.path)
    };
    inside(view, work).map_err(failed)
}

/// Takes from the process's sight what [`show_to`] showed it last at this path, unless it sees the host's files anyway.
/// What it has open it keeps, and an empty place of that name is left. Rights on the file itself stay as they
/// were given: its user belongs to this process alone, which no longer finds it. The caller makes sure that the number is
/// still the process's, before and after.
///
/// # Errors
/// Nothing is shown at this path, or the process is gone.
pub fn hide_from(process: u32, path: &Path) -> Result<(), JailError> {
    let failed = |error: io::Error| JailError::io(format!("cannot hide {}", path.display()), error);
    let Some(view) = view_of(process).map_err(failed)? else {
        return Ok(());
    };
    let path = path.to_owned();
    // No link is followed, and what is not mounted is refused by the kernel.
    let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
    let work = move || -> io::Result<()> { Ok(rustix::mount::unmount(&path, flags)?) };
    inside(view, work).map_err(failed)
}

/// What the process sees of files, where that is not what the host does.
fn view_of(process: u32) -> io::Result<Option<File>> {
    let view = File::open(format!("/proc/{process}/ns/mnt"))?;
    let ours = std::fs::metadata("/proc/thread-self/ns/mnt")?;
    Ok((view.metadata()?.ino() != ours.ino()).then_some(view))
}

/// Does it in that view.
fn inside(view: File, work: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    let thread = std::thread::Builder::new().name("jail-later".to_owned());
    let thread = thread.spawn(move || -> io::Result<()> {
        unshare(UnshareFlags::FS)?;
        move_into_link_name_space(view.as_fd(), Some(LinkNameSpaceType::Mount))?;
        work()
    })?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("it failed")))
}
