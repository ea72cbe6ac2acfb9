//! Systemd mode: the image's init becomes process 1, and the agent goes on as its child.
//!
//! ```text
//! process 1 ── fork ──► agent: keeps the port, the connection and the runtime as they are
//!     └─ exec init      (a failure is told to the agent through a pipe that exec would close)
//! ```
#![allow(unsafe_code)]

use std::{
    ffi::{CString, NulError, c_char},
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use hypeman_guest_api::{ExitReason, Program};
use rustix::{
    mount::mount_bind,
    pipe::{PipeFlags, pipe_with},
    process::{chdir, setsid},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
    termios::{OptionalActions, tcgetattr, tcsetattr},
};

use super::{
    cgroup,
    console::{self, Sink},
    program,
};
use crate::{
    agent::{DEFAULT_PATH, Lookup, find_program, pty},
    log_line,
};

/// The name under which the kernel shows the process.
#[derive(Clone, Copy)]
pub struct ProcessName(*mut c_char);

impl ProcessName {
    /// Takes the first argument of the process: a string that lives as long as it.
    pub fn new(argument: *mut c_char) -> ProcessName {
        ProcessName(argument)
    }

    /// Puts an `@` first, by which systemd knows processes that it must not kill at shutdown: the host still
    /// needs the agent then.
    fn mark_as_spared(self) {
        // SAFETY: the pointer is the process's own first argument, which is writable, and nobody else looks at
        // it; only its first character is replaced, and only if there is one.
        unsafe {
            if !self.0.is_null() && *self.0 != 0 {
                *self.0 = b'@' as c_char;
            }
        }
    }
}

/// Writing to a port or pipe without reader must be an error, not the end.
pub(super) fn ignore_broken_pipes() {
    // SAFETY: sets a disposition before any other thread exists. Programs that are started get the default back.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Makes the image's init process 1. Returns in the agent, which is another process from here on.
pub(super) fn become_init(program: &Program, name: ProcessName) -> Result<(), ExitReason> {
    let word = program.argv.first().map_or("", String::as_str);
    let told = |error: io::Error| program::cannot_execute(word, &error);
    let mut environment = program.environment.clone();
    if !environment.iter().any(|(name, _)| name == "PATH") {
        environment.push(("PATH".into(), DEFAULT_PATH.into()));
    }
    let path = environment
        .iter()
        .find(|(name, _)| name == "PATH")
        .map_or("", |(_, value)| value.as_str());
    let file = match find_program(word, path, Path::new("/")) {
        Lookup::Found(file) => file,
        Lookup::NotFound => return Err(told(io::Error::from_raw_os_error(libc::ENOENT))),
        Lookup::NotExecutable => return Err(told(io::Error::from_raw_os_error(libc::EACCES))),
    };
    write_environment(&environment);
    let strings = |words: Vec<String>| -> Result<Vec<CString>, ExitReason> {
        let words: Result<Vec<CString>, NulError> = words.into_iter().map(CString::new).collect();
        words.map_err(|error| told(error.into()))
    };
    let file = strings(vec![file.to_string_lossy().into_owned()])?;
    let arguments = strings(program.argv.clone())?;
    let environment = strings(
        environment
            .into_iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect(),
    )?;

    let (master, slave, slave_path) = pty::open(24, 80).map_err(told)?;
    raw(&slave).map_err(told)?;
    if let Err(error) = mount_bind(&slave_path, "/dev/console") {
        log_line!("the init prints to the kernel's console: {error}");
    }
    let sink = Sink::open().map_err(told)?;
    let (failure_reader, failure_writer) =
        pipe_with(PipeFlags::CLOEXEC).map_err(|error| told(error.into()))?;

    // SAFETY: this process has one thread. The child goes on as it is; the parent only makes system calls
    // before it becomes another program.
    match unsafe { libc::fork() } {
        -1 => Err(told(io::Error::last_os_error())),
        0 => {
            drop(failure_writer);
            let _ = setsid();
            name.mark_as_spared();
            cgroup::enter_agent_group();
            // Without it the agent is as mortal as any process.
            let _ = fs::write("/proc/self/oom_score_adj", "-1000");
            console::follow_terminal(master, slave, sink).map_err(told)?;
            let mut code = [0; 4];
            match File::from(failure_reader).read_exact(&mut code) {
                // Closed by exec.
                Err(_) => Ok(()),
                Ok(()) => Err(told(io::Error::from_raw_os_error(i32::from_ne_bytes(code)))),
            }
        }
        _agent => {
            let error = turn_into(&file, &arguments, &environment, &slave);
            let code = error.raw_os_error().unwrap_or(libc::EIO);
            // The agent reads it or is gone.
            let _ = File::from(failure_writer).write_all(&code.to_ne_bytes());
            drop((failure_reader, master));
            loop {
                if rustix::process::wait(rustix::process::WaitOptions::empty()).is_err() {
                    super::pause();
                }
            }
        }
    }
}

fn turn_into(file: &[CString], arguments: &[CString], environment: &[CString], terminal: &File) -> io::Error {
    let pointers = |words: &[CString]| -> Vec<*const c_char> {
        words
            .iter()
            .map(|word| word.as_ptr())
            .chain(std::iter::once(std::ptr::null()))
            .collect()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // Systemd puts everything into groups of its own, itself too.
    let init = file.first().and_then(|file| file.to_str().ok());
    let init = init.and_then(|file| fs::canonicalize(file).ok());
    if init.is_none_or(|init| !init.ends_with("systemd")) {
        cgroup::enter_program_group();
    }
    let prepare = || -> Result<(), rustix::io::Errno> {
        // Process 1 may lead a session already.
        let _ = setsid();
        dup2_stdin(terminal)?;
        dup2_stdout(terminal)?;
        dup2_stderr(terminal)?;
        chdir("/")
    };
    if let Err(error) = prepare() {
        return error.into();
    }
    let Some(file) = file.first() else {
        return io::ErrorKind::InvalidInput.into();
    };
    // SAFETY: all pointers are to strings that live on, in arrays that end with null; signals get their
    // defaults back before the other program begins.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::execve(file.as_ptr(), arguments.as_ptr(), environment.as_ptr());
    }
    io::Error::last_os_error()
}

fn raw(terminal: &File) -> io::Result<()> {
    let mut attributes = tcgetattr(terminal)?;
    attributes.make_raw();
    Ok(tcsetattr(terminal, OptionalActions::Now, &attributes)?)
}

/// Services of the image read their environment from this file.
fn write_environment(environment: &[(String, String)]) {
    let write = || -> io::Result<()> {
        fs::create_dir_all("/etc/hypeman")?;
        let mut file = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open("/etc/hypeman/env")?;
        for (name, value) in environment.iter().filter(|(_, value)| !value.contains('\n')) {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            writeln!(file, "{name}=\"{quoted}\"")?;
        }
        Ok(())
    };
    if let Err(error) = write() {
        log_line!("/etc/hypeman/env: {error}");
    }
}

/// Sends a realtime signal, which the safe interface does not know.
pub(super) fn send_realtime(process: rustix::process::Pid, signal: i32) -> bool {
    // SAFETY: a system call on two integers.
    unsafe { libc::kill(process.as_raw_nonzero().get(), signal) == 0 }
}
