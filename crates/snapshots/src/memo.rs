//! Remembers which raw files were verified since the host booted, so that mapping one again costs nothing.
//!
//! The memo names the boot, the exact file (device, inode, size, and the times of its last changes) and the seal of what
//! it was compared with. A file that was written to since, another file under the same name, another seal, or a reboot
//! make it void. It is only a hint: losing it
//! costs one more verification, and a torn one matches nothing.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::OnceLock;

use blake3::Hash;

fn boot() -> Option<&'static str> {
    static BOOT: OnceLock<Option<String>> = OnceLock::new();
    let read = || fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
    BOOT.get_or_init(read).as_deref().map(str::trim)
}

fn stamp(file: &File, seal: &Hash) -> Option<String> {
    let facts = file.metadata().ok()?;
    Some(format!(
        "{} {seal} {} {} {} {}.{} {}.{}\n",
        boot()?,
        facts.dev(),
        facts.ino(),
        facts.len(),
        facts.ctime(),
        facts.ctime_nsec(),
        facts.mtime(),
        facts.mtime_nsec(),
    ))
}

/// Notes that the open file was verified just now.
pub(crate) fn remember(memo: &Path, file: &File, seal: &Hash) {
    if let Some(stamp) = stamp(file, seal) {
        // Failing to remember must not fail what was verified.
        let _ = fs::write(memo, stamp);
    }
}

/// Whether exactly this file was verified since the host booted.
pub(crate) fn recalls(memo: &Path, file: &File, seal: &Hash) -> bool {
    let Ok(noted) = fs::read(memo) else {
        return false;
    };
    stamp(file, seal).is_some_and(|stamp| stamp.as_bytes() == noted)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_changed_file_is_not_recalled() {
        let directory = tempfile::tempdir().unwrap();
        let memo = directory.path().join("memo");
        let mut file = File::create_new(directory.path().join("file")).unwrap();
        let seal = blake3::hash(b"what it holds");
        file.write_all(b"one").unwrap();
        assert!(!recalls(&memo, &file, &seal));
        remember(&memo, &file, &seal);
        assert!(recalls(&memo, &file, &seal));
        assert!(!recalls(&memo, &file, &blake3::hash(b"something else")));
        file.write_all(b"two").unwrap();
        assert!(!recalls(&memo, &file, &seal));
        fs::write(&memo, "torn").unwrap();
        assert!(!recalls(&memo, &file, &seal));
    }
}
