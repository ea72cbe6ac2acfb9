//! The kernel's own file systems.

use std::{ffi::CStr, fs, os::unix::fs::symlink, path::Path};

use rustix::{
    fs::{Mode, mkdir},
    io::Errno,
    mount::{MountFlags, mount},
};

use crate::log_line;

/// Mounts in the initramfs what the rest of the boot needs.
pub(super) fn mount_early() {
    for (kind, target) in [(c"devtmpfs", c"/dev"), (c"proc", c"/proc"), (c"sysfs", c"/sys")] {
        // There already, or its absence shows at once in what follows.
        let _ = mkdir(target, Mode::from_raw_mode(0o755));
        let _ = mount(kind, target, kind, MountFlags::empty(), None::<&CStr>);
    }
}

/// Mounts in the container's root what programs expect besides `/dev`, `/proc` and `/sys`, which come with us.
///
/// `/run` and `/tmp` stay the image's own, as containers know them: images keep directories there.
pub(super) fn mount_in_container() {
    let hardened = MountFlags::NOSUID | MountFlags::NOEXEC;
    let nodev = MountFlags::NOSUID | MountFlags::NODEV;
    let all = [
        (c"devpts", "/dev/pts", hardened, c"gid=5,mode=620,ptmxmode=666"),
        (c"tmpfs", "/dev/shm", nodev, c"mode=1777"),
        (c"mqueue", "/dev/mqueue", nodev | MountFlags::NOEXEC, c""),
        (
            c"cgroup2",
            "/sys/fs/cgroup",
            nodev | MountFlags::NOEXEC,
            c"nsdelegate",
        ),
    ];
    for (kind, target, flags, options) in all {
        // Fails where sysfs has the directory already.
        let _ = fs::create_dir(target);
        let options = (!options.is_empty()).then_some(options);
        match mount(kind, target, kind, flags, options) {
            // A kernel without message queues is no reason to stop.
            Ok(()) | Err(Errno::NODEV) => {}
            Err(error) => log_line!("cannot mount {target}: {error}"),
        }
    }
    for (target, link) in [
        ("/proc/self/fd", "/dev/fd"),
        ("/proc/self/fd/0", "/dev/stdin"),
        ("/proc/self/fd/1", "/dev/stdout"),
        ("/proc/self/fd/2", "/dev/stderr"),
    ] {
        if !Path::new(link).exists() {
            // The image's programs will say so if they need it.
            let _ = symlink(target, link);
        }
    }
}

/// Kernel settings that containers are used to: any user may ping and bind low ports.
pub(super) fn relax_for_containers() {
    for (setting, value) in [
        ("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"),
        ("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"),
    ] {
        // A kernel without the setting has no such restriction to lift.
        let _ = fs::write(setting, value);
    }
}
