//! The state of a machine beside its memory and disk: a directory with two files.
//!
//! ```text
//!  manifest.json   what is needed to go on: format, hypervisor, kernel, shape of the machine, digests of the rest
//!  devices.state   what the VMM wrote about its devices
//! ```
//!
//! The digest of the manifest stands in the record that names the directory, the digest of the devices in the
//! manifest: no bit of either can change without being noticed, and both are checked before a VMM starts.
//! A directory is written under its final name and counts only once a committed record names it.

mod fit;

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use hypeman_vmm::{StateIdentity, VmmKind};
use serde::{Deserialize, Serialize};

pub(crate) use self::fit::{Present, mismatch, without_vmm};
use crate::EngineError;
use crate::durable::sync_directory;

/// Raised with every change that an older server could not load.
const FORMAT: u32 = 1;
const MANIFEST: &str = "manifest.json";
pub(crate) const DEVICES: &str = "devices.state";
/// Far above what any machine writes: about 200 kB.
const MAX_FILE: u64 = 64 << 20;
/// The largest device state that is taken from elsewhere, bytes.
pub(crate) const MAX_DEVICES: u64 = MAX_FILE / 2;

/// What is said of a captured machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// Which VMM wrote it.
    pub(crate) hypervisor: VmmKind,
    /// Version and machine, as the VMM names them.
    pub(crate) identity: StateIdentity,
    /// Kernel and initramfs.
    pub(crate) boot_artifacts: String,
    /// Guest memory in bytes.
    pub(crate) memory_bytes: u64,
    /// Virtual CPUs.
    pub(crate) vcpus: u32,
    /// Whether it has a network interface.
    pub(crate) networked: bool,
    /// Its memory image.
    pub(crate) memory_image: String,
    /// What that image holds, hex: it commits to each byte.
    pub(crate) memory_digest: String,
}

/// What a captured machine needs to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    format: u32,
    pub(crate) facts: Facts,
    devices_bytes: u64,
    devices_blake3: String,
}

/// A device state that was written, as the manifest names it.
#[derive(Debug)]
pub(crate) struct Devices {
    bytes: u64,
    blake3: String,
}

/// Writes both files, durably; returns the digest of the manifest.
pub(crate) fn write(directory: &Path, facts: Facts, devices: &[u8]) -> Result<String, EngineError> {
    let devices = write_devices(directory, devices)?;
    seal(directory, facts, devices)
}

/// Writes the device state. It counts once a manifest names it.
pub(crate) fn write_devices(directory: &Path, devices: &[u8]) -> Result<Devices, EngineError> {
    write_synced(&directory.join(DEVICES), devices)
        .map_err(|error| EngineError::io("write the device state", error))?;
    Ok(Devices {
        bytes: devices.len() as u64,
        blake3: blake3::hash(devices).to_hex().to_string(),
    })
}

/// Writes the manifest and makes both names durable; returns its digest.
pub(crate) fn seal(directory: &Path, facts: Facts, devices: Devices) -> Result<String, EngineError> {
    let manifest = Manifest {
        format: FORMAT,
        facts,
        devices_bytes: devices.bytes,
        devices_blake3: devices.blake3,
    };
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| EngineError::io("encode the manifest", error.into()))?;
    let write = || -> io::Result<()> {
        write_synced(&directory.join(MANIFEST), &text)?;
        sync_names(directory)
    };
    write().map_err(|error| EngineError::io("write the manifest", error))?;
    Ok(blake3::hash(&text).to_hex().to_string())
}

/// Reads and checks both files. `digest` is what the record says of the manifest.
pub(crate) fn read(directory: &Path, digest: &str) -> Result<(Manifest, Vec<u8>), EngineError> {
    let text = read_bounded(&directory.join(MANIFEST))?;
    if blake3::hash(&text).to_hex().as_str() != digest {
        return Err(EngineError::damaged("the manifest"));
    }
    let manifest: Manifest = serde_json::from_slice(&text).map_err(|_| {
        EngineError::Incompatible(format!(
            "its manifest was written in a format that this server (format {FORMAT}) does not know; \
             restore it with the version of hypeman that wrote it"
        ))
    })?;
    if manifest.format != FORMAT {
        return Err(EngineError::Incompatible(format!(
            "it was written in format {}, this server reads format {FORMAT}; restore it with the version of \
             hypeman that wrote it",
            manifest.format
        )));
    }
    let devices = read_bounded(&directory.join(DEVICES))?;
    let whole = devices.len() as u64 == manifest.devices_bytes
        && blake3::hash(&devices).to_hex().as_str() == manifest.devices_blake3;
    if whole {
        Ok((manifest, devices))
    } else {
        Err(EngineError::damaged("the device state"))
    }
}

/// Makes a directory's entries and its own name durable.
pub(crate) fn sync_names(directory: &Path) -> io::Result<()> {
    sync_directory(directory)?;
    directory.parent().map_or(Ok(()), sync_directory)
}

/// Gives another directory the same files. They survive power loss only after [`sync_names`].
pub(crate) fn share(from: &Path, to: &Path) -> Result<(), EngineError> {
    let link = || {
        [DEVICES, MANIFEST]
            .into_iter()
            .try_for_each(|name| std::fs::hard_link(from.join(name), to.join(name)))
    };
    link().map_err(|error| EngineError::io("share the device state", error))
}

/// Bytes of the device state.
pub(crate) fn devices_bytes(directory: &Path) -> u64 {
    std::fs::metadata(directory.join(DEVICES)).map_or(0, |metadata| metadata.len())
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, EngineError> {
    let read = || -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        std::fs::File::open(path)?
            .take(MAX_FILE)
            .read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    read().map_err(|error| EngineError::io("read the device state", error))
}

#[cfg(test)]
mod tests {
    use hypeman_vmm::Accelerator;

    use super::fit::unlike;
    use super::*;

    fn identity(version: &str) -> StateIdentity {
        StateIdentity {
            vmm: VmmKind::Qemu,
            version: version.to_owned(),
            machine: "pc-q35-7.2".to_owned(),
            cpu: "max".to_owned(),
            accelerator: Accelerator::Tcg,
        }
    }

    fn written(directory: &Path) -> String {
        let facts = Facts {
            hypervisor: VmmKind::Qemu,
            identity: identity("7.2.0"),
            boot_artifacts: "kernel".to_owned(),
            memory_bytes: 1 << 28,
            vcpus: 1,
            networked: true,
            memory_image: "image".to_owned(),
            memory_digest: "digest".to_owned(),
        };
        write(directory, facts, b"devices").unwrap()
    }

    #[test]
    fn what_differs_is_named_with_what_to_do() {
        let directory = tempfile::tempdir().unwrap();
        let digest = written(directory.path());
        let (manifest, devices) = read(directory.path(), &digest).unwrap();
        assert_eq!(devices, b"devices");
        let says = |change: fn(&mut StateIdentity), present: fn(&mut Present<'_>)| {
            let mut identities = [identity("10.0.2"), identity("7.2.0")];
            identities.iter_mut().for_each(change);
            let mut here = Present {
                hypervisor: VmmKind::Qemu,
                identities: &identities,
                boot_artifacts: "kernel",
                memory_bytes: 1 << 28,
                vcpus: 1,
                networked: true,
            };
            present(&mut here);
            mismatch(&manifest.facts, &here)
        };
        assert_eq!(says(|_| {}, |_| {}), None);
        type Case = (fn(&mut StateIdentity), fn(&mut Present<'_>), [&'static str; 3]);
        let cases: [Case; 11] = [
            (
                |_| {},
                |here| here.hypervisor = VmmKind::QemuMicrovm,
                ["on qemu,", "qemu-microvm", "Stopped snapshot"],
            ),
            (
                |_| {},
                |here| here.identities = &[],
                ["the hypervisor qemu", "none", "install that one"],
            ),
            (
                |here| here.vmm = VmmKind::Firecracker,
                |_| {},
                ["the hypervisor qemu", "firecracker", "install that one"],
            ),
            (
                |here| here.version = format!("{}-other", here.version),
                |_| {},
                [
                    "version 7.2.0",
                    "10.0.2-other and 7.2.0-other",
                    "a QEMU of that version",
                ],
            ),
            (
                |here| here.machine = "pc-q35-9.0".to_owned(),
                |_| {},
                ["machine type pc-q35-7.2", "pc-q35-9.0", "a build"],
            ),
            // Another accelerator shows the guest another processor: what is said is the cause.
            (
                |here| (here.accelerator, here.cpu) = (Accelerator::Kvm, "EPYC".to_owned()),
                |_| {},
                ["accelerator tcg", "kvm", "runs guests with that one"],
            ),
            (
                |here| here.cpu = "EPYC".to_owned(),
                |_| {},
                ["processor max", "EPYC", "a host with that one"],
            ),
            (
                |_| {},
                |here| here.boot_artifacts = "other",
                ["guest kernel kernel", "other", "fork it"],
            ),
            (
                |_| {},
                |here| here.memory_bytes = 1 << 29,
                [
                    "268435456 bytes of memory",
                    "536870912 bytes of memory",
                    "fork it",
                ],
            ),
            (|_| {}, |here| here.vcpus = 2, ["1 vCPUs", "2 vCPUs", "fork it"]),
            (
                |_| {},
                |here| here.networked = false,
                ["a network", "no network", "fork it"],
            ),
        ];
        for (change, present, words) in cases {
            let reason = says(change, present).unwrap();
            for word in words {
                assert!(reason.contains(word), "{word:?} in {reason}");
            }
            // Whoever reads of a processor must not be sent to install a version.
            let advised = reason.contains("of that version");
            assert_eq!(advised, words.contains(&"a QEMU of that version"), "{reason}");
        }
        let reason = without_vmm(VmmKind::CloudHypervisor, "no binary; install it");
        assert!(
            reason.contains("cloud-hypervisor") && reason.contains("install it"),
            "{reason}"
        );
    }

    #[test]
    fn another_version_is_put_where_the_host_looks_for_it() {
        for (vmm, advice, useless) in [
            (VmmKind::Qemu, "hypervisor.qemu_binary_path", "beside"),
            (VmmKind::QemuMicrovm, "hypervisor.qemu_binary_path", "beside"),
            (VmmKind::CloudHypervisor, "beside", "binary_path"),
            (VmmKind::Firecracker, "beside", "binary_path"),
        ] {
            let of = |version| StateIdentity {
                vmm,
                ..identity(version)
            };
            let reason = unlike(&of("1.0.0"), &[of("2.0.0")]).unwrap();
            assert!(
                reason.contains(advice) && !reason.contains(useless),
                "{vmm:?}: {reason}"
            );
        }
    }

    #[test]
    fn another_format_is_named_with_the_one_that_is_read() {
        let directory = tempfile::tempdir().unwrap();
        written(directory.path());
        let path = directory.path().join(MANIFEST);
        let mut manifest: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        manifest["format"] = 2.into();
        let text = manifest.to_string();
        std::fs::write(&path, &text).unwrap();
        let digest = blake3::hash(text.as_bytes()).to_hex().to_string();
        let refused = read(directory.path(), &digest).unwrap_err();
        assert!(matches!(refused, EngineError::Incompatible(_)), "{refused}");
        let message = refused.to_string();
        assert!(
            message.contains("format 2") && message.contains("format 1"),
            "{message}"
        );
    }

    #[test]
    fn no_bit_of_either_file_can_change_unnoticed() {
        let directory = tempfile::tempdir().unwrap();
        let digest = written(directory.path());
        for (file, part) in [(MANIFEST, "manifest"), (DEVICES, "device state")] {
            let path = directory.path().join(file);
            let whole = std::fs::read(&path).unwrap();
            for place in [0, whole.len() / 2, whole.len() - 1] {
                let mut flipped = whole.clone();
                flipped[place] ^= 1;
                std::fs::write(&path, flipped).unwrap();
                let refusal = read(directory.path(), &digest).unwrap_err().to_string();
                assert!(refusal.contains(part), "{refusal}");
            }
            std::fs::write(&path, &whole).unwrap();
        }
        assert!(read(directory.path(), &digest).is_ok());
    }
}
