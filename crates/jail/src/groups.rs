//! Control groups of version 2: limits of time, memory, threads and disk traffic.
//!
//! ```text
//!  /sys/fs/cgroup/hypeman/           controllers on, no process of its own
//!                    └─ vm-<uid>/    one machine; born there, never moved
//! ```
//!
//! The groups lie beside the server's own, because machines outlive it. They are named after user ids: whoever holds
//! the lock of an id is the only one to make or remove its group.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::{Item, Limits};

const ROOT: &str = "/sys/fs/cgroup";
const PARENT: &str = "hypeman";
/// `f_type` of a mounted hierarchy of version 2.
const CGROUP2: rustix::fs::FsWord = 0x6367_7270;
/// The period that a share of processor time is counted in, in microseconds.
const PERIOD: u64 = 100_000;

/// The group that holds those of all machines.
#[derive(Debug)]
pub(crate) struct Groups {
    parent: PathBuf,
    controllers: Vec<&'static str>,
}

/// A group for a process to be born in.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) directory: OwnedFd,
    /// Which limits it sets, and why not the others.
    pub(crate) items: Vec<(Item, Option<String>)>,
}

impl Groups {
    /// Makes the group of all machines, with every controller that this host has.
    ///
    /// # Errors
    /// There are none of version 2 here, or they are not ours to use; in words for an operator.
    pub(crate) fn open() -> Result<Self, String> {
        Self::open_in(Path::new(ROOT))
    }

    fn open_in(root: &Path) -> Result<Self, String> {
        let is_version_2 = rustix::fs::statfs(root).is_ok_and(|about| about.f_type == CGROUP2);
        if !is_version_2 {
            return Err(match root.join("memory").is_dir() {
                true => "this host has control groups of version 1: boot it with systemd.unified_cgroup_hierarchy=1"
                    .to_owned(),
                false => format!("no control groups are mounted at {}", root.display()),
            });
        }
        let parent = root.join(PARENT);
        let made = fs::create_dir(&parent);
        if let Err(error) = made
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(format!("cannot make {}: {error}", parent.display()));
        }
        let controllers = ["cpu", "memory", "pids", "io"]
            .into_iter()
            .filter(|controller| {
                let enable =
                    |group: &Path| fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
                enable(root).is_ok() && enable(&parent).is_ok()
            })
            .collect();
        Ok(Self { parent, controllers })
    }

    /// Why no machine here gets this limit, where the host keeps its controller to itself.
    pub(crate) fn missing(&self, item: Item) -> Option<String> {
        let controller = match item {
            Item::Cpu => "cpu",
            Item::Memory => "memory",
            Item::Processes => "pids",
            Item::Io => "io",
            _ => return None,
        };
        (!self.controllers.contains(&controller))
            .then(|| format!("the controller {controller} is not available in {ROOT}"))
    }

    /// Removes the groups of machines that are gone. `reserve` holds a user id that no live machine has.
    pub(crate) fn sweep<T>(&self, reserve: impl Fn(u32) -> Option<T>) {
        for entry in fs::read_dir(&self.parent).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let uid = name
                .to_str()
                .and_then(|name| name.strip_prefix("vm-")?.parse().ok());
            if let Some(_reserved) = uid.and_then(&reserve) {
                // One that is not empty is somebody's all the same.
                let _ = fs::remove_dir(entry.path());
            }
        }
    }

    /// A group with these limits for the machine of a user. An empty one of that name is used again.
    pub(crate) fn make(&self, uid: u32, limits: &Limits) -> io::Result<Group> {
        let path = self.parent.join(format!("vm-{uid}"));
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let mut items = Vec::new();
        for (item, file, value) in settings(limits) {
            let missing = match (value, self.missing(item)) {
                (Err(reason), _) | (Ok(_), Some(reason)) => Some(reason),
                (Ok(value), None) => fs::write(path.join(file), &value)
                    .err()
                    .map(|error| format!("cannot write {value:?} to {file}: {error}")),
            };
            items.push((item, missing));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags, Mode::empty())?;
        Ok(Group { directory, items })
    }
}

type Setting = (Item, &'static str, Result<String, String>);

/// The files of a group and what goes into them.
fn settings(limits: &Limits) -> Vec<Setting> {
    let mut settings: Vec<Setting> = Vec::new();
    if let Some(processors) = limits.processors {
        let quota = u64::from(processors.max(1)) * PERIOD;
        settings.push((Item::Cpu, "cpu.max", Ok(format!("{quota} {PERIOD}"))));
    }
    if let Some(bytes) = limits.memory_bytes {
        settings.push((Item::Memory, "memory.max", Ok(bytes.to_string())));
    }
    if let Some(processes) = limits.processes {
        settings.push((Item::Processes, "pids.max", Ok(processes.to_string())));
    }
    if let (Some(rate), Some(file)) = (limits.disk_bytes_per_second, &limits.disk) {
        let value = disk_of(file)
            .map(|(major, minor)| format!("{major}:{minor} rbps={rate} wbps={rate}"))
            .map_err(|error| format!("cannot tell the disk of {}: {error}", file.display()));
        settings.push((Item::Io, "io.max", value));
    }
    settings
}

/// The whole disk that a file lies on: traffic is limited there, not on a partition.
fn disk_of(file: &Path) -> io::Result<(u32, u32)> {
    let device = File::open(file)?.metadata()?.dev();
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    if major == 0 {
        return Err(io::Error::other("its file system lies on no single disk"));
    }
    let link = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"))?;
    if !link.join("partition").exists() {
        return Ok((major, minor));
    }
    let text = fs::read_to_string(link.with_file_name("dev"))?;
    let numbers = text.trim().split_once(':').and_then(|(major, minor)| {
        let number = |text: &str| text.parse::<u32>().ok();
        Some((number(major)?, number(minor)?))
    });
    numbers.ok_or_else(|| io::Error::other("the kernel names no disk for its partition"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_become_lines_for_the_kernel() {
        let limits = Limits {
            memory_bytes: Some(1 << 30),
            processors: Some(3),
            processes: Some(64),
            ..Limits::default()
        };
        let lines: Vec<_> = settings(&limits)
            .into_iter()
            .map(|(_, file, value)| format!("{file} {}", value.unwrap()))
            .collect();
        assert_eq!(
            lines,
            ["cpu.max 300000 100000", "memory.max 1073741824", "pids.max 64"]
        );
        assert!(settings(&Limits::default()).is_empty());
    }

    #[test]
    fn disk_traffic_is_limited_on_the_whole_disk_or_not_at_all() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let limits = Limits {
            disk_bytes_per_second: Some(100),
            disk: Some(file.path().to_owned()),
            ..Limits::default()
        };
        let (item, name, value) = settings(&limits).remove(0);
        assert_eq!((item, name), (Item::Io, "io.max"));
        match disk_of(file.path()) {
            Ok((major, minor)) => assert_eq!(value.unwrap(), format!("{major}:{minor} rbps=100 wbps=100")),
            Err(error) => assert!(value.unwrap_err().contains(&error.to_string())),
        }
    }

    #[test]
    fn hosts_without_groups_of_version_2_are_told_what_to_do() {
        let root = tempfile::tempdir().unwrap();
        let said = Groups::open_in(root.path()).unwrap_err();
        assert!(said.contains("no control groups are mounted"), "{said}");
        fs::create_dir(root.path().join("memory")).unwrap();
        let said = Groups::open_in(root.path()).unwrap_err();
        assert!(
            said.contains("version 1") && said.contains("systemd.unified_cgroup_hierarchy=1"),
            "{said}"
        );
        assert_eq!(
            fs::read_dir(root.path()).unwrap().count(),
            1,
            "nothing is made there"
        );
    }

    #[test]
    fn a_controller_that_is_not_ours_takes_its_own_limit_only() {
        let parent = tempfile::tempdir().unwrap();
        let groups = Groups {
            parent: parent.path().to_owned(),
            controllers: vec!["cpu", "pids"],
        };
        let limits = Limits {
            memory_bytes: Some(1 << 30),
            processors: Some(3),
            processes: Some(64),
            ..Limits::default()
        };
        let group = groups.make(7, &limits).unwrap();
        let memory = groups.missing(Item::Memory);
        assert!(
            memory.as_ref().unwrap().contains("controller memory"),
            "{memory:?}"
        );
        assert!(groups.missing(Item::Io).unwrap().contains("controller io"));
        assert_eq!(
            group.items,
            [(Item::Cpu, None), (Item::Memory, memory), (Item::Processes, None)]
        );
        let written = |file: &str| fs::read_to_string(parent.path().join("vm-7").join(file));
        assert_eq!(written("cpu.max").unwrap(), "300000 100000");
        assert_eq!(written("pids.max").unwrap(), "64");
        assert!(written("memory.max").is_err());
    }
}
