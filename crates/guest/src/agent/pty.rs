//! Pseudo terminals.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
};

use rustix::{
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

/// Both ends of a new terminal: ours, and the one for programs.
pub(crate) fn open(rows: u16, columns: u16) -> io::Result<(OwnedFd, File, std::path::PathBuf)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?;
    let path = std::path::PathBuf::from(std::ffi::OsStr::from_bytes(name.as_bytes()));
    let slave = {
        use std::os::unix::fs::OpenOptionsExt;
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY)
            .open(&path)?
    };
    resize(&master, rows, columns)?;
    Ok((master, slave, path))
}

/// Changes the size; programs get `SIGWINCH`.
pub(crate) fn resize(master: impl std::os::fd::AsFd, rows: u16, columns: u16) -> io::Result<()> {
    Ok(tcsetwinsize(
        master,
        Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        },
    )?)
}
