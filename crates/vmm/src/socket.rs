//! Sockets of VMMs: one that a VMM inherits, waiting for one that it makes by itself, the way to the guest, and no way
//! elsewhere.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::Duration;

use rustix::fs::Mode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::files::{io_error, remove_if_there};
use crate::own_directory::hold_socket;
use crate::{AgentChannel, VmmError};

/// The first pause; a VMM that takes longer is looked at less often.
const SOON: Duration = Duration::from_micros(500);
const SELDOM: Duration = Duration::from_millis(20);

/// Connects to a socket in a directory that a VMM may own. Never to one elsewhere to which a link of the VMM leads.
///
/// # Errors
/// Nobody listens, or there is no socket.
pub(crate) async fn connect_to_vmm(socket: &Path) -> io::Result<UnixStream> {
    let held = hold_socket(socket)?;
    UnixStream::connect(format!("/proc/self/fd/{}", held.as_raw_fd())).await
}

impl AgentChannel {
    /// Connects to the guest's agent, as far as the VMM goes.
    ///
    /// # Errors
    /// The VMM does not listen, or nobody in the guest does.
    pub async fn connect(&self) -> io::Result<UnixStream> {
        match self {
            Self::SerialSocket(path) => UnixStream::connect(path).await,
            Self::VsockSocket { path, port } => {
                let mut stream = connect_to_vmm(path).await?;
                stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
                // `OK <port>\n`, read bytewise so that nothing behind it is swallowed.
                let mut answer = Vec::new();
                while answer.last() != Some(&b'\n') && answer.len() < 64 {
                    answer.push(stream.read_u8().await?);
                }
                if answer.starts_with(b"OK ") {
                    Ok(stream)
                } else {
                    Err(io::ErrorKind::ConnectionRefused.into())
                }
            }
        }
    }
}

/// Makes a socket for a VMM to inherit: calls wait in its queue from the first instant.
pub(crate) fn listen_for_vmm(socket: &Path) -> Result<OwnedFd, VmmError> {
    remove_if_there(socket).map_err(io_error("cannot remove", socket))?;
    UnixListener::bind(socket)
        .map(OwnedFd::from)
        .map_err(io_error("cannot listen on", socket))
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
        Err(_) => Err(VmmError::unresponsive("connect", deadline)),
    }
}
