//! `hypeman.log`: what the server did with an instance, a line each, for its owner to read.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

/// Appends lines; a failure to log never fails what is logged.
#[derive(Debug)]
pub(crate) struct ActionLog {
    path: PathBuf,
    file: Option<File>,
}

impl ActionLog {
    pub(crate) fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            file: None,
        }
    }

    pub(crate) fn line(&mut self, message: &str) {
        if self.file.is_none() {
            self.file = OpenOptions::new()
                .create(true)
                .append(true)
                .mode(0o600)
                .open(&self.path)
                .ok();
        }
        let one_line = message.replace(['\n', '\r'], " ");
        if let Some(file) = self.file.as_mut()
            && writeln!(file, "{} {one_line}", Timestamp::now()).is_err()
        {
            self.file = None;
        }
    }

    /// Continues in a fresh file after the current one was renamed.
    pub(crate) fn reopen(&mut self) {
        self.file = None;
    }
}
