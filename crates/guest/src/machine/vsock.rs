//! The channel on machines with a vsock device (Cloud Hypervisor, Firecracker).
#![allow(unsafe_code)]

use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
};

use hypeman_guest_api::AGENT_VSOCK_PORT;
use tokio::io::unix::AsyncFd;

use crate::agent::{FdStream, asynchronous};

/// Virtio's number for socket devices, as sysfs writes it.
const VIRTIO_SOCKET: &str = "0x0013";

/// Whether the machine has such a device; the kernel's modules are loaded by now.
pub(super) fn is_present() -> bool {
    let Ok(devices) = fs::read_dir("/sys/bus/virtio/devices") else {
        return false;
    };
    devices.flatten().any(|entry| {
        fs::read_to_string(entry.path().join("device")).is_ok_and(|id| id.trim() == VIRTIO_SOCKET)
    })
}

/// Accepts connections of the host.
pub(super) struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    pub(super) fn bind() -> io::Result<Listener> {
        // SAFETY: plain system calls on integers and a structure that lives through the call; the descriptor
        // that `socket` returns belongs to nobody else.
        unsafe {
            let descriptor = libc::socket(
                libc::AF_VSOCK,
                libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
                0,
            );
            if descriptor < 0 {
                return Err(io::Error::last_os_error());
            }
            let descriptor = OwnedFd::from_raw_fd(descriptor);
            let mut address: libc::sockaddr_vm = std::mem::zeroed();
            address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
            address.svm_cid = libc::VMADDR_CID_ANY;
            address.svm_port = AGENT_VSOCK_PORT;
            let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
            if libc::bind(descriptor.as_raw_fd(), (&raw const address).cast(), length) < 0
                || libc::listen(descriptor.as_raw_fd(), 16) < 0
            {
                return Err(io::Error::last_os_error());
            }
            Ok(Listener(asynchronous(descriptor)?))
        }
    }

    pub(super) async fn accept(&self) -> io::Result<FdStream> {
        loop {
            let mut guard = self.0.readable().await?;
            let accepted = guard.try_io(|listener| {
                Ok(rustix::net::accept_with(
                    listener.get_ref().as_fd(),
                    rustix::net::SocketFlags::CLOEXEC,
                )?)
            });
            match accepted {
                Ok(stream) => return FdStream::new(stream?),
                Err(_would_block) => {}
            }
        }
    }
}
