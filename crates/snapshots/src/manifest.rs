//! What a snapshot consists of: checked before anything is started. Where it can go on is for the caller to say.

use blake3::Hash;
use serde::{Deserialize, Serialize};

use crate::error::Part;
use crate::layout::check_memory_bytes;
use crate::sealed::{self, Kind, Refusal};
use crate::{Error, MemoryId, Result};

const KIND: Kind = Kind {
    magic: b"hypemSNP",
    version: 1,
};
/// The largest manifest that is read, bytes.
pub const MAX_MANIFEST: usize = 64 << 10;

/// What was captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotKind {
    /// Memory, devices and disk of one instant.
    Standby,
    /// The disk alone.
    Stopped,
}

/// A VMM as far as captured devices depend on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vmm {
    /// The product, as in `qemu`.
    pub name: String,
    /// Its version, whole.
    pub version: String,
    /// The board, as in `pc-q35-7.2`.
    pub machine: String,
}

/// A part that is compared as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    /// Its length, bytes.
    pub bytes: u64,
    /// Its BLAKE3.
    #[serde(with = "hexadecimal")]
    pub digest: Hash,
}

impl Blob {
    /// Describes bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.len() as u64,
            digest: blake3::hash(bytes),
        }
    }

    /// Compares bytes with what they should be.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming the device state: nothing else is kept as one piece.
    pub fn check(&self, bytes: &[u8]) -> Result<()> {
        if *self == Self::of(bytes) {
            return Ok(());
        }
        Err(Error::Damaged {
            part: Part::DeviceState,
            reason: "it differs from what was captured",
        })
    }
}

/// Which image of memory belongs to a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryPart {
    /// The image.
    pub id: MemoryId,
    /// The seal of its index, which commits to all bytes of it and its ancestors.
    #[serde(with = "hexadecimal")]
    pub digest: Hash,
}

/// The manifest of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// What was captured.
    pub kind: SnapshotKind,
    /// Where the devices come from.
    pub vmm: Vmm,
    /// Which kernel runs in the guest.
    pub kernel: String,
    /// What the guest's CPU can do: words between spaces.
    pub cpu_features: String,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Disks that the devices know.
    pub disks: u32,
    /// Whether the devices know a network card.
    pub network: bool,
    /// The memory of a standby snapshot.
    pub memory: Option<MemoryPart>,
    /// The device state of a standby snapshot.
    pub device_state: Option<Blob>,
    /// The seal of the digest of the writable disk.
    #[serde(with = "hexadecimal::option")]
    pub disk: Option<Hash>,
    /// The seal of the digest of the root disk that lies below the writable one.
    #[serde(with = "hexadecimal::option")]
    pub root_disk: Option<Hash>,
    /// The snapshot that the guest descends from, for people.
    pub parent: Option<String>,
}

impl Manifest {
    /// What to store.
    ///
    /// # Errors
    /// [`Error::Invalid`] when its fields contradict each other, or for words without measure.
    pub fn seal(&self) -> Result<Vec<u8>> {
        let invalid = |reason: String| Error::Invalid(format!("this manifest cannot be written: {reason}"));
        let body = serde_json::to_vec(self).map_err(|error| invalid(error.to_string()))?;
        let (bytes, _) = sealed::seal(&KIND, &body);
        if bytes.len() > MAX_MANIFEST {
            return Err(invalid(format!("it has {} bytes", bytes.len())));
        }
        self.check().map_err(|reason| invalid(reason.to_owned()))?;
        Ok(bytes)
    }

    /// Reads what was stored.
    ///
    /// # Errors
    /// [`Error::Damaged`] when a single bit is not as it was written, [`Error::Version`] for another format.
    pub fn open(bytes: &[u8]) -> Result<Self> {
        let damaged = |reason| Error::Damaged {
            part: Part::Manifest,
            reason,
        };
        if bytes.len() > MAX_MANIFEST {
            return Err(damaged("it is too large"));
        }
        let (body, _) = sealed::open(&KIND, bytes).map_err(|refusal| match refusal {
            Refusal::Damaged(reason) => damaged(reason),
            Refusal::Version(found) => Error::Version {
                part: Part::Manifest,
                found,
                known: KIND.version,
            },
        })?;
        let manifest: Self =
            serde_json::from_slice(body).map_err(|_| damaged("its fields are not those of a manifest"))?;
        manifest.check().map_err(damaged)?;
        Ok(manifest)
    }

    fn check(&self) -> std::result::Result<(), &'static str> {
        let standby = self.kind == SnapshotKind::Standby;
        if self.memory.is_some() != standby || self.device_state.is_some() != standby {
            return Err("memory and devices belong to standby snapshots, and only to them");
        }
        if check_memory_bytes(self.memory_bytes).is_err() || self.vcpus == 0 {
            return Err("no machine has that much memory or that many CPUs");
        }
        Ok(())
    }
}

/// Digests as 64 lower-case hexadecimal digits.
mod hexadecimal {
    use blake3::Hash;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(digest: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&digest.to_hex())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Hash, D::Error> {
        Hash::from_hex(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }

    pub(super) mod option {
        use super::{Deserialize, Deserializer, Error, Hash, Serializer};

        pub(in super::super) fn serialize<S: Serializer>(
            digest: &Option<Hash>,
            serializer: S,
        ) -> Result<S::Ok, S::Error> {
            match digest {
                Some(digest) => serializer.serialize_some(digest.to_hex().as_str()),
                None => serializer.serialize_none(),
            }
        }

        pub(in super::super) fn deserialize<'de, D: Deserializer<'de>>(
            deserializer: D,
        ) -> Result<Option<Hash>, D::Error> {
            let digest = Option::<String>::deserialize(deserializer)?;
            digest
                .map(|digest| Hash::from_hex(digest).map_err(D::Error::custom))
                .transpose()
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> Manifest {
        Manifest {
            kind: SnapshotKind::Standby,
            vmm: Vmm {
                name: "qemu".into(),
                version: "7.2.19".into(),
                machine: "pc-q35-7.2".into(),
            },
            kernel: "6.1-small".into(),
            cpu_features: "avx sse2".into(),
            memory_bytes: 256 << 20,
            vcpus: 2,
            disks: 2,
            network: true,
            memory: Some(MemoryPart {
                id: MemoryId([3; 16]),
                digest: blake3::hash(b"index"),
            }),
            device_state: Some(Blob::of(b"devices")),
            disk: Some(blake3::hash(b"disk")),
            root_disk: None,
            parent: None,
        }
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_refused(bit: prop::sample::Index) {
            let mut bytes = manifest().seal().unwrap();
            prop_assert_eq!(Manifest::open(&bytes).unwrap(), manifest());
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Manifest::open(&bytes).unwrap_err().is_damage());
        }
    }

    #[test]
    fn contradictions_are_refused() {
        let stopped = Manifest {
            kind: SnapshotKind::Stopped,
            ..manifest()
        };
        assert!(stopped.seal().is_err());
        assert!(
            Manifest {
                vcpus: 0,
                ..manifest()
            }
            .seal()
            .is_err()
        );
        assert!(
            Manifest {
                kernel: "k".repeat(MAX_MANIFEST),
                ..manifest()
            }
            .seal()
            .is_err()
        );
        Manifest {
            memory: None,
            device_state: None,
            ..stopped
        }
        .seal()
        .unwrap();
    }
}
