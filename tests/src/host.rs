//! What the host offers to the stories.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// Whether the stories run as root.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether a program is on the path.
#[must_use]
pub fn have(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|directory| directory.join(program).is_file()))
}

/// Top of the repository.
#[must_use]
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate lies in the repository")
        .to_owned()
}

/// The guest kernel that stories boot: one that runs with this host's KVM, where there is one; else
/// `HYPEMAN_TEST_KERNEL`, else what the server finds on its own.
#[must_use]
pub fn kernel() -> Option<PathBuf> {
    let named = |variable| {
        std::env::var_os(variable)
            .map(PathBuf::from)
            .filter(|path| path.exists())
    };
    kvm_kernel().or_else(|| named("HYPEMAN_TEST_KERNEL"))
}

/// A guest kernel of which somebody knows that it runs with this host's KVM: `HYPEMAN_TEST_KVM_KERNEL`. Stories then
/// also run on the hypervisors that need KVM.
#[must_use]
pub fn kvm_kernel() -> Option<PathBuf> {
    std::env::var_os("HYPEMAN_TEST_KVM_KERNEL")
        .map(PathBuf::from)
        .filter(|path| path.exists())
}

/// The hypervisors that a matrix runs over. Tells which ones this host does not offer.
#[must_use]
pub fn hypervisors() -> Vec<&'static str> {
    let kinds = ["qemu", "qemu-microvm", "cloud-hypervisor", "firecracker"];
    // One of them alone, to look closer.
    let only = chosen_hypervisor();
    kinds
        .into_iter()
        .filter(|kind| only.as_deref().is_none_or(|only| only == *kind))
        .filter(|kind| offers(kind))
        .collect()
}

/// One hypervisor of each make that this host offers, for stories that take long on each: both boards of QEMU share what
/// such stories are about.
#[must_use]
pub fn makes() -> Vec<&'static str> {
    let mut kinds = hypervisors();
    if kinds.contains(&"qemu") {
        kinds.retain(|kind| *kind != "qemu-microvm");
    }
    kinds
}

/// The hypervisor of stories that do not care: `HYPEMAN_TEST_HYPERVISOR`, or QEMU.
#[must_use]
pub fn any_hypervisor() -> String {
    chosen_hypervisor().unwrap_or_else(|| "qemu".to_owned())
}

fn chosen_hypervisor() -> Option<String> {
    std::env::var("HYPEMAN_TEST_HYPERVISOR").ok()
}

/// Whether a story of one kind of hypervisor is told: the host offers it, and no other one is looked at alone.
#[must_use]
pub fn told_on(kind: &str) -> bool {
    chosen_hypervisor().is_none_or(|only| only == kind) && offers(kind)
}

/// Whether this host offers a kind of hypervisor; tells why not.
#[must_use]
pub fn offers(kind: &str) -> bool {
    if kind.starts_with("qemu") {
        true
    } else if !have(kind) {
        eprintln!("SKIPPED: on {kind}: it is not on the path");
        false
    } else if kvm_kernel().is_none() {
        eprintln!(
            "SKIPPED: on {kind}: no guest kernel is named that runs with this host's KVM (HYPEMAN_TEST_KVM_KERNEL)"
        );
        false
    } else {
        true
    }
}

/// A small file system on a loop device, mounted; unmounted when dropped.
#[derive(Debug)]
pub struct LoopDisk {
    directory: TempDir,
    mount_point: PathBuf,
}

impl LoopDisk {
    /// Makes and mounts an ext4 of `megabytes`. `None` where the host cannot (not root, no loop device).
    #[must_use]
    pub fn mount(megabytes: u64) -> Option<Self> {
        Self::made_by(&["mkfs.ext4", "-q", "-F", "-m", "0"], megabytes)
    }

    /// The same with a file system whose files can share blocks: XFS. At least 300 megabytes.
    #[must_use]
    pub fn mount_sharing(megabytes: u64) -> Option<Self> {
        Self::made_by(&["mkfs.xfs", "-q", "-m", "reflink=1"], megabytes)
    }

    fn made_by(command: &[&str], megabytes: u64) -> Option<Self> {
        let directory = tempfile::Builder::new().prefix("hm-disk-").tempdir().ok()?;
        let image = directory.path().join("disk.img");
        let mount_point = directory.path().join("m");
        std::fs::create_dir(&mount_point).ok()?;
        std::fs::File::create(&image)
            .ok()?
            .set_len(megabytes << 20)
            .ok()?;
        let run = |command: &[&str], paths: &[&Path]| {
            Command::new(command[0])
                .args(&command[1..])
                .args(paths)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success())
        };
        let made = run(command, &[&image]) && run(&["mount", "-o", "loop"], &[&image, &mount_point]);
        made.then_some(Self {
            directory,
            mount_point,
        })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// Fills it up but for `leave` bytes; removing the returned file gives the space back.
    #[must_use]
    pub fn fill(&self, leave: u64) -> PathBuf {
        let filler = self.mount_point.join("filler");
        let space = rustix::fs::statvfs(&self.mount_point).expect("statvfs");
        let free = space.f_bavail * space.f_frsize;
        let file = std::fs::File::create(&filler).expect("filler");
        let goal = free.saturating_sub(leave);
        let (mut length, mut step) = (0, goal);
        // Others may write at the same time, and the map of the filler itself takes room.
        while length < goal && step >= space.f_frsize {
            let more = step.min(goal - length);
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), length, more) {
                Ok(()) => length += more,
                Err(rustix::io::Errno::NOSPC) => step /= 2,
                Err(error) => panic!("fallocate: {error}"),
            }
        }
        filler
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(&self.mount_point).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("could not unmount {}", self.directory.path().display());
        }
    }
}
