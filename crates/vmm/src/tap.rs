//! Opens a TAP for a VMM that sees no network.
//!
//! In the same way as the VMM itself would, because what a network card can do depends on it, and that is part of a
//! captured machine.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use crate::VmmError;

/// Attaches to the TAP of this name.
pub(crate) fn open(name: &str) -> Result<OwnedFd, VmmError> {
    attach(name).map_err(VmmError::io(format!("cannot open the TAP {name}")))
}

fn attach(name: &str) -> io::Result<OwnedFd> {
    let device = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: a structure of numbers and characters, in which zeros are the absence of everything.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the name is too long",
        ));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let mut features: libc::c_uint = 0;
    // SAFETY: the kernel writes one number.
    let asked = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNGETFEATURES, &raw mut features) };
    let optional = if asked == 0 { features as libc::c_int } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | optional & (libc::IFF_ONE_QUEUE | libc::IFF_VNET_HDR);
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: the kernel reads and writes one whole structure.
    let attached = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    match attached {
        0 => Ok(device.into()),
        _ => Err(io::Error::last_os_error()),
    }
}
