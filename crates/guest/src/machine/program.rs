//! The image's program in exec mode: how it starts, and what its end means.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::Path,
};

use hypeman_guest_api::{ExitReason, Program};
use rustix::{
    process::{Pid, Resource, Rlimit, setrlimit},
    thread::{set_thread_gid, set_thread_groups, set_thread_uid},
};

use super::{cgroup::Group, users};
use crate::{
    agent::{DEFAULT_PATH, Ending, Lookup, find_program},
    birth::Birth,
};

const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;
/// What a container runtime reports when it could not even try.
const CANNOT_START: i32 = 128;

/// Starts the program with `output` as its standard output and error.
///
/// # Errors
/// The exit that it amounts to.
pub(super) fn start(program: &Program, output: &OwnedFd, group: Option<&Group>) -> Result<Pid, ExitReason> {
    let word = program.argv.first().map_or("", String::as_str);
    let user = users::resolve(&program.user).map_err(|message| failed(CANNOT_START, message))?;
    let directory = Path::new(match program.working_directory.as_str() {
        "" => "/",
        directory => directory,
    });
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(directory)
        .map_err(|error| {
            failed(
                CANNOT_START,
                format!("working directory {}: {error}", directory.display()),
            )
        })?;
    let mut environment = program.environment.clone();
    for (name, value) in [("PATH", DEFAULT_PATH), ("HOME", user.home.as_str())] {
        if !environment.iter().any(|(known, _)| known == name) {
            environment.push((name.to_owned(), value.to_owned()));
        }
    }
    let path = environment
        .iter()
        .find(|(name, _)| name == "PATH")
        .map_or("", |(_, value)| value.as_str());
    let file = match find_program(word, path, directory) {
        Lookup::Found(file) => file,
        Lookup::NotFound => return Err(failed(NOT_FOUND, format!("command not found: {word}"))),
        Lookup::NotExecutable => return Err(failed(NOT_EXECUTABLE, format!("permission denied: {word}"))),
    };
    // A pipe belongs to whom it serves, or images that open `/dev/stdout` again could not.
    let _ = rustix::fs::fchown(
        output,
        Some(rustix::process::Uid::from_raw(user.uid)),
        Some(rustix::process::Gid::from_raw(user.gid)),
    );
    let groups: Vec<_> = user
        .groups
        .iter()
        .map(|group| rustix::process::Gid::from_raw(*group))
        .collect();
    let ends = || -> io::Result<[OwnedFd; 3]> {
        Ok([
            File::open("/dev/null")?.into(),
            output.try_clone()?,
            output.try_clone()?,
        ])
    };
    let birth = Birth {
        file: &file,
        arguments: &program.argv,
        environment: &environment,
        directory,
        ends: ends().map_err(|error| failed(CANNOT_START, error.to_string()))?,
        group: group.map(AsFd::as_fd),
    };
    let limit_and_descend = move || {
        // Limits as container runtimes set them.
        setrlimit(
            Resource::Nofile,
            Rlimit {
                current: Some(1_048_576),
                maximum: Some(1_048_576),
            },
        )
        .or_else(|_| {
            setrlimit(
                Resource::Nofile,
                Rlimit {
                    current: Some(65_536),
                    maximum: Some(524_288),
                },
            )
        })?;
        set_thread_groups(&groups)?;
        set_thread_gid(rustix::process::Gid::from_raw(user.gid))?;
        set_thread_uid(rustix::process::Uid::from_raw(user.uid))?;
        Ok(())
    };
    // SAFETY: the closure only makes system calls. The process has one thread there, so that thread-wise ids are the
    // process's.
    unsafe { birth.start(limit_and_descend) }.map_err(|error| cannot_execute(word, &error))
}

fn failed(code: i32, message: String) -> ExitReason {
    ExitReason {
        code,
        signal: None,
        out_of_memory: false,
        message,
    }
}

/// The exit that a failed start amounts to.
pub(super) fn cannot_execute(word: &str, error: &io::Error) -> ExitReason {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => failed(NOT_FOUND, format!("command not found: {word}")),
        Some(libc::EACCES | libc::EPERM) => failed(NOT_EXECUTABLE, format!("permission denied: {word}")),
        Some(libc::ENOEXEC) => failed(NOT_EXECUTABLE, format!("exec format error: {word}")),
        _ => failed(CANNOT_START, format!("cannot start {word}: {error}")),
    }
}

/// What an end means, in the words of the contract.
pub(super) fn explain(ending: Ending, memory_kills: u64) -> ExitReason {
    const KILLED: i32 = 9;
    let code = ending.code();
    let out_of_memory = memory_kills > 0 && code == 128 + KILLED;
    let addition = if out_of_memory { " (out of memory)" } else { "" };
    match ending {
        Ending::Signal(signal) => ExitReason {
            code,
            signal: Some(signal),
            out_of_memory,
            message: format!("killed by {}{addition}", signal_name(signal)),
        },
        Ending::Code(code) => {
            let hint = match code {
                NOT_EXECUTABLE => " (permission denied)",
                NOT_FOUND => " (command not found)",
                _ => addition,
            };
            ExitReason {
                code,
                signal: None,
                out_of_memory,
                message: format!("exited with code {code}{hint}"),
            }
        }
    }
}

fn signal_name(signal: i32) -> String {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE",
        "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ",
        "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    match usize::try_from(signal - 1)
        .ok()
        .and_then(|index| NAMES.get(index))
    {
        Some(name) => format!("SIG{name}"),
        None => format!("signal {signal}"),
    }
}

#[cfg(test)]
mod tests {
    use super::{Ending, explain};

    #[test]
    fn ends_are_told_in_the_words_of_the_contract() {
        let told = |ending, kills| {
            let reason = explain(ending, kills);
            (reason.code, reason.signal, reason.out_of_memory, reason.message)
        };
        assert_eq!(
            told(Ending::Code(0), 0),
            (0, None, false, "exited with code 0".into())
        );
        assert_eq!(
            told(Ending::Signal(15), 0),
            (143, Some(15), false, "killed by SIGTERM".into())
        );
        assert_eq!(
            told(Ending::Signal(9), 1),
            (137, Some(9), true, "killed by SIGKILL (out of memory)".into())
        );
        assert_eq!(
            told(Ending::Code(137), 2),
            (137, None, true, "exited with code 137 (out of memory)".into())
        );
        assert_eq!(
            told(Ending::Code(127), 0),
            (
                127,
                None,
                false,
                "exited with code 127 (command not found)".into()
            )
        );
        // A child of the program was killed, but the program went on.
        assert_eq!(
            told(Ending::Code(0), 1),
            (0, None, false, "exited with code 0".into())
        );
        assert_eq!(told(Ending::Signal(34), 0).3, "killed by signal 34");
    }
}
