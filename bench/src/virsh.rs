//! A guest under libvirt: the same QEMU, board, processor, memory, kernel and content as one of ours.
//!
//! Its init is a shell that copies a disk into its memory and says so on the console; it has no agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::bare_qemu::archive;
use crate::context::need_program;
use crate::error::{BenchError, Result};
use crate::load::pause;

/// Where libvirt is spoken to, unless the environment says otherwise.
const CONNECTION: &str = "qemu:///system";
/// Longer than a boot takes under any load.
const PATIENCE: Duration = Duration::from_secs(180);
/// What the guest says when its memory is filled.
const READY: &str = "bench-guest-is-ready";

/// What libvirt's guests are made of.
#[derive(Debug)]
pub struct Virsh {
    folder: tempfile::TempDir,
    name: String,
    emulator: String,
    kernel: PathBuf,
    accelerated: bool,
}

impl Virsh {
    /// Prepares guests like the machine with these words on its command line.
    ///
    /// # Errors
    /// [`BenchError::Missing`] without libvirt or its QEMU driver.
    pub fn like(words: &[String], busybox: &[u8]) -> Result<Self> {
        need_program("virsh")?;
        let after = |option: &str| {
            let at = words.iter().position(|word| word == option)?;
            words.get(at + 1).cloned()
        };
        let missing = || BenchError::Missing("a machine of ours to make libvirt's like".into());
        let folder = tempfile::Builder::new()
            .prefix("bench-virsh-")
            .tempdir()
            .map_err(|error| BenchError::io("make a directory", error))?;
        let virsh = Self {
            folder,
            name: format!("hypeman-bench-{}", std::process::id()),
            emulator: words.first().cloned().ok_or_else(missing)?,
            kernel: after("-kernel").map(PathBuf::from).ok_or_else(missing)?,
            accelerated: after("-accel").is_some_and(|accelerator| accelerator.starts_with("kvm")),
        };
        virsh
            .run(&["version"])
            .map_err(|error| BenchError::Missing(format!("libvirt does not answer: {error}")))?;
        let init = format!(
            "#!/bin/busybox sh\n\
             /bin/busybox mount -t devtmpfs dev /dev\n\
             /bin/busybox mount -t tmpfs -o size=95% tmpfs /tmp\n\
             /bin/busybox cat /dev/vda >/tmp/content\n\
             echo {READY} >/dev/ttyS0\n\
             while :; do /bin/busybox sleep 1000; done\n"
        );
        let files: [(&str, &[u8]); 5] = [
            ("bin", &[]),
            ("bin/busybox", busybox),
            ("dev", &[]),
            ("init", init.as_bytes()),
            ("tmp", &[]),
        ];
        fs::write(virsh.path("initramfs"), archive(&files))
            .map_err(|error| BenchError::io("write an initramfs", error))?;
        Ok(virsh)
    }

    /// Boots a guest of `memory` MiB, with `content` in it.
    ///
    /// # Errors
    /// libvirt refuses, or the guest does not get there.
    pub fn boot(&self, memory: u64, content: &[u8]) -> Result<()> {
        let fail = |error| BenchError::io("make a guest for libvirt", error);
        // A disk has at least one sector.
        let disk = if content.is_empty() { &[0; 512] } else { content };
        fs::write(self.path("disk"), disk).map_err(fail)?;
        fs::write(self.path("domain.xml"), self.domain(memory)).map_err(fail)?;
        let _ = fs::remove_file(self.path("console"));
        self.run(&["create", &self.text("domain.xml")])?;
        let began = Instant::now();
        loop {
            let console = fs::read(self.path("console")).unwrap_or_default();
            if String::from_utf8_lossy(&console).contains(READY) {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                return Err(BenchError::Answer("libvirt's guest does not get ready".into()));
            }
            pause(Duration::from_millis(20));
        }
    }

    /// Writes the guest to a file and ends it.
    ///
    /// # Errors
    /// libvirt refuses.
    pub fn save(&self) -> Result<Duration> {
        let _ = fs::remove_file(self.path("saved"));
        self.timed(&["save", &self.name, &self.text("saved")])
    }

    /// Brings it back.
    ///
    /// # Errors
    /// libvirt refuses.
    pub fn restore(&self) -> Result<Duration> {
        self.timed(&["restore", &self.text("saved")])
    }

    /// Takes memory and disk of the guest while it runs.
    ///
    /// # Errors
    /// libvirt refuses.
    pub fn snapshot(&self) -> Result<Duration> {
        for left in ["snapshot", "overlay"] {
            let _ = fs::remove_file(self.path(left));
        }
        let memory = format!("file={},snapshot=external", self.text("snapshot"));
        let disk = format!("vda,snapshot=external,file={}", self.text("overlay"));
        let mut words = vec![
            "snapshot-create-as",
            &self.name,
            "bench",
            "--live",
            "--no-metadata",
        ];
        words.extend(["--memspec", &memory, "--diskspec", &disk]);
        self.timed(&words)
    }

    /// Ends the guest, if there is one.
    pub fn end(&self) {
        let _ = self.run(&["destroy", &self.name]);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn timed(&self, words: &[&str]) -> Result<Duration> {
        let began = Instant::now();
        self.run(words)?;
        Ok(began.elapsed())
    }

    fn run(&self, words: &[&str]) -> Result<()> {
        let connection = std::env::var("LIBVIRT_DEFAULT_URI").unwrap_or_else(|_| CONNECTION.into());
        let output = Command::new("virsh")
            .args(["--quiet", "--connect", &connection])
            .args(words)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| BenchError::io("run virsh", error))?;
        if output.status.success() {
            return Ok(());
        }
        let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(BenchError::Answer(format!("virsh {}: {complaint}", words[0])))
    }

    fn domain(&self, memory: u64) -> String {
        let (kind, processor) = if self.accelerated {
            ("kvm", "host-passthrough")
        } else {
            ("qemu", "maximum")
        };
        let path = |path: &Path| escaped(&path.display().to_string());
        format!(
            "<domain type='{kind}'><name>{}</name><memory unit='MiB'>{memory}</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{}</kernel><initrd>{}</initrd>\
             <cmdline>console=ttyS0</cmdline></os><features><acpi/></features><cpu mode='{processor}'/>\
             <devices><emulator>{}</emulator>\
             <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk>\
             <serial type='file'><source path='{}'/></serial><memballoon model='none'/></devices>\
             <seclabel type='none'/></domain>",
            self.name,
            path(&self.kernel),
            path(&self.path("initramfs")),
            escaped(&self.emulator),
            path(&self.path("disk")),
            path(&self.path("console")),
        )
    }
}

impl Drop for Virsh {
    fn drop(&mut self) {
        self.end();
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_names_what_our_machine_was_started_with() {
        let virsh = Virsh {
            folder: tempfile::tempdir().unwrap(),
            name: "bench".into(),
            emulator: "/usr/bin/qemu-system-x86_64".into(),
            kernel: "/boot/it's".into(),
            accelerated: false,
        };
        let domain = virsh.domain(256);
        assert!(domain.contains("<domain type='qemu'>"), "{domain}");
        assert!(domain.contains("<kernel>/boot/it&apos;s</kernel>"), "{domain}");
        assert!(domain.contains("<memory unit='MiB'>256</memory>"), "{domain}");
    }
}
