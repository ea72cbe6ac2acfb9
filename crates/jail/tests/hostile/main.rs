//! A hostile program in the VMM's place: what it tries, and what it cannot reach.
//!
//! The program is this one, started again with the name of [`intruder::attempts`] to run; its orders lie in its working
//! directory, and it tells the outcome of each attempt on a line.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

mod intruder;
mod later;
mod tap;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use hypeman_jail::{Confined, Item, Jail, JailOptions, JailSpec, Launch, Lent, Limits, Memory, Mode, Show};
use rustix::process::{Pid, WaitOptions, waitpid};

const FILE_LIMIT: u64 = 1 << 20;
const DESCRIPTORS: u64 = 64;
const PROCESSES: u64 = 24;
/// User ids of one scene.
const IDS: u32 = 1000;
/// How many scenes there have been.
static SCENES: AtomicU32 = AtomicU32::new(0);

/// A data directory with two machines, and a jail for the first.
struct Scene {
    directory: tempfile::TempDir,
    jail: Arc<Jail>,
}

/// `None`, with the reason printed, where this host lacks something.
fn scene() -> Option<Scene> {
    let directory = tempfile::Builder::new().prefix("hj").tempdir().unwrap();
    // Control groups are named after users: no two scenes may have the same.
    let number = SCENES.fetch_add(1, Ordering::Relaxed);
    let jail = Arc::new(Jail::new(JailOptions {
        state: directory.path().join("state"),
        first_id: 200_000 + number * IDS,
        ids: IDS,
        ..JailOptions::default()
    }));
    if !jail.confines().unwrap() {
        println!("SKIPPED: no jail here: {}", jail.report().missing_text());
        return None;
    }
    for name in ["one", "other"] {
        let machine = directory.path().join("data").join(name);
        fs::create_dir_all(&machine).unwrap();
        for file in ["disk", "secret", "memory"] {
            fs::write(machine.join(file), format!("{file} of {name}")).unwrap();
            fs::set_permissions(machine.join(file), fs::Permissions::from_mode(0o600)).unwrap();
        }
        fs::create_dir(machine.join("work")).unwrap();
    }
    fs::set_permissions(directory.path().join("data"), fs::Permissions::from_mode(0o700)).unwrap();
    Some(Scene { directory, jail })
}

impl Scene {
    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    fn spec(&self) -> JailSpec {
        let one = self.data().join("one");
        JailSpec {
            show: vec![
                Show::run(std::env::current_exe().unwrap()),
                Show::own(one.join("disk")),
                Show::shared(self.data().join("other/disk")),
                Show::own(one.join("work")),
            ],
            devices: vec!["/dev/kvm".into()],
            limits: Limits {
                file_bytes: Some(FILE_LIMIT),
                descriptors: Some(DESCRIPTORS),
                processes: Some(PROCESSES),
                memory_bytes: Some(256 << 20),
                processors: Some(1),
                ..Limits::default()
            },
        }
    }

    /// Lets the intruder do what the orders say; its lines, and what confined it.
    fn intrude(&self, spec: &JailSpec, orders: &[(&str, String)], lent: Option<Lent>) -> Intrusion {
        let confined = self.start(spec, orders, &[], lent);
        self.finish(confined)
    }

    /// Starts the intruder.
    fn start(
        &self,
        spec: &JailSpec,
        orders: &[(&str, String)],
        keep: &[OwnedFd],
        lent: Option<Lent>,
    ) -> Confined {
        let work = self.data().join("one/work");
        let text: Vec<String> = orders
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        fs::write(work.join("orders"), text.join("\n")).unwrap();
        fs::set_permissions(work.join("orders"), fs::Permissions::from_mode(0o644)).unwrap();
        let file = File::create(self.output()).unwrap();
        let arguments = [
            "--exact",
            "intruder::attempts",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ];
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        let launch = Launch {
            program: &std::env::current_exe().unwrap(),
            arguments: &arguments,
            directory: &work,
            output: file.as_fd(),
            keep,
            lent,
        };
        self.jail.spawn(spec, launch).unwrap()
    }

    /// Starts a program that does nothing.
    fn sleep(&self, spec: &JailSpec) -> Confined {
        let output = File::create(self.directory.path().join("sleepers")).unwrap();
        let arguments = [OsString::from("600")];
        let launch = Launch {
            program: Path::new("/usr/bin/sleep"),
            arguments: &arguments,
            directory: Path::new("/"),
            output: output.as_fd(),
            keep: &[],
            lent: None,
        };
        self.jail.spawn(spec, launch).unwrap()
    }

    fn output(&self) -> PathBuf {
        self.directory.path().join("output")
    }

    /// Waits for its end, and reads what it said.
    fn finish(&self, confined: Confined) -> Intrusion {
        waitpid(Pid::from_raw(confined.pid as i32), WaitOptions::empty()).unwrap();
        let text = fs::read_to_string(self.output()).unwrap();
        let outcomes = text
            .lines()
            .filter_map(|line| line.rsplit_once("TRIED ").map(|(_, rest)| rest))
            .filter_map(|line| line.split_once(": "))
            .map(|(name, outcome)| (name.to_owned(), outcome.to_owned()))
            .collect();
        Intrusion {
            outcomes,
            confined,
            text,
        }
    }
}

struct Intrusion {
    outcomes: BTreeMap<String, String>,
    confined: Confined,
    text: String,
}

impl Intrusion {
    #[track_caller]
    fn expect(&self, name: &str, wanted: &[&str]) {
        let outcome = self.outcomes.get(name).map(String::as_str);
        assert!(
            outcome.is_some_and(|outcome| wanted.contains(&outcome)),
            "{name}: {outcome:?} instead of {wanted:?}\n{}",
            self.text
        );
    }

    #[track_caller]
    fn number(&self, name: &str) -> u64 {
        let outcome = self.outcomes.get(name);
        outcome
            .and_then(|text| text.parse().ok())
            .unwrap_or_else(|| panic!("{name}: {outcome:?}\n{}", self.text))
    }

    fn has(&self, item: Item) -> bool {
        has(&self.confined, item)
    }
}

/// Whether this host's jail does this; tells why not.
fn has(confined: &Confined, item: Item) -> bool {
    let report = &confined.report;
    if let Some((_, reason)) = report.missing.iter().find(|(other, _)| *other == item) {
        println!("SKIPPED: the jail lacks {}: {reason}", item.name());
    }
    report.active.contains(&item)
}

fn end(confined: &Confined) {
    let pid = Pid::from_raw(confined.pid as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    waitpid(Some(pid), WaitOptions::empty()).unwrap();
}

#[test]
fn files_and_devices_of_others_are_out_of_reach() {
    let Some(scene) = scene() else { return };
    let other = scene.data().join("other/secret");
    let orders = [
        ("read", other.display().to_string()),
        ("list", scene.data().display().to_string()),
        (
            "write-shared",
            scene.data().join("other/disk").display().to_string(),
        ),
        ("write-own", scene.data().join("one/disk").display().to_string()),
        ("beside", scene.data().join("one").display().to_string()),
    ];
    let tried = scene.intrude(&scene.spec(), &orders, None);
    tried.expect("read of another's file", &["ENOENT"]);
    tried.expect("list of the data directory", &["one other"]);
    tried.expect("list beside its own", &["disk work"]);
    tried.expect("read of what is shared", &["done"]);
    tried.expect("write to what is shared", &["EROFS", "EACCES"]);
    tried.expect("write to its own", &["done"]);
    for path in [
        "/etc/shadow",
        "/etc/passwd",
        "/root",
        "/home",
        "/sys",
        "/var",
        "/boot",
    ] {
        tried.expect(&format!("look at {path}"), &["ENOENT"]);
    }
    for path in [
        "/dev/mem",
        "/dev/kmsg",
        "/dev/vda",
        "/dev/sda",
        "/dev/fuse",
        "/dev/net/tun",
        "/dev/shm",
    ] {
        tried.expect(&format!("look at {path}"), &["ENOENT"]);
    }
    tried.expect("make of a file in the root", &["EROFS", "EACCES"]);
    tried.expect("make of a file in /usr", &["EROFS", "EACCES"]);
    tried.expect("make of a file in /dev", &["EACCES"]);
    tried.expect("make of a device", &["EPERM", "EACCES"]);
    tried.expect("mount", &["EPERM"]);
    tried.expect("remount of what is shared", &["EPERM"]);
    tried.expect("change of root", &["EPERM"]);
    tried.expect(
        "list of the root's parent",
        &[tried.outcomes["list of the root"].as_str()],
    );
    // What the host's owner gave is undone by nobody, but only what was named has changed.
    let about = |path: &Path| fs::metadata(path).unwrap();
    assert_eq!(about(&other).uid(), 0);
    assert_eq!(about(&other).mode() & 0o777, 0o600);
    assert_eq!(about(&scene.data().join("other/disk")).mode() & 0o777, 0o640);
    assert_eq!(
        Some(about(&scene.data().join("one/disk")).uid()),
        tried.confined.report.user
    );
}

#[test]
fn processes_of_others_are_out_of_reach_and_rights_are_not_regained() {
    let Some(scene) = scene() else { return };
    let orders = [("server", std::process::id().to_string())];
    let tried = scene.intrude(&scene.spec(), &orders, None);
    if tried.has(Item::PidNamespace) {
        tried.expect("own number", &["1"]);
        tried.expect("processes", &["1"]);
        tried.expect("signal to the server", &["ESRCH"]);
        tried.expect("read of the kernel's settings", &["ENOENT"]);
    }
    tried.expect("trace", &["EPERM"]);
    tried.expect("read of another's memory", &["EPERM"]);
    tried.expect("become root", &["EPERM", "EINVAL"]);
    tried.expect("join the root group", &["EPERM", "EINVAL"]);
    for namespace in ["user", "mount", "network", "pid"] {
        tried.expect(&format!("a new {namespace} namespace"), &["EPERM"]);
    }
    tried.expect("a new user namespace by clone", &["EPERM"]);
    tried.expect("a module", &["EPERM"]);
    tried.expect("a program for the kernel", &["EPERM"]);
    tried.expect("reboot", &["EPERM"]);
    let status = &tried.outcomes["status"];
    for word in [
        "CapInh=0000000000000000",
        "CapPrm=0000000000000000",
        "CapEff=0000000000000000",
        "CapBnd=0000000000000000",
        "CapAmb=0000000000000000",
        "NoNewPrivs=1",
        "Seccomp=2",
    ] {
        assert!(status.contains(word), "{word} is not in {status}");
    }
    let user = tried.confined.report.user.unwrap();
    assert!(
        status.contains(&format!("Uid={user} {user} {user} {user}")),
        "{status}"
    );
    assert!(
        status.contains("Groups= ") || status.contains("Groups=,"),
        "{status}"
    );
}

#[test]
fn no_network_is_in_reach() {
    let Some(scene) = scene() else { return };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let orders = [("port", listener.local_addr().unwrap().port().to_string())];
    let tried = scene.intrude(&scene.spec(), &orders, None);
    tried.expect("a raw socket", &["EPERM", "EACCES"]);
    if tried.has(Item::NetworkNamespace) {
        tried.expect("a connection to the host", &["ENETUNREACH"]);
        tried.expect("interfaces", &["lo"]);
    }
    if tried.has(Item::UtsNamespace) {
        tried.expect("host name", &["hypeman"]);
    }
}

#[test]
fn what_it_uses_is_limited() {
    let Some(scene) = scene() else { return };
    let orders = [
        ("grow", scene.data().join("one/disk").display().to_string()),
        ("limit", FILE_LIMIT.to_string()),
        ("exhaust", "yes".to_owned()),
    ];
    let tried = scene.intrude(&scene.spec(), &orders, None);
    tried.expect("a file beyond its limit", &["EFBIG"]);
    tried.expect("a hole beyond its limit", &["EFBIG"]);
    assert!(fs::metadata(scene.data().join("one/disk")).unwrap().len() <= FILE_LIMIT);
    assert!(tried.number("descriptors") < DESCRIPTORS);
    tried.expect("one more descriptor", &["EMFILE"]);
    assert!(tried.number("processes forked") < PROCESSES);
    tried.expect("one more process", &["EAGAIN"]);
    if tried.has(Item::Memory) {
        let spec = scene.spec();
        let tried = scene.intrude(&spec, &[("devour", (1_u64 << 30).to_string())], None);
        assert!(
            !tried.outcomes.contains_key("memory beyond its limit"),
            "{}",
            tried.text
        );
    }
}

#[test]
fn its_control_group_holds_the_limits_that_are_told() {
    let Some(scene) = scene() else { return };
    let sleeper = scene.sleep(&scene.spec());
    let group = format!("hypeman/vm-{}", sleeper.report.user.unwrap());
    for (item, file, value) in [
        (Item::Cpu, "cpu.max", "100000 100000"),
        (Item::Memory, "memory.max", "268435456"),
        (Item::Processes, "pids.max", "24"),
    ] {
        let path = Path::new("/sys/fs/cgroup").join(&group).join(file);
        // Processes are limited without a controller, too.
        if has(&sleeper, item) && (item != Item::Processes || path.exists()) {
            let member = fs::read_to_string(format!("/proc/{}/cgroup", sleeper.pid)).unwrap();
            assert!(member.trim_end().ends_with(&group), "{member}");
            assert_eq!(fs::read_to_string(path).unwrap().trim_end(), value, "{file}");
        }
    }
    end(&sleeper);
}

#[test]
fn memory_is_handed_over_once_and_cannot_be_written_to() {
    let Some(scene) = scene() else { return };
    let path = scene.data().join("other/memory");
    let memory = Lent::Memory(Memory {
        path: path.clone(),
        file: File::open(&path).unwrap(),
    });
    let orders = [("memory", path.display().to_string())];
    let tried = scene.intrude(&scene.spec(), &orders, Some(memory));
    tried.expect("memory by another name", &["ENOENT"]);
    tried.expect("memory as a file to read", &["ENOENT"]);
    tried.expect("memory", &["memory of other"]);
    tried.expect("write to memory", &["EBADF"]);
    tried.expect("shared mapping of memory", &["EACCES"]);
    tried.expect("private mapping of memory", &["done"]);
    tried.expect("hole in memory", &["EBADF"]);
    tried.expect("memory for writing through /proc", &["EACCES"]);
    tried.expect("memory once more", &["ENOSYS"]);
    assert_eq!(fs::read_to_string(&path).unwrap(), "memory of other");
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn two_jails_have_two_users_and_a_user_is_free_when_its_process_is_gone() {
    let Some(scene) = scene() else { return };
    let sleep = || scene.sleep(&JailSpec::default());
    let (one, other) = (sleep(), sleep());
    assert_ne!(one.report.user, other.report.user);
    for confined in [&one, &other] {
        // Seen from outside, it is that user, under that number.
        let about = fs::metadata(format!("/proc/{}", confined.pid)).unwrap();
        assert_eq!(Some(about.uid()), confined.report.user);
        let program = fs::read_link(format!("/proc/{}/exe", confined.pid)).unwrap();
        assert_eq!(program, fs::canonicalize("/usr/bin/sleep").unwrap());
        end(confined);
    }
}

#[test]
fn a_program_that_cannot_run_says_at_which_step() {
    let Some(scene) = scene() else { return };
    let output = File::create(scene.directory.path().join("output")).unwrap();
    let launch = |program: &'static str| Launch {
        program: Path::new(program),
        arguments: &[],
        directory: Path::new("/"),
        output: output.as_fd(),
        keep: &[],
        lent: None,
    };
    let error = scene
        .jail
        .spawn(&JailSpec::default(), launch("/nonexistent"))
        .unwrap_err();
    assert!(
        error.to_string().contains("/nonexistent: executing it"),
        "{error}"
    );
    let spec = JailSpec {
        show: vec![Show::read(scene.directory.path().join("nothing"))],
        ..JailSpec::default()
    };
    let error = scene.jail.spawn(&spec, launch("/usr/bin/true")).unwrap_err();
    assert!(error.to_string().contains("cannot show"), "{error}");
    std::os::unix::fs::symlink("/etc/shadow", scene.directory.path().join("link")).unwrap();
    let spec = JailSpec {
        show: vec![Show::own(scene.directory.path().join("link"))],
        ..JailSpec::default()
    };
    let error = scene.jail.spawn(&spec, launch("/usr/bin/true")).unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
    assert_eq!(fs::metadata("/etc/shadow").unwrap().uid(), 0);
}

#[test]
fn off_and_required_are_obeyed() {
    let jail = |mode| {
        Jail::new(JailOptions {
            mode,
            ..JailOptions::default()
        })
    };
    assert!(!jail(Mode::Off).confines().unwrap());
    assert!(!jail(Mode::Off).report().is_complete());
    let complete = jail(Mode::Auto).report().is_complete();
    match jail(Mode::Required).confines() {
        Ok(confines) => assert!(confines && complete),
        Err(error) => {
            assert!(!complete);
            assert!(
                error.to_string().contains("hypervisor.jail is required"),
                "{error}"
            );
        }
    }
}
