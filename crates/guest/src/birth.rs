//! Starts a process that belongs to its control group from its first instant.
//!
//! ```text
//! parent: strings and ends made ready ─► clone3 into the group ─► waits until the pipe closes ─► pid
//!                                             └─► child: session, ends, directory, `prepare`, exec
//!                                                        └─ a failure goes through the pipe
//! ```
//!
//! Moving a process into a group after its start makes the kernel wait for all its processors to have passed a quiet
//! point, tens of milliseconds of a boot or of a command.
//!
//! Invariant: between clone and exec the child makes nothing but system calls, so that locks which other threads of
//! the parent held do not matter.
#![allow(unsafe_code)]

use std::{
    ffi::{CString, c_char},
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::{Pid, WaitOptions, chdir, setsid, waitpid},
    stdio::{dup2_stderr, dup2_stdin, dup2_stdout},
};

/// A process to be.
pub struct Birth<'a> {
    /// The program's file.
    pub file: &'a Path,
    /// Its arguments, the name first.
    pub arguments: &'a [String],
    /// All of its environment.
    pub environment: &'a [(String, String)],
    /// Its working directory.
    pub directory: &'a Path,
    /// Standard input, output and error.
    pub ends: [OwnedFd; 3],
    /// The directory of its control group; `None` leaves it in its parent's.
    pub group: Option<BorrowedFd<'a>>,
}

/// `CLONE_INTO_CGROUP` of the kernel, since 5.7.
const INTO_GROUP: u64 = 1 << 33;

impl Birth<'_> {
    /// Starts the process as the leader of a session of its own. `prepare` runs in it, before the program does.
    ///
    /// # Errors
    /// What the first step that failed said; there is no process then.
    ///
    /// # Safety
    /// `prepare` must only make system calls: it may neither allocate nor lock.
    pub unsafe fn start(self, prepare: impl Fn() -> io::Result<()>) -> io::Result<Pid> {
        let file = CString::new(self.file.as_os_str().as_bytes())?;
        let directory = CString::new(self.directory.as_os_str().as_bytes())?;
        let arguments = strings(self.arguments.iter().cloned())?;
        let environment = strings(
            self.environment
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        )?;
        let (arguments, environment) = (Pointers::to(&arguments), Pointers::to(&environment));
        let (mut failure, mut told) =
            pipe_with(PipeFlags::CLOEXEC).map(|(reader, writer)| (File::from(reader), File::from(writer)))?;
        match clone_into(self.group)? {
            None => {
                let [input, output, error] = &self.ends;
                let become_it = || -> io::Result<()> {
                    setsid()?;
                    dup2_stdin(input)?;
                    dup2_stdout(output)?;
                    dup2_stderr(error)?;
                    chdir(directory.as_c_str())?;
                    prepare()?;
                    // SAFETY: all pointers are to strings that live on, in arrays that end with null. Signals get
                    // their defaults back, and none stays blocked.
                    unsafe {
                        let mut none: libc::sigset_t = std::mem::zeroed();
                        libc::sigemptyset(&raw mut none);
                        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
                        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
                        libc::execve(file.as_ptr(), arguments.0.as_ptr(), environment.0.as_ptr());
                    }
                    Err(io::Error::last_os_error())
                };
                if let Err(error) = become_it() {
                    let _ = told.write_all(&error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes());
                }
                // SAFETY: ends the child without the parent's exit handlers.
                unsafe { libc::_exit(127) }
            }
            Some(child) => {
                drop(told);
                let mut code = [0; 4];
                match failure.read_exact(&mut code) {
                    // Closed by exec.
                    Err(_) => Ok(child),
                    Ok(()) => {
                        // Whoever waits for all children may have been faster.
                        let _ = waitpid(Some(child), WaitOptions::empty());
                        Err(io::Error::from_raw_os_error(i32::from_ne_bytes(code)))
                    }
                }
            }
        }
    }
}

/// A child, in the group if that can be: `None` in the child itself. A kernel that does not know how, or a group that
/// takes no process, leaves it in the group of its parent.
fn clone_into(group: Option<BorrowedFd<'_>>) -> io::Result<Option<Pid>> {
    // SAFETY: all zeroes are a valid structure of integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.exit_signal = libc::SIGCHLD as u64;
    let mut child = -1;
    if let Some(group) = group {
        arguments.flags = INTO_GROUP;
        arguments.cgroup = group.as_raw_fd() as u64;
        // SAFETY: without shared memory this is a fork; the child keeps to system calls.
        child = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) };
    }
    if child < 0 {
        // SAFETY: as above.
        child = libc::c_long::from(unsafe { libc::fork() });
    }
    match i32::try_from(child) {
        Ok(0) => Ok(None),
        Ok(child) if child > 0 => Ok(Some(Pid::from_raw(child).ok_or(io::ErrorKind::Other)?)),
        _ => Err(io::Error::last_os_error()),
    }
}

fn strings(words: impl Iterator<Item = String>) -> io::Result<Vec<CString>> {
    let words: Result<Vec<CString>, _> = words.map(CString::new).collect();
    words.map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Pointers to strings, with the null that ends them.
struct Pointers(Vec<*const c_char>);

impl Pointers {
    /// Valid as long as the strings are.
    fn to(words: &[CString]) -> Pointers {
        Pointers(
            words
                .iter()
                .map(|word| word.as_ptr())
                .chain(std::iter::once(std::ptr::null()))
                .collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read, os::fd::OwnedFd, path::Path};

    use rustix::{
        pipe::{PipeFlags, pipe_with},
        process::{WaitOptions, waitpid},
    };

    use super::Birth;

    fn born(file: &str, arguments: &[&str]) -> (std::io::Result<rustix::process::Pid>, File) {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let null = || OwnedFd::from(File::options().read(true).write(true).open("/dev/null").unwrap());
        let birth = Birth {
            file: Path::new(file),
            arguments: &arguments.iter().map(|&word| word.to_owned()).collect::<Vec<_>>(),
            environment: &[("GREETING".into(), "hello".into())],
            directory: Path::new("/tmp"),
            ends: [null(), writer, null()],
            group: None,
        };
        // SAFETY: does nothing at all.
        (unsafe { birth.start(|| Ok(())) }, reader.into())
    }

    #[test]
    fn a_process_has_what_it_was_given_and_leads_a_session() {
        let script = "echo $0 $GREETING $PWD; [ $(cut -d' ' -f6 /proc/$$/stat) = $$ ] && echo leads";
        let (started, mut output) = born("/bin/sh", &["name", "-c", script, "zero"]);
        let mut said = String::new();
        output.read_to_string(&mut said).unwrap();
        assert_eq!(said, "zero hello /tmp\nleads\n");
        let (_, status) = waitpid(Some(started.unwrap()), WaitOptions::empty())
            .unwrap()
            .unwrap();
        assert_eq!(status.exit_status(), Some(0));
    }

    #[test]
    fn what_cannot_be_executed_is_told_and_leaves_no_process() {
        let (started, _) = born("/no/such/program", &["x"]);
        assert_eq!(started.unwrap_err().raw_os_error(), Some(libc::ENOENT));
        let file = tempfile::NamedTempFile::new().unwrap();
        let (started, _) = born(file.path().to_str().unwrap(), &["x"]);
        assert_eq!(started.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
