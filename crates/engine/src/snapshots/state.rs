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
const DEVICES: &str = "devices.state";
/// Far above what any machine writes: about 200 kB.
const MAX_FILE: u64 = 64 << 20;

/// What a captured machine needs to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Manifest {
    format: u32,
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
    devices_bytes: u64,
    devices_blake3: String,
}

/// What a new manifest says of the machine.
pub(crate) struct Facts {
    pub(crate) hypervisor: VmmKind,
    pub(crate) identity: StateIdentity,
    pub(crate) boot_artifacts: String,
    pub(crate) memory_bytes: u64,
    pub(crate) vcpus: u32,
    pub(crate) networked: bool,
    pub(crate) memory_image: String,
}

/// Writes both files, durably; returns the digest of the manifest.
pub(crate) fn write(directory: &Path, facts: Facts, devices: &[u8]) -> Result<String, EngineError> {
    let manifest = Manifest {
        format: FORMAT,
        hypervisor: facts.hypervisor,
        identity: facts.identity,
        boot_artifacts: facts.boot_artifacts,
        memory_bytes: facts.memory_bytes,
        vcpus: facts.vcpus,
        networked: facts.networked,
        memory_image: facts.memory_image,
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

/// Says what of the captured machine this host does not have. `None` when all fits.
pub(crate) fn mismatch(
    manifest: &Manifest,
    hypervisor: VmmKind,
    identity: &StateIdentity,
    boot_artifacts: &str,
) -> Option<String> {
    if manifest.hypervisor != hypervisor {
        return Some(format!(
            "it was captured on {:?} and memory cannot change the hypervisor; use a Stopped snapshot for that",
            manifest.hypervisor
        ));
    }
    if &manifest.identity != identity {
        return Some(format!(
            "it was captured by {}, this host has {}; install that version again, or use a Stopped snapshot",
            described(&manifest.identity),
            described(identity)
        ));
    }
    (manifest.boot_artifacts != boot_artifacts)
        .then(|| "it was captured with another guest kernel".to_owned())
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
