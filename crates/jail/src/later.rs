//! Shows a process that is in its jail one more thing: a disk that is attached while its machine runs.
//!
//! The thing is taken hold of in the host's view and attached in the jail's, by a thread that goes there and never comes
//! back. The process has no part in it.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use rustix::fs::Mode;
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
    let place = File::open(format!("/proc/{process}/ns/mnt")).map_err(failed)?;
    let ours = std::fs::metadata("/proc/thread-self/ns/mnt").map_err(failed)?;
    if place.metadata().map_err(failed)?.ino() == ours.ino() {
        return Ok(());
    }
    let about = std::fs::metadata(format!("/proc/{process}")).map_err(failed)?;
    let ids = Ids {
        uid: about.uid(),
        gid: about.gid(),
    };
    let held = take(show, ids)?;
    let work = move || -> io::Result<()> {
        unshare(UnshareFlags::FS)?;
        move_into_link_name_space(place.as_fd(), Some(LinkNameSpaceType::Mount))?;
        // The process must get through what is made here, whatever the mask that the server was started with.
        rustix::process::umask(Mode::WGRP | Mode::WOTH);
        make_place(&held.path, held.is_directory)?;
        attach(held.tree.as_fd(), &held.path)
    };
    let thread = std::thread::Builder::new()
        .name("jail-later".to_owned())
        .spawn(work);
    let thread = thread.map_err(failed)?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("it failed")))
        .map_err(failed)
}
