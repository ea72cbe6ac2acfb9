//! The process between clone and exec: it gives up, step by step, what the VMM shall not have.
//!
//! ```text
//!  session ─► descriptors ─► /proc ─► limits ─► user ─► user namespace ─► capabilities ─► filters ─► exec
//!      └────────────────── any failure: its step and number go to the parent, exit ──────────────────┘
//! ```
//!
//! It is a copy of one thread of a process with many, so it may make system calls and nothing else: no allocation, no
//! lock. All that it needs is laid out before.
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::path::Path;

use libc::{c_char, c_int, c_long, c_ulong};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::{Item, JailError};

/// What of a jail failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Step {
    Session,
    Descriptors,
    Proc,
    Limits,
    User,
    UserNamespace,
    Capabilities,
    NoNewPrivileges,
    Filter,
    Directory,
    Execute,
}

const STEPS: [Step; 11] = [
    Step::Session,
    Step::Descriptors,
    Step::Proc,
    Step::Limits,
    Step::User,
    Step::UserNamespace,
    Step::Capabilities,
    Step::NoNewPrivileges,
    Step::Filter,
    Step::Directory,
    Step::Execute,
];

impl Step {
    /// For messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Session => "making a session",
            Self::Descriptors => "handing over descriptors",
            Self::Proc => "mounting /proc",
            Self::Limits => "setting limits",
            Self::User => "changing the user",
            Self::UserNamespace => "making a user namespace",
            Self::Capabilities => "dropping capabilities",
            Self::NoNewPrivileges => "forbidding new privileges",
            Self::Filter => "filtering system calls",
            Self::Directory => "entering its directory",
            Self::Execute => "executing it",
        }
    }

    /// The item that a jail can do without when this step fails.
    pub(crate) fn item(self) -> Option<Item> {
        match self {
            Self::Proc => Some(Item::PidNamespace),
            Self::UserNamespace => Some(Item::UserNamespace),
            _ => None,
        }
    }
}

/// How a failed step is told: the step, and the number of its error.
pub(crate) fn read_failure(message: [u8; 5]) -> Option<(Step, io::Error)> {
    let [step, number @ ..] = message;
    let step = *STEPS.get(usize::from(step))?;
    Some((step, io::Error::from_raw_os_error(i32::from_ne_bytes(number))))
}

/// What tells the parent of a listener that goes with it.
pub(crate) const LISTENER: [u8; 1] = *b"L";

/// What maps a user namespace to one user outside of it.
pub(crate) struct Maps {
    uid: Vec<u8>,
    gid: Vec<u8>,
}

impl Maps {
    /// The ids are the same inside and outside.
    pub(crate) fn of(uid: u32, gid: u32) -> Self {
        Self {
            uid: format!("{uid} {uid} 1").into_bytes(),
            gid: format!("{gid} {gid} 1").into_bytes(),
        }
    }
}

/// Everything that happens between clone and exec.
pub(crate) struct Plan {
    pub(crate) command: Command,
    pub(crate) directory: CString,
    pub(crate) input: RawFd,
    pub(crate) output: RawFd,
    /// Kept open under their numbers.
    pub(crate) keep: Vec<RawFd>,
    /// Where the parent listens.
    pub(crate) report: RawFd,
    /// It is the first of a PID namespace and gets a `/proc` of it.
    pub(crate) mount_proc: bool,
    /// Resources and their limits.
    pub(crate) limits: Vec<(c_int, u64)>,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) maps: Option<Maps>,
    pub(crate) restrict: Vec<libc::sock_filter>,
    /// The filter that asks the parent about some opens.
    pub(crate) ask: Option<Vec<libc::sock_filter>>,
}

/// Program and arguments as `execve` takes them.
pub(crate) struct Command {
    program: CString,
    words: Vec<*const c_char>,
    environment: Vec<*const c_char>,
    _held: Vec<CString>,
}

impl Command {
    /// Lays it out; the environment has nothing but a `PATH`.
    pub(crate) fn new(program: &Path, arguments: &[std::ffi::OsString]) -> Result<Self, JailError> {
        let text = |bytes: &[u8]| {
            CString::new(bytes)
                .map_err(|_| JailError::Invalid("a word of the command line holds a zero".to_owned()))
        };
        let program = text(program.as_os_str().as_encoded_bytes())?;
        let mut held = vec![program.clone()];
        for argument in arguments {
            held.push(text(argument.as_encoded_bytes())?);
        }
        let mut words: Vec<_> = held.iter().map(|word| word.as_ptr()).collect();
        words.push(std::ptr::null());
        let environment = vec![c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".as_ptr(), std::ptr::null()];
        Ok(Self {
            program,
            words,
            environment,
            _held: held,
        })
    }
}

// SAFETY: its pointers lead into strings that it owns itself, and that nobody changes.
unsafe impl Send for Command {}

type Outcome = Result<(), i32>;

fn check(result: c_int) -> Result<c_int, i32> {
    if result >= 0 { Ok(result) } else { Err(number()) }
}

fn check_long(result: c_long) -> Result<c_long, i32> {
    if result >= 0 { Ok(result) } else { Err(number()) }
}

fn number() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}

impl Plan {
    /// Carries it out.
    ///
    /// # Safety
    /// The caller is a process of one thread that shares no memory with another.
    pub(crate) unsafe fn run(&self) -> ! {
        let Err((step, number)) = self.steps();
        let mut message = [step as u8; 5];
        message[1..].copy_from_slice(&number.to_ne_bytes());
        // SAFETY: the buffer is as long as is said; then this process ends without touching anything of its parent's.
        unsafe {
            libc::write(self.report, message.as_ptr().cast(), message.len());
            libc::_exit(127)
        }
    }

    fn steps(&self) -> Result<Infallible, (Step, i32)> {
        let at = |step: Step| move |number: i32| (step, number);
        // SAFETY: no arguments.
        check(unsafe { libc::setsid() }).map_err(at(Step::Session))?;
        self.hand_over().map_err(at(Step::Descriptors))?;
        if self.mount_proc {
            mount_proc().map_err(at(Step::Proc))?;
        }
        for (resource, limit) in &self.limits {
            let limit = libc::rlimit {
                rlim_cur: *limit,
                rlim_max: *limit,
            };
            // SAFETY: `limit` is a whole structure that the kernel only reads.
            check(unsafe { libc::setrlimit(*resource as _, &raw const limit) }).map_err(at(Step::Limits))?;
        }
        self.become_user().map_err(at(Step::User))?;
        if let Some(maps) = &self.maps {
            enter_user_namespace(maps).map_err(at(Step::UserNamespace))?;
        }
        drop_capabilities().map_err(at(Step::Capabilities))?;
        // SAFETY: plain numbers.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
            .map_err(at(Step::NoNewPrivileges))?;
        reset_signals();
        self.filter().map_err(at(Step::Filter))?;
        // SAFETY: a string with its end.
        check(unsafe { libc::chdir(self.directory.as_ptr()) }).map_err(at(Step::Directory))?;
        // SAFETY: program, words and environment are strings with their ends, and both lists end with null.
        unsafe {
            libc::execve(
                self.command.program.as_ptr(),
                self.command.words.as_ptr(),
                self.command.environment.as_ptr(),
            )
        };
        Err((Step::Execute, number()))
    }

    fn hand_over(&self) -> Outcome {
        // SAFETY: system calls on numbers of descriptors; nothing of this process is used by its number afterwards but
        // what stands in the plan.
        unsafe {
            libc::umask(0o077);
            check(libc::dup2(self.input, 0))?;
            check(libc::dup2(self.output, 1))?;
            check(libc::dup2(self.output, 2))?;
            check_long(libc::syscall(
                libc::SYS_close_range,
                3_u32,
                u32::MAX,
                libc::CLOSE_RANGE_CLOEXEC as libc::c_uint,
            ))?;
            for descriptor in &self.keep {
                check(libc::fcntl(*descriptor, libc::F_SETFD, 0))?;
            }
        }
        Ok(())
    }

    fn become_user(&self) -> Outcome {
        // SAFETY: plain numbers, and a null list of length zero. The calls of the kernel and not those of the C
        // library, which would ask threads that are not here to follow.
        unsafe {
            // The capabilities are needed for a little longer.
            check(libc::prctl(
                libc::PR_SET_SECUREBITS,
                SECBIT_NO_SETUID_FIXUP,
                0,
                0,
                0,
            ))?;
            check_long(libc::syscall(
                libc::SYS_setgroups,
                0,
                std::ptr::null::<libc::gid_t>(),
            ))?;
            check_long(libc::syscall(libc::SYS_setresgid, self.gid, self.gid, self.gid))?;
            check_long(libc::syscall(libc::SYS_setresuid, self.uid, self.uid, self.uid))?;
        }
        Ok(())
    }

    fn filter(&self) -> Outcome {
        set_filter(&self.restrict, 0)?;
        let Some(ask) = &self.ask else { return Ok(()) };
        let listener = set_filter(ask, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
        // SAFETY: both were opened by or for this process and are open.
        let (report, listener) = unsafe {
            (
                BorrowedFd::borrow_raw(self.report),
                BorrowedFd::borrow_raw(listener as RawFd),
            )
        };
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = [listener];
        ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        let words = [io::IoSlice::new(&LISTENER)];
        match sendmsg(report, &words, &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => {
                // SAFETY: the parent has its own now, and nobody here uses this one any more.
                unsafe { libc::close(listener.as_raw_fd()) };
                Ok(())
            }
            Err(error) => Err(error.raw_os_error()),
        }
    }
}

const SECBIT_NO_SETUID_FIXUP: c_ulong = 1 << 2;
/// User id 0 means nothing, and none of these bits can be changed again.
const SECBITS_LOCKED: c_ulong = 0b1110_1111;

fn mount_proc() -> Outcome {
    let flags = libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
    let mount = |options: *const c_char| {
        // SAFETY: strings with their ends; the options may be null.
        check(unsafe {
            libc::mount(
                c"proc".as_ptr(),
                c"/proc".as_ptr(),
                c"proc".as_ptr(),
                flags,
                options.cast(),
            )
        })
    };
    match mount(c"hidepid=2,subset=pid".as_ptr()) {
        Ok(_) => Ok(()),
        // A kernel before 5.8.
        Err(libc::EINVAL) => mount(std::ptr::null()).map(drop),
        Err(error) => Err(error),
    }
}

fn enter_user_namespace(maps: &Maps) -> Outcome {
    // SAFETY: plain numbers. Only a process that may be looked at can write its own maps; the memory is a copy that
    // ends with exec.
    unsafe {
        check(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0))?;
        check(libc::unshare(libc::CLONE_NEWUSER))?;
    }
    write_file(c"/proc/self/setgroups", b"deny")?;
    write_file(c"/proc/self/uid_map", &maps.uid)?;
    write_file(c"/proc/self/gid_map", &maps.gid)
}

fn write_file(path: &std::ffi::CStr, bytes: &[u8]) -> Outcome {
    // SAFETY: a string with its end, and a buffer as long as is said.
    unsafe {
        let file = check(libc::open(path.as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC))?;
        let written = libc::write(file, bytes.as_ptr().cast(), bytes.len());
        let error = number();
        libc::close(file);
        if usize::try_from(written) == Ok(bytes.len()) {
            Ok(())
        } else {
            Err(error)
        }
    }
}

fn drop_capabilities() -> Outcome {
    // SAFETY: plain numbers.
    unsafe {
        for capability in 0..64 {
            // The first one that the kernel does not know ends the list.
            if libc::prctl(libc::PR_CAPBSET_DROP, capability as c_ulong, 0, 0, 0) != 0 {
                match number() {
                    libc::EINVAL => break,
                    error => return Err(error),
                }
            }
        }
        check(libc::prctl(libc::PR_SET_SECUREBITS, SECBITS_LOCKED, 0, 0, 0))?;
        check(libc::prctl(
            libc::PR_CAP_AMBIENT,
            libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong,
            0,
            0,
            0,
        ))?;
    }
    let none = rustix::thread::CapabilitySets {
        effective: rustix::thread::CapabilitySet::empty(),
        permitted: rustix::thread::CapabilitySet::empty(),
        inheritable: rustix::thread::CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(|error| error.raw_os_error())
}

/// As programs expect it. A file that may not grow further is an error to bear, not a reason to die.
fn reset_signals() {
    // SAFETY: an empty set is made by the call that is for it; the dispositions are the two constants.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let mut none = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

fn set_filter(filter: &[libc::sock_filter], flags: c_ulong) -> Result<c_long, i32> {
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: `program` describes a list of that length, which the kernel only reads.
    check_long(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_by_step_and_number() {
        for (at, step) in STEPS.iter().enumerate() {
            assert_eq!(*step as usize, at);
            let mut message = [*step as u8; 5];
            message[1..].copy_from_slice(&libc::EPERM.to_ne_bytes());
            let (told, error) = read_failure(message).unwrap();
            assert_eq!((told, error.raw_os_error()), (*step, Some(libc::EPERM)));
        }
        assert!(read_failure([99, 0, 0, 0, 0]).is_none());
    }
}
