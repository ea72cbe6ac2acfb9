//! The end of a machine's console: what people read first when it died.
//!
//! Everything in it may come from the guest. It is shown, never obeyed.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::files::{append_only, io_error};
use crate::process::Words;
use crate::{MachineSpec, VmmError};

/// Written by us before each start, so that an older boot is not taken for this one.
const START_MARK: &str = "--- hypeman starts machine ";

const PANIC_MARK: &str = "Kernel panic - not syncing";
const RESTART_MARK: &str = "reboot: Restarting system";
const POWER_OFF_MARK: &str = "reboot: Power down";
/// What is shown of the end.
const TAIL_BYTES: usize = 4096;
/// What is searched for a panic: its trace and registers come after its first line.
const SEARCH_BYTES: u64 = 64 * 1024;
const MESSAGE_CHARACTERS: usize = 300;

/// Console and VMM output of one machine.
#[derive(Debug, Clone)]
pub(crate) struct Console {
    path: PathBuf,
    /// Where this start begins in the file.
    start: u64,
    /// What the VMM itself says, where that does not go into the same file.
    words: Option<Words>,
}

impl Console {
    /// Of a machine that runs.
    pub(crate) fn new(path: PathBuf, words: Option<Words>) -> Self {
        Self {
            path,
            start: 0,
            words,
        }
    }

    /// Of a machine that is about to start. Also returns its file, to be appended to.
    pub(crate) fn begin(spec: &MachineSpec, words: Option<Words>) -> Result<(Self, File), VmmError> {
        let path = &spec.vmm_log;
        let mut log = append_only(path)?;
        let start = log
            .seek(SeekFrom::End(0))
            .map_err(io_error("cannot read", path))?;
        writeln!(log, "{START_MARK}{}", spec.id).map_err(io_error("cannot write", path))?;
        let console = Self {
            path: path.clone(),
            start,
            words,
        };
        Ok((console, log))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The last lines of this boot, readable.
    pub(crate) fn tail(&self) -> String {
        let mut text = self.this_boot();
        text.push_str(&self.words());
        last_lines(&text)
    }

    /// The last lines since [`Console::begin`].
    pub(crate) fn tail_of_start(&self) -> String {
        let text = self.read(self.start);
        let text = text.strip_prefix(START_MARK).map_or(text.as_str(), |rest| {
            rest.split_once('\n').map_or("", |(_, after)| after)
        });
        let lines = last_lines(&format!("{text}{}", self.words()));
        if lines.is_empty() {
            "it said nothing".to_owned()
        } else {
            lines
        }
    }

    /// The first line of a kernel panic, if this boot showed one.
    pub(crate) fn panic_message(&self) -> Option<String> {
        let text = self.this_boot();
        let at = text.rfind(PANIC_MARK)?;
        let line = text[at..].lines().next().unwrap_or_default();
        Some(line.chars().take(MESSAGE_CHARACTERS).collect())
    }

    /// True when the kernel of this boot said that it powers off.
    pub(crate) fn shows_power_off(&self) -> bool {
        self.this_boot().contains(POWER_OFF_MARK)
    }

    /// True when the kernel of this boot said that it restarts.
    pub(crate) fn shows_restart(&self) -> bool {
        self.this_boot().contains(RESTART_MARK)
    }

    fn words(&self) -> String {
        readable(&self.words.as_ref().map(Words::text).unwrap_or_default())
    }

    fn this_boot(&self) -> String {
        let text = self.read(0);
        match text.rfind(START_MARK) {
            Some(at) => text[at..]
                .split_once('\n')
                .map(|(_, rest)| rest.to_owned())
                .unwrap_or_default(),
            None => text,
        }
    }

    /// The last bytes of the file, but not what is before `offset`. A log that cannot be read is empty.
    fn read(&self, offset: u64) -> String {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.path)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(offset.max(length.saturating_sub(SEARCH_BYTES))))?;
            let mut bytes = Vec::new();
            file.take(SEARCH_BYTES).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        readable(&String::from_utf8_lossy(&read().unwrap_or_default()))
    }
}

fn readable(text: &str) -> String {
    text.chars()
        .filter(|letter| *letter == '\n' || *letter == '\t' || !letter.is_control())
        .collect()
}

fn last_lines(text: &str) -> String {
    let text = text.trim_end();
    let mut start = text.len().saturating_sub(TAIL_BYTES);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    let tail = &text[start..];
    // A line that was cut is no line.
    let tail = if start == 0 {
        tail
    } else {
        tail.split_once('\n').map_or(tail, |(_, rest)| rest)
    };
    tail.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn console(text: &[u8]) -> (tempfile::TempDir, Console) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmm.log");
        std::fs::write(&path, text).unwrap();
        (directory, Console::new(path, None))
    }

    #[test]
    fn a_panic_of_an_earlier_boot_is_not_taken_for_one_of_this() {
        let earlier = format!("{START_MARK}a\nKernel panic - not syncing: old\n{START_MARK}a\nhello\n");
        let (_directory, console) = console(earlier.as_bytes());
        assert_eq!(console.panic_message(), None);
        assert_eq!(console.tail(), "hello");
    }

    #[test]
    fn a_panic_is_found_before_its_trace() {
        let text = format!(
            "{START_MARK}a\r\n[ 1.0] Kernel panic - not syncing: VFS: no root\r\n{}",
            "[ 1.0] ? trace\r\n".repeat(500)
        );
        let (_directory, console) = console(text.as_bytes());
        assert_eq!(
            console.panic_message().as_deref(),
            Some("Kernel panic - not syncing: VFS: no root")
        );
        assert!(console.tail().len() <= TAIL_BYTES);
        assert!(console.tail().starts_with("[ 1.0] ? trace"));
    }

    #[test]
    fn binary_noise_and_a_missing_file_are_survived() {
        let (_directory, console) = console(b"\xff\x00\x1b[31mred\xc3");
        assert!(console.tail().contains("[31mred"));
        assert!(!console.tail().contains('\x1b'));
        assert_eq!(Console::new("/nonexistent/log".into(), None).tail(), "");
    }
}
