//! Binaries of VMMs on this host: where they are, and which versions.
//!
//! ```text
//! configuration ─► $PATH and the system's own directories ─► data directory, by version, newest first
//!      └──────────── the first is what new machines get ──────────────┘
//! ```
//!
//! Several versions may stand side by side: memory that one has captured goes on only with that one.
//!
//! Invariant: answers belong to one binary (path, size, time of change). When the file changes it is asked anew.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;
use tokio::sync::Mutex;

use crate::files::io_error;
use crate::{VmmError, boot_id};

const QUERY_DEADLINE: Duration = Duration::from_secs(30);

/// Version of a VMM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Version {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) patch: u32,
}

impl Version {
    pub(crate) const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// The version in the first line of what `--version` prints: `Firecracker v1.15.1`, `cloud-hypervisor v53.0`.
    pub(crate) fn of_banner(banner: &str) -> Option<Self> {
        let line = banner.lines().find(|line| !line.trim().is_empty())?;
        line.split_ascii_whitespace().find_map(|word| {
            let digits = word.strip_prefix('v').unwrap_or(word);
            let end = digits.find(|letter: char| letter != '.' && !letter.is_ascii_digit());
            let mut numbers = digits[..end.unwrap_or(digits.len())].split('.');
            let major = numbers.next()?.parse().ok()?;
            let minor = numbers.next()?.parse().ok()?;
            let patch = numbers.next().and_then(|number| number.parse().ok());
            Some(Self::new(major, minor, patch.unwrap_or(0)))
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// One usable binary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Binary {
    pub(crate) path: PathBuf,
    pub(crate) version: Version,
}

/// What a binary was when it was asked, and what it is, or why it is of no use.
type Asked = (Stamp, Result<Version, String>);

/// How a kind of VMM is found.
#[derive(Debug)]
pub(crate) struct Binaries {
    /// As people write it.
    name: &'static str,
    /// Name of the file.
    program: &'static str,
    /// The oldest version that may run guests.
    oldest: Version,
    configured: Option<PathBuf>,
    search_path: Vec<PathBuf>,
    /// Has a directory for each version.
    versions: Option<PathBuf>,
    known: Mutex<HashMap<PathBuf, Asked>>,
}

impl Binaries {
    pub(crate) fn new(
        name: &'static str,
        program: &'static str,
        oldest: Version,
        configured: Option<PathBuf>,
        search_path: Vec<PathBuf>,
        versions: Option<&Path>,
    ) -> Self {
        Self {
            name,
            program,
            oldest,
            configured,
            search_path,
            versions: versions.map(|directory| directory.join(program)),
            known: Mutex::default(),
        }
    }

    /// All that may run guests, the one for new machines first.
    ///
    /// # Errors
    /// [`VmmError::Unavailable`] with the reason when there is none.
    pub(crate) async fn all(&self) -> Result<Vec<Binary>, VmmError> {
        let mut usable: Vec<Binary> = Vec::new();
        let mut reason = None;
        let mut by_version = Vec::new();
        for path in self.stored() {
            match self.version(&path).await {
                Ok(version) => by_version.push(Binary { path, version }),
                Err(error) => reason = reason.or(Some(error)),
            }
        }
        by_version.sort_by_key(|binary| std::cmp::Reverse(binary.version));
        let first = match &self.configured {
            Some(path) => Some(path.clone()),
            None => {
                let mut found = self
                    .search_path
                    .iter()
                    .map(|directory| directory.join(self.program));
                found.find(|path| path.is_file())
            }
        };
        if let Some(path) = first {
            match self.version(&path).await {
                Ok(version) => usable.push(Binary { path, version }),
                // What the operator named and cannot be used is not replaced by something else.
                Err(error) if self.configured.is_some() => return Err(VmmError::Unavailable(error)),
                Err(error) => reason = Some(error),
            }
        }
        for binary in by_version {
            if !usable.iter().any(|other| other.version == binary.version) {
                usable.push(binary);
            }
        }
        if usable.is_empty() {
            return Err(VmmError::Unavailable(reason.unwrap_or_else(|| self.missing())));
        }
        Ok(usable)
    }

    fn missing(&self) -> String {
        let place = match &self.versions {
            Some(directory) => format!(
                "put it into $PATH or {}/VERSION/{}",
                directory.display(),
                self.program
            ),
            None => "put it into $PATH".to_owned(),
        };
        format!(
            "{} is not installed: {place}, or name the binary in the configuration",
            self.name
        )
    }

    /// See [`executable_names`].
    pub(crate) fn executable_names(&self) -> Vec<OsString> {
        let configured = self.configured.iter().cloned();
        let searched = self
            .search_path
            .iter()
            .map(|directory| directory.join(self.program));
        executable_names(self.program, configured.chain(searched).chain(self.stored()))
    }

    /// Binaries in the data directory.
    fn stored(&self) -> Vec<PathBuf> {
        let entries = self
            .versions
            .as_ref()
            .and_then(|directory| std::fs::read_dir(directory).ok());
        let entries = entries.into_iter().flatten().flatten();
        entries
            .map(|entry| entry.path().join(self.program))
            .filter(|path| path.is_file())
            .collect()
    }

    async fn version(&self, path: &Path) -> Result<Version, String> {
        let stamp = Stamp::of(path).map_err(|error| error.to_string())?;
        let mut known = self.known.lock().await;
        if let Some((remembered, version)) = known.get(path)
            && *remembered == stamp
        {
            return version.clone();
        }
        let version = self.ask(path).await;
        known.insert(path.to_owned(), (stamp, version.clone()));
        version
    }

    async fn ask(&self, path: &Path) -> Result<Version, String> {
        let banner = output(path, &["--version"])
            .await
            .map_err(|error| error.to_string())?;
        let version = Version::of_banner(&banner).ok_or_else(|| {
            format!(
                "{} does not say which version of {} it is",
                path.display(),
                self.name
            )
        })?;
        if version < self.oldest {
            return Err(format!(
                "{} {version} at {} has known holes or lacks what is needed: install {} or newer",
                self.name,
                path.display(),
                self.oldest
            ));
        }
        Ok(version)
    }
}

/// How the executables of a program's processes may be called: as usual, or as files that stand for it, which an operator
/// may call anything. The kernel shows a file where its links lead.
pub(crate) fn executable_names(usual: &str, files: impl IntoIterator<Item = PathBuf>) -> Vec<OsString> {
    let real = files
        .into_iter()
        .filter_map(|file| Some(file.canonicalize().ok()?.file_name()?.to_owned()));
    std::iter::once(OsString::from(usual)).chain(real).collect()
}

/// What tells one binary from another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    path: PathBuf,
    size: u64,
    changed: (i64, i64),
    boot_id: String,
}

impl Stamp {
    pub(crate) fn of(path: &Path) -> Result<Self, VmmError> {
        let metadata = std::fs::metadata(path).map_err(io_error("cannot look at", path))?;
        Ok(Self {
            path: path.to_owned(),
            size: metadata.len(),
            changed: (metadata.mtime(), metadata.mtime_nsec()),
            boot_id: boot_id().unwrap_or_default().to_owned(),
        })
    }
}

/// What a binary prints when it is asked about itself.
pub(crate) async fn output(program: &Path, arguments: &[&str]) -> Result<String, VmmError> {
    let run = Command::new(program)
        .args(arguments)
        .env_clear()
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let unusable =
        |reason: String| VmmError::Unavailable(format!("{} cannot be used: {reason}", program.display()));
    match tokio::time::timeout(QUERY_DEADLINE, run).await {
        Ok(Ok(output)) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(Ok(output)) => Err(unusable(format!("{}", output.status))),
        Ok(Err(error)) => Err(unusable(error.to_string())),
        Err(_) => Err(unusable("it does not answer".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn binary(directory: &Path, banner: &str) {
        std::fs::create_dir_all(directory).unwrap();
        let path = directory.join("vmm");
        std::fs::write(&path, format!("#!/bin/sh\necho '{banner}'\n")).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn binaries(root: &Path, configured: Option<&str>) -> Binaries {
        Binaries::new(
            "Some VMM",
            "vmm",
            Version::new(1, 2, 0),
            configured.map(|name| root.join(name).join("vmm")),
            vec![root.join("nothing"), root.join("path")],
            Some(&root.join("data")),
        )
    }

    #[test]
    fn versions_are_read_from_what_binaries_say() {
        let read = |banner| Version::of_banner(banner).map(|version| version.to_string());
        assert_eq!(
            read("Firecracker v1.15.1\n\nSupported snapshot").as_deref(),
            Some("1.15.1")
        );
        assert_eq!(read("cloud-hypervisor v53.0").as_deref(), Some("53.0.0"));
        assert_eq!(
            read("cloud-hypervisor v53.0-12-gabc\n").as_deref(),
            Some("53.0.0")
        );
        assert_eq!(read("no version"), None);
        assert_eq!(read(""), None);
    }

    #[tokio::test]
    async fn the_first_is_for_new_machines_and_the_others_stay_at_hand() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let reason = binaries(root, None).all().await.unwrap_err().to_string();
        assert!(
            reason.contains("not installed") && reason.contains("data/vmm/VERSION/vmm"),
            "{reason}"
        );

        binary(&root.join("data/vmm/a"), "vmm v1.3.0");
        binary(&root.join("data/vmm/b"), "vmm v1.10.0");
        binary(&root.join("data/vmm/c"), "vmm v1.1.9");
        binary(&root.join("path"), "vmm v1.4.0");
        let versions = |found: Vec<Binary>| -> Vec<String> {
            found.iter().map(|binary| binary.version.to_string()).collect()
        };
        let known = binaries(root, None);
        assert_eq!(versions(known.all().await.unwrap()), ["1.4.0", "1.10.0", "1.3.0"]);
        // A binary that was replaced is asked anew.
        binary(&root.join("path"), "vmm v1.5.0 newer");
        assert_eq!(versions(known.all().await.unwrap()), ["1.5.0", "1.10.0", "1.3.0"]);
    }

    #[test]
    fn processes_are_known_by_whatever_their_file_is_called() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        binary(&root.join("releases"), "vmm v1.3.0");
        std::fs::rename(root.join("releases/vmm"), root.join("releases/1.3.0")).unwrap();
        std::fs::create_dir(root.join("configured")).unwrap();
        std::os::unix::fs::symlink(root.join("releases/1.3.0"), root.join("configured/vmm")).unwrap();
        assert_eq!(
            binaries(root, Some("configured")).executable_names(),
            ["vmm", "1.3.0"]
        );
        assert_eq!(binaries(root, None).executable_names(), ["vmm"]);
    }

    #[tokio::test]
    async fn one_with_known_holes_is_refused_with_the_version_that_is_needed() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        binary(&root.join("old"), "vmm v1.1.9");
        binary(&root.join("path"), "vmm v1.4.0");
        let reason = binaries(root, Some("old")).all().await.unwrap_err().to_string();
        assert!(
            reason.contains("1.1.9") && reason.contains("1.2.0 or newer"),
            "{reason}"
        );
    }
}
