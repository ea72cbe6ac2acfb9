//! Whether a VMM filters its own system calls, beside the filters that it was started with.
//!
//! The kernel tells of each thread how many filters it bears: `Seccomp_filters` of `/proc/PID/task/TID/status`, since
//! Linux 5.9. A filter is never taken off and comes down to each thread that a thread makes. So one that bears more than
//! the process was started with has put one on.
//!
//! Firecracker and Cloud Hypervisor give each of their threads a filter of its own when that begins its work, after it was
//! made; other threads of theirs, such as those that the kernel makes for them, tell nothing. QEMU filters all at once.
//! Threads that the kernel makes for a process run nothing of it; they are known by flags that no process can give itself.
//!
//! This sees that a VMM was started as it should be. It is no proof against a VMM that was taken over before the look: its
//! threads call themselves what they like.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use hypeman_jail::{Item, Report};

use crate::blocking::blocking;
use crate::{VmmError, VmmKind};

/// A thread that was just made puts its filter on within this many looks.
const LOOKS: u32 = 50;
const PAUSE: Duration = Duration::from_millis(2);

/// What is read of one thread.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Thread {
    name: String,
    /// The one that the process began with. It is called as its program's file.
    is_first: bool,
    /// The kernel made it for the process, and runs it itself.
    is_kernels: bool,
    /// `None` where the kernel does not tell.
    filters: Option<u32>,
}

/// How many filters the calling thread bears: those come down to what it starts.
pub(super) fn ours() -> u32 {
    let status = fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    parse(&status).and_then(|thread| thread.filters).unwrap_or(0)
}

/// A VMM that was just started, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    pub(super) kind: VmmKind,
    pub(super) pid: u32,
    /// How many filters its first thread began with.
    pub(super) started_with: u32,
    /// The operator requires all of a jail.
    pub(super) required: bool,
}

impl Look {
    /// Completes the report of what it bears, now that it runs.
    ///
    /// # Errors
    /// It does not filter itself, and all of a jail is required.
    pub(super) async fn complete(self, report: Option<Report>) -> Result<Option<Report>, VmmError> {
        let Some(mut report) = report else {
            return Ok(None);
        };
        let missing = self.missing().await;
        if let Some(reason) = &missing {
            if self.required {
                return Err(VmmError::Unavailable(format!(
                    "hypervisor.jail is required, and the VMM does not filter its own system calls: {reason}"
                )));
            }
            tracing::warn!(
                pid = self.pid,
                reason,
                "a VMM does not filter its own system calls"
            );
        }
        report.note(Item::Seccomp, missing);
        Ok(Some(report))
    }

    /// Why it is not in force, after as many looks as it takes.
    async fn missing(self) -> Option<String> {
        let mut looks = LOOKS;
        loop {
            let reason = match blocking(move || threads(self.pid)).await {
                Ok(threads) => missing(self.kind, &threads, self.started_with),
                Err(error) => Some(format!("its threads cannot be looked at: {error}")),
            }?;
            looks -= 1;
            if looks == 0 || !filters_by_thread(self.kind) {
                return Some(reason);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

fn threads(pid: u32) -> io::Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(Path::new("/proc").join(pid.to_string()).join("task"))? {
        // One that has ended meanwhile.
        let directory = entry?.path();
        let Ok(status) = fs::read_to_string(directory.join("status")) else {
            continue;
        };
        let stat = fs::read_to_string(directory.join("stat")).unwrap_or_default();
        threads.extend(parse(&status).map(|thread| Thread {
            is_kernels: is_kernels(&stat),
            ..thread
        }));
    }
    Ok(threads)
}

/// Name, place and filters of what a `status` tells. A name cannot break a line: the kernel writes a newline as `\n`.
fn parse(status: &str) -> Option<Thread> {
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim)
    };
    Some(Thread {
        name: value("Name:")?.to_owned(),
        is_first: value("Tgid:")? == value("Pid:")?,
        is_kernels: false,
        filters: value("Seccomp_filters:").and_then(|count| count.parse().ok()),
    })
}

fn filters_by_thread(kind: VmmKind) -> bool {
    matches!(kind, VmmKind::Firecracker | VmmKind::CloudHypervisor)
}

/// What a thread does for its VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// It is the first one.
    First,
    /// It is called so, with a number where there are several.
    Named(&'static str),
}

impl Role {
    fn is_of(self, thread: &Thread) -> bool {
        match self {
            Self::First => thread.is_first,
            Self::Named(name) => {
                let rest = thread.name.strip_prefix(name);
                rest.is_some_and(|rest| rest.trim_start().bytes().all(|byte| byte.is_ascii_digit()))
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::First => "the first",
            Self::Named(name) => name,
        }
    }
}

/// Threads that must be there and filtered: what runs guest code, what carries out commands, what hears them.
fn required(kind: VmmKind) -> &'static [Role] {
    match kind {
        VmmKind::Firecracker => &[Role::Named("fc_vcpu"), Role::First, Role::Named("fc_api")],
        VmmKind::CloudHypervisor => &[
            Role::Named("vcpu"),
            Role::Named("vmm"),
            Role::Named("http-server"),
        ],
        _ => &[],
    }
}

/// Flags of `include/linux/sched.h` that only the kernel sets: `PF_IO_WORKER`, `PF_USER_WORKER` (of vhost and KVM, since
/// Linux 6.4) and `PF_KTHREAD`.
const KERNELS: u32 = 0x0000_0010 | 0x0000_4000 | 0x0020_0000;

/// Whether a `stat` is that of a thread that the kernel made: its ninth field has the flags, as proc(5) says. The second one
/// is the name in parentheses, which may have some of its own.
fn is_kernels(stat: &str) -> bool {
    let flags = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_ascii_whitespace().nth(6)?.parse::<u32>().ok());
    flags.is_some_and(|flags| flags & KERNELS != 0)
}

/// Why not all threads that must be are filtered by the VMM itself.
fn missing(kind: VmmKind, threads: &[Thread], started_with: u32) -> Option<String> {
    let roles = required(kind);
    let is_there = |role: &Role| threads.iter().any(|thread| role.is_of(thread));
    if let Some(absent) = roles.iter().find(|&role| !is_there(role)) {
        return Some(format!("its thread {:?} is not there", absent.name()));
    }
    let mut concerned = threads.iter().filter(|thread| match roles {
        [] => !thread.is_kernels,
        roles => roles.iter().any(|role| role.is_of(thread)),
    });
    if threads.is_empty() {
        return Some("it has no thread".to_owned());
    }
    concerned.find_map(|thread| match thread.filters {
        None => Some("the kernel does not tell (Linux 5.9 or newer does)".to_owned()),
        // What a VMM that was taken over calls its threads is shown escaped.
        Some(count) if count <= started_with => {
            Some(format!("its thread {:?} has no filter of its own", thread.name))
        }
        Some(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn threads_of(list: &[(&str, u32)]) -> Vec<Thread> {
        let thread = |(at, (name, filters)): (usize, &(&str, u32))| Thread {
            name: (*name).to_owned(),
            is_first: at == 0,
            is_kernels: false,
            filters: Some(*filters),
        };
        list.iter().enumerate().map(thread).collect()
    }

    #[test]
    fn a_status_is_read_as_the_kernel_writes_it() {
        let ids = "Umask:\t0022\nState:\tS (sleeping)\nTgid:\t70\nNgid:\t0\nPid:\t72\nPPid:\t1\n";
        let expected = Thread {
            name: "fc_vcpu 0".to_owned(),
            is_first: false,
            is_kernels: false,
            filters: Some(3),
        };
        let status = format!("Name:\tfc_vcpu 0\n{ids}Seccomp:\t2\nSeccomp_filters:\t3\n");
        assert_eq!(parse(&status), Some(expected));
        let older = parse("Name:\tfirecracker\nTgid:\t70\nPid:\t70\nSeccomp:\t2\n").unwrap();
        assert_eq!((older.is_first, older.filters), (true, None));
        assert_eq!(parse(""), None);
    }

    #[test]
    fn a_thread_of_the_kernel_is_known_by_its_flags_and_not_by_its_name() {
        let stat =
            |name: &str, flags: u32| format!("72 ({name}) S 1 70 70 0 -1 {flags} 0 0 0 0 0 0 0 0 20 0 3 0 9");
        for flags in [0x0000_0010, 0x0000_4050, 0x0020_8040] {
            assert!(is_kernels(&stat("vhost-70", flags)), "{flags:#x}");
            assert!(is_kernels(&stat("a) S 1 1 1 0 -1 0 (b", flags)), "{flags:#x}");
        }
        for name in ["vhost-70", "iou-wrk-70", "x) S 1 1 1 0 -1 2097152 (y"] {
            assert!(!is_kernels(&stat(name, 0x0040_0140)), "{name}");
        }
        assert!(!is_kernels("") && !is_kernels("72 (x) S 1"));
    }

    #[test]
    fn each_thread_that_matters_must_have_put_one_on() {
        let firecracker = |list: &[(&str, u32)]| missing(VmmKind::Firecracker, &threads_of(list), 2);
        let whole = [
            ("firecracker", 3),
            ("fc_api", 3),
            ("fc_vcpu 0", 3),
            ("fc_vcpu 1", 3),
        ];
        assert_eq!(firecracker(&whole), None);
        // The kernel's own thread bears what its maker bore then.
        assert_eq!(
            firecracker(&[&whole[..], &[("kvm-nx-lpage-re", 2)]].concat()),
            None
        );
        // Its file may be called as it likes.
        let mut renamed = whole;
        renamed[0].0 = "vmm-1.15.1";
        assert_eq!(firecracker(&renamed), None);
        for (at, (name, _)) in whole.iter().enumerate() {
            let mut list = whole;
            list[at].1 = 2;
            assert!(firecracker(&list).unwrap().contains(name));
        }
        assert!(firecracker(&whole[..2]).unwrap().contains("fc_vcpu"));

        let started_with = 1;
        let cloud_hypervisor =
            |list: &[(&str, u32)]| missing(VmmKind::CloudHypervisor, &threads_of(list), started_with);
        let whole = [
            ("cloud-hyperviso", 1),
            ("vmm", 2),
            ("http-server", 2),
            ("vcpu0", 2),
        ];
        assert_eq!(cloud_hypervisor(&whole), None);
        assert!(cloud_hypervisor(&whole[..3]).unwrap().contains("vcpu"));
        let others = [&whole[..3], &[("vcpu_manager", 2)]].concat();
        assert!(cloud_hypervisor(&others).unwrap().contains("vcpu"));
    }

    #[test]
    fn all_of_a_qemu_is_filtered_or_none_of_it_is() {
        let qemu = |list: &[(&str, u32)]| missing(VmmKind::Qemu, &threads_of(list), 1);
        let whole = [("qemu-system-x86", 2), ("CPU 0/KVM", 2), ("vhost-7", 1)];
        assert!(
            qemu(&whole).unwrap().contains("vhost-7"),
            "a name makes no thread the kernel's"
        );
        let mut threads = threads_of(&whole);
        threads[2].is_kernels = true;
        assert_eq!(missing(VmmKind::Qemu, &threads, 1), None);
        assert!(qemu(&[("qemu-system-x86", 1)]).is_some());
        assert!(
            qemu(&[("qemu-system-x86", 2), ("CPU 0/KVM", 1)])
                .unwrap()
                .contains("CPU 0")
        );
        assert!(qemu(&[]).is_some());
    }

    #[test]
    fn a_kernel_that_does_not_tell_is_no_proof() {
        let thread = Thread {
            name: "qemu-system-x86".to_owned(),
            is_first: true,
            is_kernels: false,
            filters: None,
        };
        assert!(missing(VmmKind::Qemu, &[thread], 0).unwrap().contains("5.9"));
    }

    #[test]
    fn this_process_is_seen_as_it_is() {
        let threads = threads(std::process::id()).unwrap();
        assert!(!threads.is_empty());
        // No test puts a filter on the process that it runs in.
        assert!(missing(VmmKind::Qemu, &threads, ours()).is_some());
    }
}
