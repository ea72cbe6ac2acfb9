//! Removes a tree whose shape is another's.
//!
//! A VMM that its guest has taken over can nest directories deeper than our stack reaches, and more of them than we may
//! have files open. So nobody descends: what lies in a directory of the top is moved to the top, until nothing is left.
//!
//! Invariant: no link is followed, and at most two directories are open.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, openat, renameat, unlinkat};
use rustix::io::Errno;

/// Removes a tree, or a file, that may not exist.
///
/// # Errors
/// Something of it cannot be removed.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match remove(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}

fn remove(path: &Path) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let top = match openat(CWD, path, flags, Mode::empty()) {
        Err(Errno::NOTDIR | Errno::LOOP) => return fs::remove_file(path),
        opened => opened?,
    };
    let mut number = 0_u64;
    loop {
        let directories = remove_files(top.as_fd())?;
        if directories.is_empty() {
            return fs::remove_dir(path);
        }
        for name in directories {
            let inner = openat(&top, name.as_c_str(), flags, Mode::empty())?;
            for nested in remove_files(inner.as_fd())? {
                loop {
                    number += 1;
                    match renameat(&inner, nested.as_c_str(), &top, number.to_string()) {
                        // Somebody has taken this name. An empty directory of that name is replaced.
                        Err(Errno::EXIST | Errno::NOTEMPTY) => {}
                        moved => break moved?,
                    }
                }
            }
            unlinkat(&top, name.as_c_str(), AtFlags::REMOVEDIR)?;
        }
    }
}

/// Removes the files of a directory; its directories are left.
fn remove_files(directory: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut left = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if [c".", c".."].contains(&name) {
            continue;
        }
        match unlinkat(directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::ISDIR) => left.push(name.to_owned()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_removed_and_what_its_links_lead_to_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let ours = directory.path().join("ours");
        fs::create_dir(&ours).unwrap();
        fs::write(ours.join("file"), "ours").unwrap();
        let tree = directory.path().join("tree");
        // Names that the removal itself would choose are among them.
        for name in ["a/b/c", "a/d", "1/2/3", "2", "3/1"] {
            fs::create_dir_all(tree.join(name)).unwrap();
            fs::write(tree.join(name).join("file"), "theirs").unwrap();
            std::os::unix::fs::symlink(&ours, tree.join(name).join("link")).unwrap();
        }
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
        std::os::unix::fs::symlink(&ours, &tree).unwrap();
        remove_tree(&tree).unwrap();
        assert!(fs::symlink_metadata(&tree).is_err());
        remove_tree(&tree).unwrap();
        assert_eq!(fs::read_to_string(ours.join("file")).unwrap(), "ours");
    }

    #[test]
    fn no_tree_is_too_deep() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut deepest = openat(CWD, &tree, flags, Mode::empty()).unwrap();
        for _ in 0..20_000 {
            rustix::fs::mkdirat(&deepest, c"d", Mode::RWXU).unwrap();
            deepest = openat(&deepest, c"d", flags, Mode::empty()).unwrap();
        }
        drop(deepest);
        remove_tree(&tree).unwrap();
        assert!(!tree.exists());
    }
}
