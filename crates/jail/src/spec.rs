//! What one process gets: plain data.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::JailError;

/// One jail, complete; its network is empty. Paths are absolute and made by the server, never by clients.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JailSpec {
    /// Files and directories, each at its usual place.
    pub show: Vec<Show>,
    /// Device nodes besides `null`, `zero`, `full`, `random` and `urandom`, as `/dev/kvm`. What the host lacks is left
    /// out.
    pub devices: Vec<PathBuf>,
    /// How much it may use.
    pub limits: Limits,
}

/// Something of the host that the process sees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Show {
    /// Where it is, here and there.
    pub path: PathBuf,
    /// What may be done with it.
    pub access: Access,
    /// What is changed on the host so that the process's user may do it.
    pub grant: Grant,
}

/// What may be done with something shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    /// Read.
    Read,
    /// Read and execute.
    Run,
    /// Read and write.
    Write,
}

/// How the process's user comes to its rights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Grant {
    /// It has them: everybody does.
    Nothing,
    /// The file or directory becomes its own. Never for a directory in which the server opens files by name.
    Owner,
    /// The group of all jails may read it. For what several machines share.
    Group,
}

/// How much a process may use. What is absent is not limited.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory, page cache included.
    pub memory_bytes: Option<u64>,
    /// Processors' worth of time.
    pub processors: Option<u32>,
    /// Processes and threads.
    pub processes: Option<u64>,
    /// Open descriptors.
    pub descriptors: Option<u64>,
    /// Length of any file that it writes.
    pub file_bytes: Option<u64>,
    /// Bytes a second read from, and written to, the disk that holds `disk`.
    pub disk_bytes_per_second: Option<u64>,
    /// A file on the disk that is limited.
    pub disk: Option<PathBuf>,
}

impl Show {
    /// For reading, where everybody may read.
    pub fn read(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            access: Access::Read,
            grant: Grant::Nothing,
        }
    }

    /// For reading and executing, where everybody may.
    pub fn run(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            access: Access::Run,
            grant: Grant::Nothing,
        }
    }

    /// For reading by this and other jails.
    pub fn shared(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            access: Access::Read,
            grant: Grant::Group,
        }
    }

    /// For writing, by this jail alone.
    pub fn own(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            access: Access::Write,
            grant: Grant::Owner,
        }
    }
}

impl JailSpec {
    /// Refuses what can't be shown at its usual place.
    pub(crate) fn check(&self) -> Result<(), JailError> {
        for show in &self.show {
            check_path(&show.path)?;
            if ["/proc", "/sys/fs", "/dev"]
                .iter()
                .any(|taken| show.path.starts_with(taken))
            {
                return Err(JailError::Invalid(format!(
                    "{} lies where the jail has its own",
                    show.path.display()
                )));
            }
        }
        for device in &self.devices {
            check_path(device)?;
            if !device.starts_with("/dev") {
                return Err(JailError::Invalid(format!(
                    "{} lies outside /dev",
                    device.display()
                )));
            }
        }
        Ok(())
    }
}

fn check_path(path: &Path) -> Result<(), JailError> {
    let plain = path
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if path.is_absolute() && plain && path.components().count() > 1 {
        Ok(())
    } else {
        Err(JailError::Invalid(format!(
            "{} is no absolute path without detours",
            path.display()
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_specification_is_plain_data() {
        let spec = JailSpec {
            show: vec![Show::own("/srv/a"), Show::shared("/srv/b"), Show::run("/opt/vmm")],
            devices: vec!["/dev/kvm".into()],
            limits: Limits {
                processes: Some(64),
                ..Limits::default()
            },
        };
        spec.check().unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<JailSpec>(&text).unwrap(), spec);
    }

    #[test]
    fn paths_with_detours_and_places_of_the_jail_are_refused() {
        for path in ["relative", "/", "/srv/../etc/shadow", "/proc/1/mem", "/dev/sda"] {
            let spec = JailSpec {
                show: vec![Show::read(path)],
                ..JailSpec::default()
            };
            assert!(spec.check().is_err(), "{path}");
        }
        let spec = JailSpec {
            devices: vec!["/srv/null".into()],
            ..JailSpec::default()
        };
        assert!(spec.check().is_err());
    }
}
