//! What a VMM itself says, of bounded length and in memory.
//!
//! A guest can make it say a lot, and could so fill the host's disk: a file behind memory is never given holes, and each
//! page that the guest gives back makes QEMU print a complaint. Nothing says more than this memfd can hold.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals};

use crate::{ProcessIdentity, VmmError};

const LIMIT: usize = 64 * 1024;
/// Part of each complaint about a page that is not given back.
const COMPLAINT: &str = "ram_block_discard_range: ";

/// The output of one process.
#[derive(Debug, Clone)]
pub(crate) struct Words(Arc<File>);

impl Words {
    /// Nothing said yet, and what the process is given to say it.
    pub(crate) fn begin() -> Result<(Self, File), VmmError> {
        let begin = || -> io::Result<(Self, File)> {
            let words = Self::new()?;
            let writer = words.writer()?;
            Ok((words, writer))
        };
        begin().map_err(VmmError::io("cannot make room for what the VMM says"))
    }

    /// An empty file that cannot grow beyond its limit.
    fn new() -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("vmm-output", flags)?);
        file.set_len(LIMIT as u64)?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Self(Arc::new(file)))
    }

    /// The output of a process that another server started; `None` where it goes to its log.
    pub(crate) fn of(process: &ProcessIdentity) -> Option<Self> {
        let path = format!("/proc/{}/fd/2", process.pid);
        let target = std::fs::read_link(&path).ok()?;
        let file = File::open(path).ok()?;
        (target.to_string_lossy().starts_with("/memfd:vmm-output") && process.is_alive())
            .then(|| Self(Arc::new(file)))
    }

    /// What the process is given to write to. It shares the place of the next word with all others of its kind.
    fn writer(&self) -> io::Result<File> {
        self.0.try_clone()
    }

    /// All of it but the complaints.
    pub(crate) fn text(&self) -> String {
        let mut bytes = vec![0; LIMIT];
        // Cut off by nothing: the file always has its full length.
        let count = self.0.read_at(&mut bytes, 0).unwrap_or_default();
        let said = bytes[..count].split(|byte| *byte == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(said);
        let lines = text.lines().filter(|line| !line.contains(COMPLAINT));
        lines.flat_map(|line| [line, "\n"]).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn words_are_kept_up_to_a_limit_and_complaints_are_left_out() {
        let words = Words::new().unwrap();
        let mut writer = words.writer().unwrap();
        assert_eq!(words.text(), "");
        writeln!(writer, "one").unwrap();
        writeln!(writer, "qemu: ram_block_discard_range: Failed to fallocate").unwrap();
        writeln!(writer, "two").unwrap();
        assert_eq!(words.text(), "one\ntwo\n");
        while writer.write_all(&[b'x'; 1000]).is_ok() {}
        assert!(words.text().len() <= LIMIT);
        assert!(words.text().starts_with("one\ntwo\nxxx"));
    }

    #[test]
    fn another_server_reads_them_too() {
        let words = Words::new().unwrap();
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", "echo hello >&2; exec sleep 600"])
            .stderr(words.writer().unwrap())
            .spawn()
            .unwrap();
        let identity = loop {
            match ProcessIdentity::read(child.id()) {
                Ok(identity)
                    if identity.executable.contains("sleep") || identity.executable.contains("coreutils") =>
                {
                    break identity;
                }
                _ => std::thread::yield_now(),
            }
        };
        let text = Words::of(&identity).map(|words| words.text());
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(text.as_deref(), Some("hello\n"));
        assert!(Words::of(&identity).is_none());
    }
}
