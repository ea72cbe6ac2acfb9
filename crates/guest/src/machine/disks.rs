//! From devices to the container's root.
//!
//! ```text
//! /mnt/lower   /dev/vda, the image, read only ─┐
//! /mnt/upper   /dev/vdb, the writable layer  ──┴─ overlay on /mnt/root ──► becomes /
//! /mnt/volume-N/{base,layer,merged}            volumes with a private layer, bound into the new root
//! ```
//!
//! The initramfs stays below the new root, out of reach and emptied.

use std::{
    ffi::{CStr, CString},
    fs,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    time::Duration,
};

use hypeman_guest_api::{VolumeMode, VolumeMount};
use rustix::{
    fs::{Mode, OFlags, open},
    io::Errno,
    mount::{MountFlags, mount, mount_bind, mount_move, mount_remount},
    process::{chdir, chroot},
};

const IMAGE: &str = "/dev/vda";
const LAYER: &str = "/dev/vdb";

/// Kinds of file systems on disks, likeliest first.
const READ_ONLY_KINDS: [&CStr; 3] = [c"erofs", c"ext4", c"squashfs"];
const READ_WRITE_KINDS: [&CStr; 3] = [c"ext4", c"xfs", c"btrfs"];

/// How long the kernel may take to find a disk that the machine has.
const PATIENCE: Duration = Duration::from_secs(30);

/// Directories that hold open the file systems to be made clean at the end.
pub(super) struct Disks {
    writable: Vec<OwnedFd>,
}

impl Disks {
    /// Flushes everything and leaves the writable disks clean. Programs are gone by now.
    pub(super) fn close(&self) {
        rustix::fs::sync();
        for directory in &self.writable {
            let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
            // A disk that stays dirty is repaired from its journal at the next mount.
            let _ = mount_remount(path, MountFlags::RDONLY, c"");
        }
    }
}

/// Waits for a device node.
pub(super) async fn wait_for(device: &str) -> Result<(), String> {
    let mut pause = Duration::from_millis(1);
    let appears = async {
        // There is no event for device nodes without udev.
        while !Path::new(device).exists() {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    };
    tokio::time::timeout(PATIENCE, appears)
        .await
        .map_err(|_| format!("disk {device} did not appear"))
}

/// Mounts the disks, makes the container's root our own root, and mounts the volumes there.
pub(super) async fn assemble(volumes: &[VolumeMount]) -> Result<Disks, String> {
    let mut disks = Disks { writable: Vec::new() };
    for directory in ["/mnt/lower", "/mnt/upper", "/mnt/root"] {
        make_directories(directory)?;
    }
    wait_for(IMAGE).await?;
    mount_any(IMAGE, "/mnt/lower", true)?;
    wait_for(LAYER).await?;
    mount_any(LAYER, "/mnt/upper", false)?;
    disks.keep("/mnt/upper")?;
    make_directories("/mnt/upper/upper")?;
    make_directories("/mnt/upper/work")?;
    overlay("/mnt/lower", "/mnt/upper", "/mnt/root")?;

    let mut merged = Vec::new();
    for (number, volume) in volumes.iter().enumerate() {
        wait_for(&volume.device).await?;
        if let VolumeMode::Overlay { device } = &volume.mode {
            wait_for(device).await?;
            merged.push((volume, merge(number, &volume.device, device, &mut disks)?));
        }
    }
    enter_root()?;
    super::pseudo::mount_in_container();
    for volume in volumes {
        make_directories(&volume.path)?;
        match &volume.mode {
            VolumeMode::Ro => mount_any(&volume.device, &volume.path, true)?,
            VolumeMode::Rw => {
                mount_any(&volume.device, &volume.path, false)?;
                disks.keep(&volume.path)?;
            }
            VolumeMode::Overlay { .. } => {
                let Some((_, directory)) = merged.iter().find(|(known, _)| *known == volume) else {
                    continue;
                };
                let source = format!("/proc/self/fd/{}", directory.as_raw_fd());
                mount_bind(source, volume.path.as_str())
                    .map_err(|error| format!("volume at {}: {error}", volume.path))?;
            }
        }
    }
    Ok(disks)
}

impl Disks {
    fn keep(&mut self, path: &str) -> Result<(), String> {
        self.writable.push(open_directory(path)?);
        Ok(())
    }
}

fn open_directory(path: &str) -> Result<OwnedFd, String> {
    open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|error| format!("{path}: {error}"))
}

fn make_directories(path: &str) -> Result<(), String> {
    fs::create_dir_all(path).map_err(|error| format!("{path}: {error}"))
}

/// Mounts with the first kind of file system that recognises the disk.
fn mount_any(device: &str, target: &str, read_only: bool) -> Result<(), String> {
    let (kinds, flags) = match read_only {
        true => (READ_ONLY_KINDS.as_slice(), MountFlags::RDONLY),
        false => (READ_WRITE_KINDS.as_slice(), MountFlags::NOATIME),
    };
    let mut last = Errno::INVAL;
    for kind in kinds {
        match mount(device, target, *kind, flags, None::<&CStr>) {
            Ok(()) => return Ok(()),
            // Another kind of file system, or one that the kernel does not know.
            Err(error @ (Errno::INVAL | Errno::NODEV)) => last = error,
            Err(error) => return Err(format!("cannot mount {device} on {target}: {error}")),
        }
    }
    Err(format!(
        "cannot mount {device} on {target}: no known file system ({last})"
    ))
}

fn overlay(lower: &str, upper: &str, target: &str) -> Result<(), String> {
    let options = format!("lowerdir={lower},upperdir={upper}/upper,workdir={upper}/work");
    let options = CString::new(options).map_err(|error| error.to_string())?;
    mount(
        c"overlay",
        target,
        c"overlay",
        MountFlags::empty(),
        options.as_c_str(),
    )
    .map_err(|error| format!("cannot mount the overlay on {target}: {error}"))
}

fn merge(number: usize, base: &str, layer: &str, disks: &mut Disks) -> Result<OwnedFd, String> {
    let place = format!("/mnt/volume-{number}");
    let [lower, upper, merged] = ["base", "layer", "merged"].map(|name| format!("{place}/{name}"));
    for directory in [&lower, &upper, &merged] {
        make_directories(directory)?;
    }
    mount_any(base, &lower, true)?;
    mount_any(layer, &upper, false)?;
    disks.keep(&upper)?;
    make_directories(&format!("{upper}/upper"))?;
    make_directories(&format!("{upper}/work"))?;
    overlay(&lower, &upper, &merged)?;
    open_directory(&merged)
}

fn enter_root() -> Result<(), String> {
    // What is only here to boot gives its memory back.
    let _ = fs::remove_dir_all("/modules");
    let _ = fs::remove_file("/init");
    for name in ["dev", "proc", "sys"] {
        let target = format!("/mnt/root/{name}");
        // An image may have a link or a file there, which a mount cannot cover safely.
        if !fs::symlink_metadata(&target).is_ok_and(|about| about.is_dir()) {
            let _ = fs::remove_file(&target);
            make_directories(&target)?;
        }
        mount_move(format!("/{name}"), target.as_str()).map_err(|error| format!("{target}: {error}"))?;
    }
    let switch = || -> Result<(), Errno> {
        chdir("/mnt/root")?;
        mount_move(".", "/")?;
        chroot(".")?;
        chdir("/")
    };
    switch().map_err(|error| format!("cannot enter the container's root: {error}"))
}
