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

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use hypeman_vmm::{StateIdentity, VmmKind};
use serde::{Deserialize, Serialize};

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

/// Writes both files, durably; returns the digest of the manifest.
pub(crate) fn write(directory: &Path, facts: Facts, devices: &[u8]) -> Result<String, EngineError> {
    let manifest = Manifest {
        format: FORMAT,
        facts,
        devices_bytes: devices.len() as u64,
        devices_blake3: blake3::hash(devices).to_hex().to_string(),
    };
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| EngineError::io("encode the manifest", error.into()))?;
    let write = || -> io::Result<()> {
        write_synced(&directory.join(DEVICES), devices)?;
        write_synced(&directory.join(MANIFEST), &text)?;
        sync_directory(directory)?;
        directory.parent().map_or(Ok(()), sync_directory)
    };
    write().map_err(|error| EngineError::io("write the device state", error))?;
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

/// Gives another directory the same files.
pub(crate) fn share(from: &Path, to: &Path) -> Result<(), EngineError> {
    let link = || -> io::Result<()> {
        for name in [DEVICES, MANIFEST] {
            std::fs::hard_link(from.join(name), to.join(name))?;
        }
        sync_directory(to)?;
        to.parent().map_or(Ok(()), sync_directory)
    };
    link().map_err(|error| EngineError::io("share the device state", error))
}

/// Bytes of the device state.
pub(crate) fn devices_bytes(directory: &Path) -> u64 {
    std::fs::metadata(directory.join(DEVICES)).map_or(0, |metadata| metadata.len())
}

/// The machine that is to go on.
pub(crate) struct Present<'a> {
    pub(crate) hypervisor: VmmKind,
    pub(crate) identities: &'a [StateIdentity],
    pub(crate) boot_artifacts: &'a str,
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
    pub(crate) networked: bool,
}

/// Says what of the captured machine the present one does not have. `None` when all fits.
pub(crate) fn mismatch(captured: &Facts, present: &Present<'_>) -> Option<String> {
    if captured.hypervisor != present.hypervisor {
        return Some(format!(
            "it was captured on {:?} and memory cannot change the hypervisor; use a Stopped snapshot for that",
            captured.hypervisor
        ));
    }
    if !present.identities.contains(&captured.identity) {
        let here: Vec<String> = present.identities.iter().map(described).collect();
        return Some(format!(
            "it was captured by {}, this host has {}; install that version again, beside the one that is there, or \
             use a Stopped snapshot",
            described(&captured.identity),
            here.join(" and ")
        ));
    }
    if captured.boot_artifacts != present.boot_artifacts {
        return Some("it was captured with another guest kernel; use a Stopped snapshot".to_owned());
    }
    // A VMM may take the state of another shape without a word, and its guest would be lost.
    let former = (captured.memory_bytes, captured.vcpus, captured.networked);
    let shape = (present.memory_bytes, present.vcpus, present.networked);
    (former != shape).then(|| {
        format!(
            "it was captured with {} bytes of memory, {} vCPUs and {}, and would go on with {} bytes, {} vCPUs and {}",
            former.0,
            former.1,
            network(former.2),
            shape.0,
            shape.1,
            network(shape.2)
        )
    })
}

fn network(present: bool) -> &'static str {
    if present { "a network" } else { "no network" }
}

fn described(identity: &StateIdentity) -> String {
    format!(
        "{:?} {} (machine {}, processor {}, {:?})",
        identity.vmm, identity.version, identity.machine, identity.cpu, identity.accelerator
    )
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
        let (both, newer) = (
            [identity("10.0.2"), identity("7.2.0")],
            [identity("10.0.2"), identity("9.2.0")],
        );
        let present = |identities, vcpus, boot_artifacts, hypervisor| Present {
            hypervisor,
            identities,
            boot_artifacts,
            memory_bytes: 1 << 28,
            vcpus,
            networked: true,
        };
        let says = |present: Present<'_>| mismatch(&manifest.facts, &present);
        assert_eq!(says(present(&both, 1, "kernel", VmmKind::Qemu)), None);
        for (present, word) in [
            (present(&newer, 1, "kernel", VmmKind::Qemu), "9.2.0"),
            (present(&both, 2, "kernel", VmmKind::Qemu), "2 vCPUs"),
            (present(&both, 1, "other", VmmKind::Qemu), "kernel"),
            (present(&both, 1, "kernel", VmmKind::QemuMicrovm), "Stopped"),
        ] {
            let reason = says(present).unwrap();
            assert!(reason.contains(word), "{reason}");
        }
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
