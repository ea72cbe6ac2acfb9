//! A VMM that opens its files by their names, in a jail.
//!
//! ```text
//!  its own directory ─► shown, its own       root disk, kernel, memory ─► shown, read-only
//!  writable disks    ─► shown, its own       memory without a name     ─► a descriptor, `/proc/self/fd/N`
//!  TAP               ─► opened by us when it asks
//! ```
//!
//! Each thing is shown under the name that it has on the host, so that what a device state says of disks is the same
//! inside and outside.

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypeman_jail::{Access, Grant, Jail, JailSpec, Lent, Report, Restraint, Show, Tap};

use super::{Confinement, Detached, confines, limits};
use crate::files::io_error;
use crate::own_directory::OwnDirectory;
use crate::{MachineSpec, MemoryBacking, VmmError, VmmKind, tap};

/// How such a VMM is started.
#[derive(Debug)]
pub(crate) struct ByName {
    /// The program, where it really is.
    pub(crate) program: PathBuf,
    /// The machine's memory, as the VMM sees it.
    pub(crate) memory: MemoryBacking,
    /// To be kept open for it.
    pub(crate) keep: Vec<OwnedFd>,
    pub(crate) jail: Option<Confinement>,
    pub(crate) restraint: Option<(Restraint, Report)>,
}

impl ByName {
    /// Decides it, and opens the TAP and what has no name. `boots`: it reads kernel and initramfs. `written`: the
    /// largest file besides disks that it writes.
    pub(crate) async fn prepare(
        jail: &Arc<Jail>,
        kind: VmmKind,
        program: &Path,
        machine: &MachineSpec,
        own: &OwnDirectory,
        boots: bool,
        written: u64,
    ) -> Result<Self, VmmError> {
        let limits = limits(jail.options(), machine, written);
        let mut start = Self {
            program: fs::canonicalize(program).map_err(io_error("cannot find", program))?,
            memory: machine.memory.clone(),
            keep: Vec::new(),
            jail: None,
            restraint: None,
        };
        if !machine.host_devices.is_empty() {
            start.restraint = jail
                .restrain_only(&limits, "devices of the host are handed to the machine")
                .map_err(|error| VmmError::Unavailable(error.to_string()))?;
            return Ok(start);
        }
        if !confines(jail).await? {
            start.restraint = jail.restrain(&limits);
            return Ok(start);
        }
        let mut show = vec![own.shown()];
        show.extend(program_files(&start.program));
        if boots {
            show.extend([&machine.kernel, &machine.initramfs].map(Show::shared));
        }
        show.extend(machine.disks.iter().map(|disk| match disk.read_only {
            true => Show::shared(&disk.path),
            false => Show::own(&disk.path),
        }));
        let mut devices = vec![PathBuf::from("/dev/kvm")];
        match &machine.memory {
            MemoryBacking::Anonymous => {}
            MemoryBacking::Private(path) if path.starts_with("/proc") => {
                let file = OwnedFd::from(File::open(path).map_err(io_error("cannot open", path))?);
                start.memory =
                    MemoryBacking::Private(PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())));
                start.keep.push(file);
            }
            MemoryBacking::Private(path) => show.push(Show::shared(path)),
            MemoryBacking::Served(socket) => {
                show.push(Show {
                    path: socket.clone(),
                    access: Access::Write,
                    grant: Grant::Owner,
                });
                devices.push(PathBuf::from("/dev/userfaultfd"));
            }
        }
        let lent = match &machine.nic {
            None => None,
            Some(nic) => Some(Lent::Tap(Tap {
                file: tap::open(&nic.tap)?.into(),
                name: nic.tap.clone(),
                described: kind == VmmKind::CloudHypervisor,
            })),
        };
        start.jail = Some(Confinement {
            jail: Arc::clone(jail),
            spec: JailSpec {
                show,
                devices,
                limits,
            },
            lent,
        });
        Ok(start)
    }

    /// The program, to be started.
    pub(crate) fn detached(
        self,
        arguments: Vec<OsString>,
        directory: &Path,
        output: File,
        errors: Option<File>,
    ) -> Detached {
        Detached {
            program: self.program,
            arguments,
            directory: directory.to_owned(),
            output,
            errors,
            keep: self.keep,
            forbid_holes: false,
            jail: self.jail,
            restraint: self.restraint,
        }
    }

    /// Shows one more thing, where there is a jail.
    pub(crate) fn shows(&mut self, more: Show) {
        if let Some(confinement) = &mut self.jail {
            confinement.spec.show.push(more);
        }
    }
}

/// A program, and what belongs to it where it is not the system's: its libraries and its firmware.
pub(crate) fn program_files(program: &Path) -> Vec<Show> {
    let mut shown = vec![Show::run(program)];
    let prefix = program
        .parent()
        .filter(|directory| directory.file_name().is_some_and(|name| name == "bin"))
        .and_then(Path::parent)
        .filter(|prefix| prefix.components().count() > 1);
    if let Some(prefix) = prefix {
        let beside = ["lib", "lib64", "libexec", "share"].map(|name| prefix.join(name));
        let there = beside
            .into_iter()
            .filter(|path| path.is_dir() && !path.is_symlink());
        shown.extend(there.map(Show::run));
    }
    shown
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use hypeman_jail::Item;
    use rustix::fs::MemfdFlags;

    use super::*;
    use crate::Nic;
    use crate::process::stand_in::StandIn;

    /// Memory as it is laid out for a restore: nobody can write to it any more.
    fn sealed_memory() -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut memory = File::from(rustix::fs::memfd_create("memory", flags).unwrap());
        memory.write_all(b"guest memory").unwrap();
        rustix::fs::fcntl_add_seals(&memory, rustix::fs::SealFlags::WRITE).unwrap();
        memory
    }

    #[tokio::test]
    async fn it_sees_the_files_of_its_machine_with_the_rights_that_it_needs() {
        let Some(mut stand_in) = StandIn::new() else {
            return;
        };
        let memory = sealed_memory();
        let number = memory.as_raw_fd();
        stand_in.spec.memory =
            MemoryBacking::Private(format!("/proc/{}/fd/{number}", std::process::id()).into());
        let own = stand_in.own();
        let directory = stand_in.path("");
        let script = |start: &ByName| {
            let MemoryBacking::Private(memory) = &start.memory else {
                panic!("{:?}", start.memory);
            };
            let (directory, memory) = (directory.display(), memory.display());
            format!(
                r#"
                read_it() {{ cat "$1" > /dev/null 2>&1; }}
                change() {{ (echo more >> "$1") 2> /dev/null; }}
                for name in kernel initramfs root disk secret; do
                    read_it {directory}/$name && echo "reads $name"
                    change {directory}/$name && echo "changes $name"
                done
                change {directory}/run/file && echo "makes files beside its own"
                change file && echo "makes files of its own"
                change {memory}
                echo "memory: $(cat {memory})"
                echo "sees:" $(ls {directory})
                test -e /dev/net/tun && echo "sees tun"
                test -e /etc/shadow && echo "sees passwords"
                true
                "#
            )
        };
        let said = stand_in.run(&own, script).await;
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(
            lines,
            [
                "reads kernel",
                "reads initramfs",
                "reads root",
                "reads disk",
                "changes disk",
                "makes files of its own",
                "memory: guest memory",
                "sees: disk initramfs kernel root run",
            ]
        );
        let mut content = [0; 12];
        memory.read_exact_at(&mut content, 0).unwrap();
        assert_eq!(&content, b"guest memory");
        assert_eq!(fs::read(stand_in.path("root")).unwrap(), b"root");
        assert_eq!(fs::read(stand_in.path("disk")).unwrap(), b"diskmore\n");
    }

    #[tokio::test]
    async fn with_a_network_it_sees_neither_that_of_the_host_nor_the_device_of_taps() {
        let Some(mut stand_in) = StandIn::new() else {
            return;
        };
        let name = format!("hn{}", std::process::id());
        if let Err(error) = tap::open(&name) {
            println!("SKIPPED: no TAP here: {error}");
            return;
        }
        stand_in.spec.nic = Some(Nic {
            tap: name,
            mac: "02:00:00:00:00:01".to_owned(),
            download: None,
            upload: None,
        });
        let script = r#"
            test -e /dev/net && echo "sees the device"
            echo "interfaces:" $(tail -n +3 /proc/self/net/dev | cut -d: -f1)
        "#;
        let said = stand_in.run(&stand_in.own(), |_| script.to_owned()).await;
        if !stand_in.jail.report().active.contains(&Item::NetworkNamespace) {
            println!("SKIPPED: {}", stand_in.jail.report().missing_text());
            return;
        }
        assert_eq!(said, "interfaces: lo\n");
    }

    #[test]
    fn what_belongs_to_a_program_comes_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let prefix = directory.path();
        for name in ["bin", "share", "etc"] {
            fs::create_dir(prefix.join(name)).unwrap();
        }
        let program = prefix.join("bin/qemu");
        let paths: Vec<PathBuf> = program_files(&program)
            .into_iter()
            .map(|show| show.path)
            .collect();
        assert_eq!(paths, [program, prefix.join("share")]);
        assert_eq!(program_files(&prefix.join("qemu")).len(), 1);
    }
}
