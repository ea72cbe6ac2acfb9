//! A program to start, and what comes of it.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use crate::{Report, filter};

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
    /// What it asks us for while it starts.
    pub lent: Option<Lent>,
}

/// Something that a process may not open itself, and gets from us when it asks. Afterwards nobody answers.
#[derive(Debug)]
pub enum Lent {
    /// Memory that it maps privately.
    Memory(Memory),
    /// Its network card on the host's side.
    Tap(Tap),
}

impl Lent {
    /// The filter by which the process asks for it.
    pub(crate) fn filter(&self) -> Vec<libc::sock_filter> {
        match self {
            Self::Memory(_) => filter::ask_about_open(),
            Self::Tap(_) => filter::ask_about_tap(),
        }
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        match self {
            Self::Memory(memory) => memory.path.display().to_string(),
            Self::Tap(tap) => format!("the TAP {}", tap.name),
        }
    }
}

/// A TAP of the host's network, for a process that sees an empty one and opens its TAP by name.
#[derive(Debug)]
pub struct Tap {
    /// Its name.
    pub name: String,
    /// A descriptor that is attached to it.
    pub file: File,
    /// Once attached, the process asks for its address, its flags and, at last, its MTU.
    pub described: bool,
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
