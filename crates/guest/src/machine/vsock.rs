//! Machines with a vsock device (Cloud Hypervisor, Firecracker): the channel, which the host opens, and connections to
//! the host.
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

/// A socket that never blocks.
fn socket() -> io::Result<OwnedFd> {
    // SAFETY: a plain system call on integers; the descriptor that it returns belongs to nobody else.
    unsafe {
        let descriptor = libc::socket(
            libc::AF_VSOCK,
            libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC,
            0,
        );
        match descriptor {
            ..0 => Err(io::Error::last_os_error()),
            _ => Ok(OwnedFd::from_raw_fd(descriptor)),
        }
    }
}

/// `bind` or `connect`.
type AddressCall = unsafe extern "C" fn(libc::c_int, *const libc::sockaddr, libc::socklen_t) -> libc::c_int;

fn with_address(socket: &OwnedFd, call: AddressCall, cid: u32, port: u32) -> io::Result<()> {
    // SAFETY: a structure of integers, and a system call that reads it while it lives.
    unsafe {
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = cid;
        address.svm_port = port;
        let length = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        match call(socket.as_raw_fd(), (&raw const address).cast(), length) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Begins to connect to a port of the host: the socket can be written once it is connected.
pub(super) fn dial(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    match with_address(&socket, libc::connect, libc::VMADDR_CID_HOST, port) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Accepts connections of the host.
pub(super) struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    pub(super) fn bind() -> io::Result<Listener> {
        let socket = socket()?;
        with_address(&socket, libc::bind, libc::VMADDR_CID_ANY, AGENT_VSOCK_PORT)?;
        rustix::net::listen(&socket, 16)?;
        Ok(Listener(asynchronous(socket)?))
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
