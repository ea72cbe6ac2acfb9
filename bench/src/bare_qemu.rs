//! The bare limit of a boot: QEMU with the same board, processor, memory, firmware and kernel, and an init that does
//! nothing but end the machine.
//!
//! Its arguments are taken from a VMM of ours that runs, so that both always boot the same.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::{BenchError, Result};
use crate::load::pause;

/// Longer than a boot takes under any load.
const PATIENCE: Duration = Duration::from_secs(120);

/// Options that make the machine what it is; all others (devices, channels, disks) are left out.
const KEPT: [&str; 9] = [
    "-machine", "-accel", "-cpu", "-smp", "-m", "-bios", "-kernel", "-append", "-display",
];
/// Options of these without a value.
const FLAGS: [&str; 3] = ["-nodefaults", "-no-user-config", "-no-reboot"];

/// A bare machine, ready to be booted.
#[derive(Debug)]
pub struct BareMachine {
    program: PathBuf,
    arguments: Vec<String>,
}

impl BareMachine {
    /// Makes the bare counterpart of the machine with these words on its command line; `folder` gets its initramfs.
    ///
    /// # Errors
    /// The initramfs cannot be written, or the words are not QEMU's.
    pub fn like(words: &[String], folder: &Path) -> Result<Self> {
        let program = words.first().map(PathBuf::from).unwrap_or_default();
        let is_qemu = program
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("qemu-system-x86_64"));
        if !is_qemu {
            return Err(BenchError::Missing(format!(
                "the bare reference knows QEMU for x86-64, not {program:?}"
            )));
        }
        let initramfs = folder.join("bare.cpio");
        fs::write(&initramfs, archive(&[("init", &init())]))
            .map_err(|error| BenchError::io("write an initramfs", error))?;
        let mut arguments: Vec<String> = FLAGS.map(str::to_owned).to_vec();
        for pair in words.windows(2) {
            let [option, value] = pair else { continue };
            if !KEPT.contains(&option.as_str()) {
                continue;
            }
            let value = match option.as_str() {
                // Whatever holds our guest's memory, plain anonymous memory is the least there is.
                "-machine" => value
                    .split(',')
                    .filter(|part| !part.starts_with("memory-backend"))
                    .collect::<Vec<_>>()
                    .join(","),
                // The machine ends by a triple fault, which every board understands.
                "-append" => format!("{value} reboot=t panic=-1"),
                _ => value.clone(),
            };
            arguments.extend([option.clone(), value]);
        }
        arguments.extend([
            "-serial".into(),
            "null".into(),
            "-initrd".into(),
            initramfs.display().to_string(),
        ]);
        Ok(Self { program, arguments })
    }

    /// Boots it and returns the time from the start of the process to its end.
    ///
    /// # Errors
    /// It does not end, or ends with a complaint.
    pub fn boot(&self) -> Result<Duration> {
        let started = Instant::now();
        // In a session of its own, as our VMMs are: schedulers may share time out by session.
        let mut child = Command::new("setsid")
            .arg(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| BenchError::io("start bare QEMU", error))?;
        loop {
            match child
                .try_wait()
                .map_err(|error| BenchError::io("watch bare QEMU", error))?
            {
                Some(status) if status.success() => return Ok(started.elapsed()),
                Some(status) => return Err(BenchError::Answer(format!("bare QEMU ended with {status}"))),
                None if started.elapsed() > PATIENCE => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(BenchError::Answer("bare QEMU does not reach its init".into()));
                }
                None => pause(Duration::from_millis(1)),
            }
        }
    }
}

/// A program of 27 instructions' bytes: `reboot(LINUX_REBOOT_CMD_RESTART)`.
fn init() -> Vec<u8> {
    const CODE: [u8; 24] = [
        0xb8, 0xa9, 0, 0, 0, // mov eax, SYS_reboot
        0xbf, 0xad, 0xde, 0xe1, 0xfe, // mov edi, first magic
        0xbe, 0x69, 0x19, 0x12, 0x28, // mov esi, second magic
        0xba, 0x67, 0x45, 0x23, 0x01, // mov edx, restart
        0x0f, 0x05, // syscall
        0xeb, 0xfe, // loop for ever
    ];
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    elf.extend([2, 0, 0x3e, 0, 1, 0, 0, 0]); // executable, x86-64
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(u64::to_le_bytes(word)); // entry, program headers, section headers
    }
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 64, 0, 0, 0, 0, 0]);
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]); // load, readable and executable
    let length = HEADERS + CODE.len() as u64;
    for word in [0, BASE, BASE, length, length, 0x1000] {
        elf.extend(u64::to_le_bytes(word));
    }
    elf.extend(CODE);
    elf
}

/// A cpio archive (newc) of directories and programs; what has no content is a directory.
pub fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, data) in files.iter().chain(&[("TRAILER!!!", &[][..])]) {
        let mode = match (*name, data.is_empty()) {
            ("TRAILER!!!", _) => 0,
            (_, true) => 0o040_755,
            (_, false) => 0o100_755,
        };
        let fields = [1, mode, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        archive.extend(b"070701");
        for field in fields {
            archive.extend(format!("{field:08x}").bytes());
        }
        archive.extend(name.bytes());
        archive.push(0);
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(*data);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    archive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_makes_the_machine_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let words: Vec<String> = [
            "/usr/bin/qemu-system-x86_64",
            "-machine",
            "microvm,acpi=on,memory-backend=mem",
            "-cpu",
            "max",
            "-object",
            "{\"id\":\"mem\"}",
            "-kernel",
            "/k",
            "-initrd",
            "/big",
            "-append",
            "console=ttyS0",
            "-device",
            "x",
        ]
        .map(str::to_owned)
        .to_vec();
        let bare = BareMachine::like(&words, folder.path()).unwrap();
        let line = bare.arguments.join(" ");
        assert!(
            line.contains("-machine microvm,acpi=on -cpu max -kernel /k -append console=ttyS0 reboot=t"),
            "{line}"
        );
        assert!(
            !line.contains("/big") && !line.contains("-device") && !line.contains("-object"),
            "{line}"
        );
        assert!(BareMachine::like(&["cloud-hypervisor".into()], folder.path()).is_err());
    }
}
