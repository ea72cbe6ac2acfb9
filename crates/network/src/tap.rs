//! Creation of persistent TAPs, the one thing here that the kernel offers by `ioctl` only.
//!
//! A TAP comes into being with [`Tap::create`] and vanishes with the value unless [`Tap::persist`] was called:
//! that is the moment at which it is finished and may outlive us.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_short, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;

use crate::error::NetworkError;

/// The device through which TAPs are made.
pub(crate) const TUN_DEVICE: &str = "/dev/net/tun";

/// A TAP that is attached to us.
#[derive(Debug)]
pub(crate) struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Creates the TAP `name`, or takes hold of one that nobody else holds. Header offloads are left to whoever
    /// opens it next (the VMM).
    pub(crate) fn create(name: &str) -> Result<Self, NetworkError> {
        crate::options::check_interface_name("tap", name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(TUN_DEVICE)
            .map_err(|source| {
                NetworkError::kernel(format!("open {TUN_DEVICE} (is the tun module loaded?)"), source)
            })?;
        // SAFETY: ifreq is plain integers and a union of such; all zeros is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *slot = libc::c_char::from_ne_bytes([byte]);
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = c_short::try_from(flags)
            .map_err(|_| NetworkError::Invalid("TAP flags do not fit the kernel's field".into()))?;
        // SAFETY: the descriptor is open, and TUNSETIFF reads and writes one ifreq, which lives on.
        let code = unsafe {
            libc::ioctl(
                file.as_raw_fd(),
                libc::TUNSETIFF as c_ulong as _,
                &raw mut request,
            )
        };
        check(code, || format!("create the TAP {name}"))?;
        Ok(Self {
            file,
            name: name.to_owned(),
        })
    }

    /// Lets the TAP outlive this process.
    pub(crate) fn persist(self) -> Result<(), NetworkError> {
        let on: c_int = 1;
        // SAFETY: the descriptor is open, and TUNSETPERSIST takes its argument by value.
        let code = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETPERSIST as c_ulong as _, on) };
        check(code, || format!("keep the TAP {}", self.name))
    }
}

#[cfg(test)]
impl Tap {
    /// The descriptor, for tests that play the VMM.
    pub(crate) fn into_file(self) -> File {
        self.file
    }
}

fn check(code: c_int, action: impl FnOnce() -> String) -> Result<(), NetworkError> {
    if code < 0 {
        return Err(NetworkError::kernel(action(), io::Error::last_os_error()));
    }
    Ok(())
}
