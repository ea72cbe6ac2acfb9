//! Sockets of VMMs: waiting for one that a starting VMM makes by itself, and connecting to nothing else.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::Mode;
use tokio::net::UnixStream;

use crate::own_directory::hold_socket;
use crate::{VmmError, files::io_error};

/// The first pause; a VMM that takes longer is looked at less often.
const SOON: Duration = Duration::from_micros(500);
const SELDOM: Duration = Duration::from_millis(20);

/// Connects to a socket in a directory that a VMM may own. Never to one elsewhere to which a link of the VMM leads.
///
/// # Errors
/// Nobody listens, or there is no socket.
pub async fn connect_to_vmm(socket: &Path) -> io::Result<UnixStream> {
    let held = hold_socket(socket)?;
    UnixStream::connect(format!("/proc/self/fd/{}", held.as_raw_fd())).await
}

/// Lets a VMM with a user of its own connect to our socket. Only the VMM and we can enter the directory.
pub(crate) fn open_to_vmm(socket: &Path) -> io::Result<()> {
    let held = hold_socket(socket)?;
    let everybody = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
    Ok(rustix::fs::chmod(
        format!("/proc/self/fd/{}", held.as_raw_fd()),
        everybody,
    )?)
}

/// Resolves once somebody accepts connections. The name of a socket appears before it does, so connections are tried.
pub(crate) async fn until_it_listens(socket: &Path, deadline: Duration) -> Result<(), VmmError> {
    let attempts = async {
        let mut pause = SOON;
        loop {
            match connect_to_vmm(socket).await {
                Ok(_) => return Ok(()),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    ) => {}
                Err(error) => return Err(io_error("cannot connect to", socket)(error)),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(SELDOM);
        }
    };
    match tokio::time::timeout(deadline, attempts).await {
        Ok(outcome) => outcome,
        Err(_) => Err(VmmError::Unresponsive {
            command: "connect".to_owned(),
            after: deadline,
        }),
    }
}
