//! A program to start, and what comes of it.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::Report;

/// A program to start in a jail, and what it gets from us.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The program, where it is on the host.
    pub program: &'a Path,
    /// Its arguments.
    pub arguments: &'a [OsString],
    /// Its working directory, in the jail.
    pub directory: &'a Path,
    /// Receives standard output and standard error.
    pub output: BorrowedFd<'a>,
    /// Descriptors that it keeps, under the numbers that they have here.
    pub keep: &'a [OwnedFd],
    /// Memory that it maps privately.
    pub memory: Option<Memory>,
}

/// A file that the process gets opened for reading when it asks for this path for reading and writing and with no other
/// flag, as QEMU does with what it will only map privately. The file itself is not in the jail.
#[derive(Debug)]
pub struct Memory {
    /// What it asks for.
    pub path: PathBuf,
    /// What it gets.
    pub file: File,
}

/// A process in its jail.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confined {
    /// Its process id. The caller reaps it.
    pub pid: u32,
    /// What is in force.
    pub report: Report,
}
