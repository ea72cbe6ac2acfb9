//! The jail of this host: what it can do here, found out by doing it.
//!
//! ```text
//!  first use: shell ─► a trial that executes nothing ─► a step fails? leave its item out, try again ─► Ability
//!  start:     user ─► group ─► thread at its stage ─► process
//! ```

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::child::{Command, Maps, Plan, Step};
use crate::groups::{Group, Groups};
use crate::shell::Shell;
use crate::spawn::{Birth, Born, Line, Stillborn, spawn};
use crate::stage;
use crate::system::unshare;
use crate::user::{User, Users};
use crate::{
    Confined, Item, JailError, JailOptions, JailSpec, Launch, Lent, Limits, Mode, Report, Restraint, filter,
    opener, restraint,
};

/// How many starts leave their control groups behind until somebody tidies up.
const SWEEP: u32 = 32;

/// Namespaces that a jail can do without.
const NAMESPACES: [Item; 5] = [
    Item::NetworkNamespace,
    Item::IpcNamespace,
    Item::UtsNamespace,
    Item::PidNamespace,
    Item::UserNamespace,
];

/// What confines VMMs here. Cheap to make: the host is asked at the first use.
#[derive(Debug)]
pub struct Jail {
    options: JailOptions,
    users: Users,
    ability: OnceLock<Result<Ability, String>>,
    shell: Mutex<Option<Arc<Shell>>>,
    starts: AtomicU32,
}

/// What this host can do.
#[derive(Debug)]
struct Ability {
    /// Of [`NAMESPACES`].
    items: Vec<Item>,
    missing: Vec<(Item, String)>,
    groups: Result<Groups, String>,
}

impl Jail {
    /// A jail with these options.
    pub fn new(options: JailOptions) -> Self {
        Self {
            users: Users::new(options.first_id, options.ids),
            options,
            ability: OnceLock::new(),
            shell: Mutex::default(),
            starts: AtomicU32::new(0),
        }
    }

    /// What it was made with.
    pub fn options(&self) -> &JailOptions {
        &self.options
    }

    /// Whether processes are to be started by [`Jail::spawn`]: not where the operator or the host says no.
    ///
    /// # Errors
    /// The operator requires it and the host does not do all of it.
    pub fn confines(&self) -> Result<bool, JailError> {
        match (self.options.mode, self.ability()) {
            (Mode::Off, _) => Ok(false),
            (Mode::Auto, ability) => Ok(ability.is_ok()),
            (Mode::Required, Err(reason)) => Err(required(reason)),
            (Mode::Required, Ok(_)) => match self.report() {
                report if report.is_complete() => Ok(true),
                report => Err(required(&report.missing_text())),
            },
        }
    }

    /// What it would do with any process here.
    pub fn report(&self) -> Report {
        match self.ability() {
            Ok(ability) => Self::report_of(ability),
            Err(reason) => self.restraint(&Limits::default(), reason).1,
        }
    }

    /// What is left where [`Jail::confines`] says no and the operator does not: it needs no privilege.
    pub fn restrain(&self, limits: &Limits) -> Option<(Restraint, Report)> {
        match (self.options.mode, self.ability()) {
            (Mode::Off, _) | (_, Ok(_)) => None,
            (_, Err(reason)) => Some(self.restraint(limits, reason)),
        }
    }

    /// The same for a program that cannot be put into a jail, for this reason.
    ///
    /// # Errors
    /// The operator requires one.
    pub fn restrain_only(
        &self,
        limits: &Limits,
        reason: &str,
    ) -> Result<Option<(Restraint, Report)>, JailError> {
        match self.options.mode {
            Mode::Off => Ok(None),
            Mode::Auto => Ok(Some(self.restraint(limits, reason))),
            Mode::Required => Err(required(reason)),
        }
    }

    fn restraint(&self, limits: &Limits, reason: &str) -> (Restraint, Report) {
        let mut report = Report::default();
        // Whether a program filters itself shows when it runs.
        for item in Item::ALL.into_iter().filter(|item| *item != Item::Seccomp) {
            let in_force = self.options.mode != Mode::Off && restraint::ITEMS.contains(&item);
            report.note(item, (!in_force).then(|| reason.to_owned()));
        }
        (Restraint::new(limits), report)
    }

    fn report_of(ability: &Ability) -> Report {
        let mut report = Report::default();
        Self::note_always(&mut report, ability);
        for item in [Item::Processes, Item::Cpu, Item::Memory, Item::Io] {
            let missing = match &ability.groups {
                Ok(groups) => groups.missing(item),
                Err(reason) => Some(reason.clone()),
            };
            // Held by the limit of its user alone, too.
            report.note(item, missing.filter(|_| item != Item::Processes));
        }
        report
    }

    /// Notes what does not depend on the machine.
    fn note_always(report: &mut Report, ability: &Ability) {
        for item in [
            Item::User,
            Item::MountNamespace,
            Item::Capabilities,
            Item::NoNewPrivileges,
            Item::SystemCalls,
            Item::FileSize,
            Item::Descriptors,
        ] {
            report.note(item, None);
        }
        for item in &ability.items {
            report.note(*item, None);
        }
        report.missing.extend(ability.missing.iter().cloned());
    }

    fn ability(&self) -> Result<&Ability, &String> {
        self.ability
            .get_or_init(|| {
                if self.options.mode == Mode::Off {
                    return Err("hypervisor.jail is off".to_owned());
                }
                self.try_out()
                    .inspect_err(|reason| tracing::warn!(reason, "VMMs are hardly confined"))
                    .inspect(|ability| {
                        let missing = Self::report_of(ability).missing_text();
                        if !missing.is_empty() {
                            tracing::warn!(missing, "VMMs are confined as far as this host allows");
                        }
                    })
            })
            .as_ref()
    }

    /// Starts a program in a jail and returns once it executes.
    ///
    /// # Errors
    /// See [`JailError`]. No process is left.
    pub fn spawn(&self, spec: &JailSpec, launch: Launch<'_>) -> Result<Confined, JailError> {
        let ability = self
            .ability()
            .map_err(|reason| JailError::Unavailable(reason.clone()))?;
        spec.check()?;
        let user = self.users.take(&self.options.state)?;
        if let Ok(groups) = &ability.groups
            && self.starts.fetch_add(1, Ordering::Relaxed).is_multiple_of(SWEEP)
        {
            groups.sweep(|uid| self.users.reserve(&self.options.state, uid));
        }
        let group = match &ability.groups {
            Ok(groups) => Some(groups.make(user.uid, &spec.limits).map_err(|error| {
                JailError::io(
                    format!("cannot make a control group for user {}", user.uid),
                    error,
                )
            })?),
            Err(_) => None,
        };
        let mut report = Report {
            user: Some(user.uid),
            ..Report::default()
        };
        Self::note_always(&mut report, ability);
        note_limits(&mut report, &spec.limits, group.as_ref(), &ability.groups);
        let shell = self.shell(spec)?;
        let lent = launch.lent;
        let attempt = Attempt {
            spec,
            user: &user,
            items: &ability.items,
            group: group.as_ref(),
        };
        let born = attempt
            .run(
                &shell,
                launch.program,
                launch.arguments,
                launch.directory,
                launch.output.as_raw_fd(),
                launch.keep.iter().map(AsRawFd::as_raw_fd).collect(),
                lent.as_ref().map(Lent::filter),
            )
            .map_err(|failure| match failure {
                Stillborn::Before(error) => error,
                Stillborn::At(step, source) => JailError::io(
                    format!("cannot start {}: {}", launch.program.display(), step.name()),
                    source,
                ),
            })?;
        if let (Some(listener), Some(lent)) = (born.listener, lent)
            && let Err(error) = opener::answer(listener, lent)
        {
            // It would wait for ever; nobody answers now, so it ends by itself.
            tracing::warn!(%error, "nobody can answer a VMM");
        }
        Ok(Confined {
            pid: born.pid,
            report,
        })
    }

    /// The shell, made anew when it lacks a place that is needed.
    fn shell(&self, spec: &JailSpec) -> Result<Arc<Shell>, JailError> {
        let wanted = stage::tops(spec);
        let mut shell = self.shell.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(made) = shell.as_ref().filter(|made| made.has_tops(&wanted)) {
            return Ok(Arc::clone(made));
        }
        let mut tops: Vec<PathBuf> = shell
            .as_ref()
            .map(|made| made.tops().to_vec())
            .unwrap_or_default();
        tops.extend(wanted);
        tops.sort();
        tops.dedup();
        let made = Arc::new(Shell::make(&tops, &self.scratch()?)?);
        *shell = Some(Arc::clone(&made));
        Ok(made)
    }

    /// Where a shell is mounted while it is made, seen by its maker alone.
    fn scratch(&self) -> Result<PathBuf, JailError> {
        let path = self.options.state.join("shell");
        std::fs::create_dir_all(&path)
            .map_err(|error| JailError::io(format!("cannot make {}", path.display()), error))?;
        Ok(path)
    }

    /// Finds out what the host allows.
    fn try_out(&self) -> Result<Ability, String> {
        may_confine()?;
        let text = |error: JailError| error.to_string();
        let mut items = Vec::new();
        let mut missing = Vec::new();
        for item in NAMESPACES {
            match try_namespace(item) {
                Ok(()) => items.push(item),
                Err(error) => missing.push((item, format!("the host refuses it: {error}"))),
            }
        }
        let user = self.users.take(&self.options.state).map_err(text)?;
        let spec = JailSpec::default();
        let shell = self.shell(&spec).map_err(text)?;
        loop {
            let attempt = Attempt {
                spec: &spec,
                user: &user,
                items: &items,
                group: None,
            };
            // A directory can't be executed: that it comes to that is all that is wanted.
            let tried = attempt.run(&shell, Path::new("/"), &[], Path::new("/"), 2, Vec::new(), None);
            match tried {
                Err(Stillborn::At(Step::Execute, _)) | Ok(_) => break,
                Err(Stillborn::At(step, error)) => match step.item().filter(|item| items.contains(item)) {
                    Some(item) => {
                        items.retain(|other| *other != item);
                        missing.push((item, format!("the host refuses it: {}: {error}", step.name())));
                        // It is made by writing to /proc.
                        if item == Item::PidNamespace {
                            items.retain(|other| *other != Item::UserNamespace);
                            missing.push((Item::UserNamespace, "it needs a /proc of its own".to_owned()));
                        }
                    }
                    None => return Err(format!("the host refuses it: {}: {error}", step.name())),
                },
                Err(Stillborn::Before(error)) => return Err(error.to_string()),
            }
        }
        Ok(Ability {
            items,
            missing,
            groups: Groups::open(),
        })
    }
}

/// One start.
struct Attempt<'a> {
    spec: &'a JailSpec,
    user: &'a User,
    items: &'a [Item],
    group: Option<&'a Group>,
}

impl Attempt<'_> {
    #[allow(clippy::too_many_arguments, reason = "each is one thing of a program")]
    fn run(
        &self,
        shell: &Shell,
        program: &Path,
        arguments: &[std::ffi::OsString],
        directory: &Path,
        output: i32,
        mut keep: Vec<i32>,
        ask: Option<Vec<libc::sock_filter>>,
    ) -> Result<Born, Stillborn> {
        let before = Stillborn::Before;
        let line = Line::open().map_err(before)?;
        // Held by the process as long as it lives.
        keep.push(self.user.lock.as_raw_fd());
        let pid_namespace = self.items.contains(&Item::PidNamespace);
        let (uid, gid) = (self.user.uid, self.user.gid);
        let command = Command::new(program, arguments).map_err(before)?;
        let directory = CString::new(directory.as_os_str().as_encoded_bytes())
            .map_err(|_| before(JailError::Invalid("the directory holds a zero".to_owned())))?;
        let plan = Plan {
            command,
            directory,
            input: line.input.as_raw_fd(),
            output,
            keep,
            report: line.report(),
            mount_proc: pid_namespace,
            limits: restraint::resource_limits(&self.spec.limits),
            uid,
            gid,
            maps: self
                .items
                .contains(&Item::UserNamespace)
                .then(|| Maps::of(uid, gid)),
            restrict: filter::restrict(),
            ask,
        };
        let birth = Birth {
            pid_namespace,
            group: self.group.map(|group| group.directory.as_fd()),
        };
        // A thread of its own, because it never comes back from its stage; the plan is not moved to another one.
        std::thread::scope(|scope| {
            let work = move || {
                stage::enter(shell, self.spec, self.user, self.items).map_err(Stillborn::Before)?;
                spawn(&plan, birth, line)
            };
            let thread = std::thread::Builder::new()
                .name("jail-stage".to_owned())
                .spawn_scoped(scope, work)
                .map_err(|error| before(JailError::io("cannot start a thread", error)))?;
            thread.join().unwrap_or_else(|_| {
                Err(before(JailError::Unavailable(
                    "the jail could not be built".to_owned(),
                )))
            })
        })
    }
}

fn required(reason: &str) -> JailError {
    JailError::Unavailable(format!(
        "hypervisor.jail is required, and this host does not do all of it: {reason}"
    ))
}

/// What this process must be allowed.
fn may_confine() -> Result<(), String> {
    let needed = CapabilitySet::SYS_ADMIN
        | CapabilitySet::SYS_CHROOT
        | CapabilitySet::SETUID
        | CapabilitySet::SETGID
        | CapabilitySet::SETPCAP
        | CapabilitySet::CHOWN
        | CapabilitySet::MKNOD;
    let has_all = rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(needed));
    match (rustix::process::geteuid().is_root(), has_all) {
        (true, true) => Ok(()),
        (true, false) => {
            Err("the server runs as root without CAP_SYS_ADMIN and others, as in a container".to_owned())
        }
        (false, _) => Err("the server does not run as root".to_owned()),
    }
}

fn try_namespace(item: Item) -> io::Result<()> {
    let flag = match item {
        Item::NetworkNamespace => UnshareFlags::NEWNET,
        Item::IpcNamespace => UnshareFlags::NEWIPC,
        Item::UtsNamespace => UnshareFlags::NEWUTS,
        Item::PidNamespace => UnshareFlags::NEWPID,
        // Only a process of one thread can try it.
        _ => return Ok(()),
    };
    let thread = std::thread::Builder::new().spawn(move || unshare(flag))?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("it failed")))
}

fn note_limits(report: &mut Report, limits: &Limits, group: Option<&Group>, groups: &Result<Groups, String>) {
    if limits.file_bytes.is_none() {
        report.active.retain(|item| *item != Item::FileSize);
    }
    if limits.descriptors.is_none() {
        report.active.retain(|item| *item != Item::Descriptors);
    }
    // Held by the limit of its user alone, too.
    if limits.processes.is_some() {
        report.note(Item::Processes, None);
    }
    match (group, groups) {
        (Some(group), _) => {
            for (item, missing) in group.items.iter().filter(|(item, _)| *item != Item::Processes) {
                report.note(*item, missing.clone());
            }
        }
        (None, Err(reason)) => {
            let wanted = [
                (Item::Cpu, limits.processors.is_some()),
                (Item::Memory, limits.memory_bytes.is_some()),
                (Item::Io, limits.disk_bytes_per_second.is_some()),
            ];
            for (item, _) in wanted.iter().filter(|(_, wanted)| *wanted) {
                report.note(*item, Some(reason.clone()));
            }
        }
        (None, Ok(_)) => {}
    }
}
