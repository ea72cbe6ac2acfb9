//! The directory of a machine that its VMM owns: sockets and device states that the VMM makes by itself lie here.
//!
//! ```text
//! runtime directory    ours alone: what we read by name, whatever its VMM does
//! └─ vmm/              the VMM's own where it is in a jail; else ours as well
//! ```
//!
//! Invariant: whatever the VMM puts here, the server follows no link in it, waits at nothing in it, and reads no more of
//! it than it expects. A VMM that its guest has taken over could else lead the server to the host's files.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use hypeman_jail::Show;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Uid};

use crate::VmmError;
use crate::files::{io_error, remove_if_there};
use crate::tree::remove_tree;

const NAME: &str = "vmm";

/// The directory of one machine.
#[derive(Debug, Clone)]
pub(crate) struct OwnDirectory {
    path: PathBuf,
}

impl OwnDirectory {
    pub(crate) fn of(runtime_directory: &Path) -> Self {
        Self {
            path: runtime_directory.join(NAME),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes it anew, empty.
    pub(crate) fn make(&self) -> Result<(), VmmError> {
        self.remove().map_err(io_error("cannot clear", &self.path))?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(io_error("cannot make", &self.path))
    }

    /// Removes it with all that is in it.
    pub(crate) fn remove(&self) -> io::Result<()> {
        remove_tree(&self.path)
    }

    /// Writes a file that the VMM can read; nobody else can enter the directory.
    pub(crate) fn write(&self, name: &str, content: &[u8]) -> Result<(), VmmError> {
        let path = self.join(name);
        let write = || -> io::Result<()> {
            self.forget(name)?;
            let mut file = File::create_new(&path)?;
            file.set_permissions(Permissions::from_mode(0o644))?;
            file.write_all(content)
        };
        write().map_err(io_error("cannot write", &path))
    }

    /// Removes a file, if it is there.
    pub(crate) fn forget(&self, name: &str) -> io::Result<()> {
        remove_if_there(&self.join(name))
    }

    /// Reads a file that the VMM wrote, which has at most `limit` bytes and some.
    pub(crate) fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        // A pipe must not make us wait.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(self.join(name), flags, Mode::empty())?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::other(format!("{name} is no file")));
        }
        let mut content = Vec::new();
        file.take(limit + 1).read_to_end(&mut content)?;
        match content.len() as u64 {
            length if length == 0 || length > limit => {
                Err(io::Error::other(format!("{name} has {length} bytes or more")))
            }
            _ => Ok(content),
        }
    }

    /// Makes what we made here the VMM's, to write to.
    pub(crate) fn give(&self, name: &str) -> io::Result<()> {
        let owner = fs::symlink_metadata(&self.path)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let given = rustix::fs::open(self.join(name), flags, Mode::empty())?;
        let (uid, gid) = (Uid::from_raw(owner.uid()), Gid::from_raw(owner.gid()));
        Ok(rustix::fs::chownat(
            &given,
            "",
            Some(uid),
            Some(gid),
            AtFlags::EMPTY_PATH,
        )?)
    }

    /// How a jail shows it.
    pub(crate) fn shown(&self) -> Show {
        Show::own(&self.path)
    }
}

/// Takes hold of a socket, without following a link.
pub(crate) fn hold_socket(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = rustix::fs::open(path, flags, Mode::empty())?;
    match FileType::from_raw_mode(rustix::fs::fstat(&socket)?.st_mode) {
        FileType::Socket => Ok(socket),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{} is no socket", path.display()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::stand_in::StandIn;

    /// What a program in the VMM's place leaves behind: each thing is what the server would look for.
    #[tokio::test]
    async fn a_hostile_program_leads_the_server_nowhere() {
        let Some(stand_in) = StandIn::new() else {
            return;
        };
        let secret = stand_in.path("secret");
        let ours = stand_in.path("ours.sock");
        let listener = std::os::unix::net::UnixListener::bind(&ours).unwrap();
        listener.set_nonblocking(true).unwrap();
        let about = |path: &Path| {
            let about = fs::metadata(path).unwrap();
            (about.uid(), about.mode())
        };
        let before = (about(&secret), about(&ours));
        let own = stand_in.own();
        own.write("state", b"a state").unwrap();
        let (secret_name, ours_name) = (secret.display(), ours.display());
        let script = format!(
            "rm state; ln -s {secret_name} state; mkfifo pipe; truncate -s 1G huge; mkdir directory; ln -s / tree
            ln -s {ours_name} api.sock; mknod device c 1 5 2> /dev/null; ls"
        );
        let said = stand_in.run(&own, |_| script).await;
        let names: Vec<&str> = said.lines().collect();
        assert_eq!(names, ["api.sock", "directory", "huge", "pipe", "state", "tree"]);

        for name in names {
            let error = own.read(name, 100).unwrap_err();
            if name == "huge" {
                assert!(error.to_string().contains("101 bytes or more"), "{error}");
            }
            assert!(hold_socket(&own.join(name)).is_err(), "{name}");
            assert!(
                crate::socket::connect_to_vmm(&own.join(name)).await.is_err(),
                "{name}"
            );
            assert!(crate::socket::open_to_vmm(&own.join(name)).is_err(), "{name}");
            own.give(name).unwrap();
        }
        let nobody = listener.accept().unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock);
        own.write("state", b"ours").unwrap();
        assert!(own.write("directory", b"ours").is_err());
        own.remove().unwrap();
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        assert_eq!((about(&secret), about(&ours)), before);
    }

    #[test]
    fn the_server_follows_nothing_and_waits_at_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let secret = directory.path().join("secret");
        fs::write(&secret, "of the host").unwrap();
        let own = OwnDirectory::of(directory.path());
        own.make().unwrap();
        own.write("state", b"a state").unwrap();
        assert_eq!(own.read("state", 100).unwrap(), b"a state");
        assert!(own.read("state", 3).is_err(), "longer than expected");
        own.forget("state").unwrap();
        std::os::unix::fs::symlink(&secret, own.join("state")).unwrap();
        assert!(own.read("state", 100).is_err());
        assert!(hold_socket(&own.join("state")).is_err());
        // Writing replaces the link and leaves what it leads to alone.
        own.write("state", b"new").unwrap();
        assert_eq!(fs::read(&secret).unwrap(), b"of the host");
        own.forget("state").unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, own.join("state"), Mode::RUSR | Mode::WUSR).unwrap();
        assert!(own.read("state", 100).is_err(), "a pipe that nobody writes to");
        own.make().unwrap();
        assert_eq!(fs::read_dir(own.path()).unwrap().count(), 0);
    }
}
