//! For tests: a shell in the place of a VMM that opens its files by their names.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hypeman_jail::{Jail, JailOptions};
use rustix::process::{Pid, WaitOptions, waitpid};

use super::ByName;
use super::spawn::spawn_detached;
use crate::files::append_only;
use crate::own_directory::OwnDirectory;
use crate::{Disk, MachineSpec, MemoryBacking, VmmKind};

/// A machine and what its VMM would be started with.
pub(crate) struct StandIn {
    directory: tempfile::TempDir,
    pub(crate) spec: MachineSpec,
    pub(crate) jail: Arc<Jail>,
}

impl StandIn {
    /// `None`, with the reason printed, where this host has no jail. All files are readable by root alone.
    pub(crate) fn new() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let jail = Arc::new(Jail::new(JailOptions {
            state: directory.path().join("state"),
            ..JailOptions::default()
        }));
        if !jail.confines().unwrap() {
            println!("SKIPPED: no jail here: {}", jail.report().missing_text());
            return None;
        }
        let [kernel, initramfs, root, disk, _secret] =
            ["kernel", "initramfs", "root", "disk", "secret"].map(|name| {
                let path = directory.path().join(name);
                fs::write(&path, name).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
                path
            });
        let disk_at = |path, read_only| Disk {
            path,
            read_only,
            limit: None,
        };
        let spec = MachineSpec {
            id: "stand-in".to_owned(),
            runtime_directory: directory.path().join("run"),
            cpus: 1,
            memory_bytes: 64 << 20,
            memory: MemoryBacking::Anonymous,
            kernel,
            initramfs,
            kernel_arguments: Vec::new(),
            hotplug_bytes: 0,
            host_devices: Vec::new(),
            disks: vec![disk_at(root, true), disk_at(disk, false)],
            nic: None,
            workload_log: directory.path().join("app.log"),
            vmm_log: directory.path().join("vmm.log"),
        };
        Some(Self {
            directory,
            spec,
            jail,
        })
    }

    /// A file of the machine.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The directory in which the stand-in works, made anew.
    pub(crate) fn own(&self) -> OwnDirectory {
        let own = OwnDirectory::of(&self.spec.runtime_directory);
        own.make().unwrap();
        own
    }

    /// Lets it carry out a script to its end, and returns what it said.
    pub(crate) async fn run(&self, own: &OwnDirectory, script: impl FnOnce(&ByName) -> String) -> String {
        let (kind, program) = (VmmKind::Firecracker, Path::new("/bin/sh"));
        let prepared = ByName::prepare(&self.jail, kind, program, &self.spec, own, true, 0).await;
        let start = prepared.unwrap();
        let arguments = vec!["-c".into(), script(&start).into()];
        let output = append_only(&self.spec.vmm_log).unwrap();
        let spawned = spawn_detached(start.detached(arguments, own.path(), output, None));
        waitpid(Pid::from_raw(spawned.unwrap().pid as i32), WaitOptions::empty()).unwrap();
        fs::read_to_string(&self.spec.vmm_log).unwrap()
    }
}
