//! Finds the file that a command's first word means.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, access};

/// Where commands are looked for when the environment does not say.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Result of a search.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lookup {
    /// This file.
    Found(PathBuf),
    /// Nothing of that name (exit code 127).
    NotFound,
    /// Only things that cannot be executed (exit code 126).
    NotExecutable,
}

/// Searches as a shell does: a word with a slash is a path, any other is sought along `PATH`.
pub fn find_program(word: &str, path: &str, working_directory: &Path) -> Lookup {
    if word.contains('/') {
        return judge(working_directory.join(word));
    }
    let mut best = Lookup::NotFound;
    if word.is_empty() {
        return best;
    }
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        match judge(working_directory.join(directory).join(word)) {
            Lookup::NotFound => {}
            Lookup::NotExecutable => best = Lookup::NotExecutable,
            found => return found,
        }
    }
    best
}

fn judge(candidate: PathBuf) -> Lookup {
    match std::fs::metadata(&candidate) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Lookup::NotExecutable,
        Err(_) => Lookup::NotFound,
        Ok(about) if about.is_file() && access(&candidate, Access::EXEC_OK).is_ok() => {
            Lookup::Found(candidate)
        }
        Ok(_) => Lookup::NotExecutable,
    }
}
