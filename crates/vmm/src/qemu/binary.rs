//! The QEMU of this host: where it is, what it is, what accelerates it.
//!
//! Invariant: answers belong to one binary (path, size, time of change). When the file changes, everything is
//! asked anew; otherwise an answer costs one `stat`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

use super::arguments::Host;
use super::board::Board;
use crate::binaries::{Stamp, executable_names, output};
use crate::probe::{TscFrequency, kvm_opens, kvm_runs_a_guest, processor_abilities, processor_name};
use crate::{Accelerator, StateIdentity, VmmError};

const PROGRAM: &str = "qemu-system-x86_64";
/// What the names of all its executables begin with.
const FAMILY: &str = "qemu";
/// The oldest QEMU whose command line and protocol this driver speaks.
const OLDEST: (u32, u32) = (7, 0);
/// Goes up when a machine of the same specification gets other devices than before, or others places for them.
const DEVICES_REVISION: u32 = 1;
const FIRMWARE: [&str; 3] = [
    "/usr/share/qemu/qboot.rom",
    "/usr/share/qboot/qboot.rom",
    "/usr/local/share/qemu/qboot.rom",
];

/// All that a launch needs to know of the host.
#[derive(Debug, Clone)]
pub(crate) struct Facts {
    pub(crate) program: PathBuf,
    pub(crate) version: String,
    pub(crate) arguments: Host,
    /// Why KVM is not used, where it is not.
    pub(crate) without_kvm: Option<String>,
    has_microvm: bool,
}

impl Facts {
    /// What a device state that this QEMU writes needs to be loaded again.
    pub(crate) fn state_identity(&self, board: Board) -> StateIdentity {
        let arguments = &self.arguments;
        let firmware = arguments
            .firmware
            .as_deref()
            .and_then(Path::file_name)
            .unwrap_or_default();
        StateIdentity {
            vmm: board.kind(),
            version: self.version.clone(),
            machine: format!(
                "{};firmware={};devices={DEVICES_REVISION}",
                board.machine(&arguments.q35_name),
                firmware.to_string_lossy()
            ),
            cpu: match arguments.accelerator {
                Accelerator::Kvm => format!("host {}", processor_abilities()),
                // The guest's clock counts the host's cycles, at the rate that was measured when it booted.
                Accelerator::Tcg => format!("max, cycles of {}", processor_name()),
            },
            accelerator: arguments.accelerator,
        }
    }
}

/// Finds and remembers the host's QEMU.
#[derive(Debug)]
pub(crate) struct QemuHost {
    configured: Option<PathBuf>,
    search_path: Vec<PathBuf>,
    accelerator: Option<Accelerator>,
    cache: Option<PathBuf>,
    tsc: TscFrequency,
    known: Mutex<Option<(Stamp, Arc<Facts>)>>,
}

/// A judgement on KVM, kept over a restart of the server.
#[derive(Serialize, Deserialize)]
struct Judgement {
    stamp: Stamp,
    refusal: Option<String>,
}

impl QemuHost {
    pub(crate) fn new(
        configured: Option<PathBuf>,
        search_path: Vec<PathBuf>,
        accelerator: Option<Accelerator>,
        cache_directory: Option<PathBuf>,
    ) -> Self {
        let cache = cache_directory.map(|directory| directory.join("kvm-probe.json"));
        let tsc = TscFrequency::start();
        Self {
            configured,
            search_path,
            accelerator,
            cache,
            tsc,
            known: Mutex::new(None),
        }
    }

    /// What is known of the host for this board, asked anew when the binary has changed.
    pub(crate) async fn facts(&self, board: Board) -> Result<Arc<Facts>, VmmError> {
        let program = self.program()?;
        let stamp = Stamp::of(&program)?;
        let mut known = self.known.lock().await;
        let facts = match known.as_ref() {
            Some((remembered, facts)) if *remembered == stamp => Arc::clone(facts),
            _ => {
                let facts = Arc::new(self.ask(program, &stamp).await?);
                *known = Some((stamp, Arc::clone(&facts)));
                facts
            }
        };
        drop(known);
        if board == Board::Microvm && !facts.has_microvm {
            return Err(VmmError::Unavailable(format!(
                "{} {} has no microvm board",
                facts.program.display(),
                facts.version
            )));
        }
        Ok(facts)
    }

    fn program(&self) -> Result<PathBuf, VmmError> {
        if let Some(configured) = &self.configured {
            return match configured.is_file() {
                true => Ok(configured.clone()),
                false => Err(VmmError::Unavailable(format!(
                    "{} is configured as QEMU and does not exist",
                    configured.display()
                ))),
            };
        }
        self.search_path.iter().map(|directory| directory.join(PROGRAM)).find(|path| path.is_file()).ok_or_else(
            || {
                VmmError::Unavailable(format!(
                    "{PROGRAM} is not installed: install the package qemu-system-x86 or name the binary in the \
                     configuration"
                ))
            },
        )
    }

    /// See [`executable_names`].
    pub(crate) fn executable_names(&self) -> Vec<OsString> {
        let configured = self.configured.iter().cloned();
        let searched = self.search_path.iter().map(|directory| directory.join(PROGRAM));
        executable_names(FAMILY, configured.chain(searched))
    }

    async fn ask(&self, program: PathBuf, stamp: &Stamp) -> Result<Facts, VmmError> {
        let (banner, machines, sandbox, memory_files) = tokio::join!(
            output(&program, &["--version"]),
            output(&program, &["-machine", "help"]),
            output(&program, &["-sandbox", "help"]),
            output(&program, &["-object", "memory-backend-file,help"]),
        );
        let banner = banner?;
        let version = parse_version(&banner).ok_or_else(|| {
            VmmError::Unavailable(format!(
                "{} does not say which version of QEMU it is",
                program.display()
            ))
        })?;
        let numbers = version_numbers(&version);
        if numbers < OLDEST {
            return Err(VmmError::Unavailable(format!(
                "QEMU {version} is too old: {}.{} or newer is needed",
                OLDEST.0, OLDEST.1
            )));
        }
        let machines = machines?;
        let q35_name = q35_name(&machines).unwrap_or_else(|| "q35".to_owned());
        let has_microvm = machines.lines().any(|line| line.starts_with("microvm "));
        let (accelerator, without_kvm) = match self.accelerator {
            Some(chosen) => (chosen, None),
            None => match self.judge(&program, stamp).await {
                None => (Accelerator::Kvm, None),
                Some(reason) => (Accelerator::Tcg, Some(reason)),
            },
        };
        let tsc_khz = match accelerator {
            // Under translation the guest reads the host's counter; under KVM it has a clock of its own.
            Accelerator::Tcg => self.tsc.khz().await,
            Accelerator::Kvm => None,
        };
        if let Some(reason) = &without_kvm {
            tracing::info!(reason, "KVM is not used: guests are translated");
        }
        let firmware = FIRMWARE.iter().map(PathBuf::from).find(|path| path.is_file());
        let sandbox = sandbox.is_ok();
        let read_only_memory_files = memory_files?.lines().any(|line| line.trim().starts_with("rom=<"));
        let arguments = Host {
            accelerator,
            q35_name,
            firmware,
            tsc_khz,
            read_only_memory_files,
            sandbox,
        };
        Ok(Facts {
            program,
            version,
            arguments,
            without_kvm,
            has_microvm,
        })
    }

    /// Why no VMM should run its guests by KVM here, in words for an operator. Without a QEMU to try it with, a
    /// device that opens has to do.
    pub(crate) async fn refusal_of_kvm(&self) -> Option<String> {
        let Ok(program) = self.program() else {
            return kvm_opens().err();
        };
        match Stamp::of(&program) {
            Ok(stamp) => self.judge(&program, &stamp).await,
            Err(error) => Some(error.to_string()),
        }
    }

    /// Why KVM cannot be used, from the record of this boot or from an experiment.
    async fn judge(&self, program: &Path, stamp: &Stamp) -> Option<String> {
        if let Some(judgement) = self.recorded().filter(|judgement| judgement.stamp == *stamp) {
            return judgement.refusal;
        }
        let refusal = kvm_runs_a_guest(program).await.err();
        self.record(&Judgement {
            stamp: stamp.clone(),
            refusal: refusal.clone(),
        });
        refusal
    }

    fn recorded(&self) -> Option<Judgement> {
        let bytes = std::fs::read(self.cache.as_ref()?).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    /// The record only saves time, so a failure to write it is none of the caller's business.
    fn record(&self, judgement: &Judgement) {
        let Some(path) = &self.cache else { return };
        let write = || -> std::io::Result<()> {
            let temporary = path.with_extension("new");
            std::fs::write(&temporary, serde_json::to_vec(judgement)?)?;
            std::fs::rename(&temporary, path)
        };
        if let Err(error) = write() {
            tracing::debug!(%error, path = %path.display(), "the judgement on KVM is not kept");
        }
    }
}

/// `7.2.22` of `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
fn parse_version(banner: &str) -> Option<String> {
    let rest = banner.split_once("version ")?.1;
    let version: String = rest
        .chars()
        .take_while(|letter| letter.is_ascii_digit() || *letter == '.')
        .collect();
    version.contains('.').then_some(version)
}

fn version_numbers(version: &str) -> (u32, u32) {
    let mut numbers = version.split('.').map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// What `q35` stands for in this QEMU.
fn q35_name(machines: &str) -> Option<String> {
    let line = machines.lines().find(|line| line.starts_with("q35 "))?;
    let name = line.split_once("(alias of ")?.1.split(')').next()?;
    Some(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_and_names_are_read_as_qemu_writes_them() {
        let banner = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright";
        assert_eq!(parse_version(banner).as_deref(), Some("7.2.22"));
        assert_eq!(version_numbers("10.0.2"), (10, 0));
        assert!(version_numbers("6.2.0") < OLDEST);
        let machines = "Supported machines are:\n\
            pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-7.2)\n\
            q35                  Standard PC (Q35 + ICH9, 2009) (alias of pc-q35-7.2)\n";
        assert_eq!(q35_name(machines).as_deref(), Some("pc-q35-7.2"));
        assert_eq!(q35_name("none\n"), None);
        assert_eq!(parse_version("something else"), None);
    }

    #[tokio::test]
    async fn a_missing_binary_says_what_to_install() {
        let host = QemuHost::new(None, vec!["/nonexistent".into()], None, None);
        let error = host.facts(Board::Q35).await.unwrap_err().to_string();
        assert!(error.contains("qemu-system-x86"), "{error}");
        let host = QemuHost::new(Some("/nonexistent/qemu".into()), Vec::new(), None, None);
        assert!(
            host.facts(Board::Q35)
                .await
                .unwrap_err()
                .to_string()
                .contains("/nonexistent/qemu")
        );
    }
}
