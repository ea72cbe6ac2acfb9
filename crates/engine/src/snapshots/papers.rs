//! What travels with an exported snapshot beside its memory, devices and disk: what the engine knows of it.
//!
//! The papers stand in the file's description as JSON. Whoever wrote them is not trusted: they hold only what another
//! server needs, in a type of their own, and [`Papers::open`] lets nothing pass that a request could not ask for as
//! well. Paths, addresses, processes, lineage and schedules do not travel. The key of the guest's agent does: the
//! guest in the memory has it, and it is replaced before the guest is anybody's.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use hypeman_core::id::is_id;
use hypeman_core::instance::{InstanceState, PhaseClock};
use hypeman_core::{name, tags};
use hypeman_images::{Digest, Platform, Reference};
use hypeman_vmm::{StateIdentity, VmmKind};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::model::{CompressionChoice, SnapshotKind, SnapshotRecord};
use crate::images::{RuntimeConfig, is_carried_name};
use crate::instances::check_size;
use crate::options::Limits;
use crate::{EngineError, InstanceRecord, NetworkRecord};

/// Raised with every change that an older server could not read.
const FORMAT: u32 = 1;
/// The largest papers, bytes. A request for an instance has no more.
pub(super) const MAX_BYTES: usize = 1 << 20;

/// The papers of one snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Papers {
    format: u32,
    pub(super) name: Option<String>,
    pub(super) kind: SnapshotKind,
    pub(super) tags: BTreeMap<String, String>,
    pub(super) created_at: Timestamp,
    source: Source,
    pub(super) memory: Option<Memory>,
}

/// The instance that was captured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Source {
    id: String,
    name: String,
    image: String,
    image_digest: String,
    image_config: RuntimeConfig,
    platform: String,
    memory_bytes: u64,
    hotplug_bytes: u64,
    overlay_bytes: u64,
    vcpus: u32,
    disk_io_bytes_per_second: Option<u64>,
    environment: BTreeMap<String, String>,
    network: Option<Bandwidth>,
    hypervisor: VmmKind,
    entrypoint: Option<Vec<String>>,
    command: Option<Vec<String>>,
    tags: BTreeMap<String, String>,
    skip_kernel_headers: bool,
    skip_guest_agent: bool,
    boot_artifacts: String,
}

/// What of a network connection is not the host's own, bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Bandwidth {
    download: Option<u64>,
    upload: Option<u64>,
}

/// What belongs to captured memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Memory {
    pub(super) compression: CompressionChoice,
    pub(super) agent_key: String,
    pub(super) identity: StateIdentity,
}

impl Papers {
    /// The papers of a snapshot; `image` is the configuration of its image, `identity` that of its device state.
    pub(super) fn of(record: &SnapshotRecord, image: RuntimeConfig, identity: Option<StateIdentity>) -> Self {
        let source = &record.source;
        let memory = record.memory.as_ref().zip(identity);
        Self {
            format: FORMAT,
            name: record.name.clone(),
            kind: record.kind,
            tags: record.tags.clone(),
            created_at: record.created_at,
            source: Source {
                id: source.id.clone(),
                name: source.name.clone(),
                image: source.image.clone(),
                image_digest: source.image_digest.clone(),
                image_config: image,
                platform: source.platform.clone(),
                memory_bytes: source.memory_bytes,
                hotplug_bytes: source.hotplug_bytes,
                overlay_bytes: source.overlay_bytes,
                vcpus: source.vcpus,
                disk_io_bytes_per_second: source.disk_io_bytes_per_second,
                environment: source.environment.clone(),
                network: source.network.as_ref().map(|network| Bandwidth {
                    download: network.bandwidth_download,
                    upload: network.bandwidth_upload,
                }),
                hypervisor: source.hypervisor,
                entrypoint: source.entrypoint.clone(),
                command: source.command.clone(),
                tags: source.tags.clone(),
                skip_kernel_headers: source.skip_kernel_headers,
                skip_guest_agent: source.skip_guest_agent,
                boot_artifacts: source.boot_artifacts.clone(),
            },
            memory: memory.map(|(memory, identity)| Memory {
                compression: memory.compression,
                agent_key: memory.agent_key.clone(),
                identity,
            }),
        }
    }

    /// What to put into the file.
    pub(super) fn seal(&self) -> Result<Vec<u8>, EngineError> {
        serde_json::to_vec(self).map_err(|error| EngineError::io("describe the snapshot", error.into()))
    }

    /// Reads what a file says and refuses what this server would not have made.
    pub(super) fn open(bytes: &[u8], limits: &Limits) -> Result<Self, EngineError> {
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        if bytes.len() > MAX_BYTES {
            return Err(wrong("its description is too long"));
        }
        let unreadable = |_| wrong("its description is not one of a snapshot");
        let version: Version = serde_json::from_slice(bytes).map_err(unreadable)?;
        if version.format != FORMAT {
            return Err(EngineError::Incompatible(format!(
                "the file describes the snapshot in format {}, this server reads format {FORMAT}; import it with the \
                 version of hypeman that exported it",
                version.format
            )));
        }
        let papers: Self = serde_json::from_slice(bytes).map_err(unreadable)?;
        papers.check(limits)?;
        Ok(papers)
    }

    fn check(&self, limits: &Limits) -> Result<(), EngineError> {
        let source = &self.source;
        if let Some(name) = &self.name {
            name::check(name)?;
        }
        name::check(&source.name)?;
        tags::check(&self.tags)?;
        tags::check(&source.tags)?;
        if !is_id(&source.id) {
            return Err(wrong("its source has no id"));
        }
        Reference::parse(&source.image)?;
        if !is_carried_name(&source.image_digest) {
            Digest::parse(&source.image_digest)?;
        }
        let platform = Platform::parse_supported(&source.platform)?;
        if Platform::host().rank(&platform).is_none() {
            return Err(EngineError::Incompatible(format!(
                "it is of an instance for {platform}, and instances here are for {}",
                Platform::host()
            )));
        }
        check_size(
            limits,
            source.vcpus,
            source.memory_bytes,
            source.hotplug_bytes,
            source.overlay_bytes,
        )?;
        let network = source.network.unwrap_or(Bandwidth {
            download: None,
            upload: None,
        });
        if [source.disk_io_bytes_per_second, network.download, network.upload].contains(&Some(0)) {
            return Err(wrong("its source has a rate of nothing"));
        }
        let named = |(key, value): (&String, &String)| {
            !key.is_empty() && !key.contains(['=', '\0']) && !value.contains('\0')
        };
        if !source.environment.iter().all(named) {
            return Err(wrong("its source has variables that no process can have"));
        }
        let image = &source.image_config;
        let words = source.entrypoint.iter().chain(&source.command).flatten();
        let words = words
            .chain(&image.entrypoint)
            .chain(&image.cmd)
            .chain(&image.env)
            .chain([&image.working_dir, &image.user]);
        if words.into_iter().any(|word| word.contains('\0')) {
            return Err(wrong("its source has a command that no process can have"));
        }
        if source.boot_artifacts.len() != 64 || !source.boot_artifacts.bytes().all(is_digit) {
            return Err(wrong("its kernel has no name"));
        }
        if self.memory.is_some() != self.kind.has_memory() {
            return Err(wrong("its kind contradicts what it holds"));
        }
        let Some(memory) = &self.memory else {
            return Ok(());
        };
        if let CompressionChoice::On { algorithm, level } = memory.compression {
            CompressionChoice::new(true, Some(algorithm), Some(level.into()))?;
        }
        let key = memory.agent_key.as_bytes();
        if !(key.is_empty() || key.len() == 64 && key.iter().copied().all(is_digit)) {
            return Err(wrong("its guest has no key"));
        }
        if memory.identity.vmm != source.hypervisor {
            return Err(wrong("its devices are of another hypervisor than its source"));
        }
        Ok(())
    }

    /// What of its image's configuration the guest needs.
    pub(super) fn image_config(&self) -> &RuntimeConfig {
        &self.source.image_config
    }

    /// The instance as another server records it: nothing of a host is left of it.
    pub(super) fn source(&self) -> InstanceRecord {
        let source = self.source.clone();
        InstanceRecord {
            id: source.id,
            name: source.name,
            image: source.image,
            image_digest: source.image_digest,
            platform: source.platform,
            memory_bytes: source.memory_bytes,
            hotplug_bytes: source.hotplug_bytes,
            overlay_bytes: source.overlay_bytes,
            vcpus: source.vcpus,
            disk_io_bytes_per_second: source.disk_io_bytes_per_second,
            environment: source.environment,
            network: source.network.map(|network| NetworkRecord {
                ip: Ipv4Addr::UNSPECIFIED,
                mac: String::new(),
                tap: String::new(),
                bandwidth_download: network.download,
                bandwidth_upload: network.upload,
            }),
            hypervisor: source.hypervisor,
            entrypoint: source.entrypoint,
            command: source.command,
            tags: source.tags,
            skip_kernel_headers: source.skip_kernel_headers,
            skip_guest_agent: source.skip_guest_agent,
            // How memory is kept is each server's own business.
            snapshot_policy: None,
            created_at: self.created_at,
            expires_at: None,
            started_at: None,
            stopped_at: None,
            exit: None,
            phases: PhaseClock::start(InstanceState::Stopped, self.created_at),
            boot_artifacts: source.boot_artifacts,
            run: None,
            standby: None,
            disk_generation: 0,
            origin: None,
        }
    }
}

fn is_digit(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'a'..=b'f')
}

/// A file that is whole and says what cannot be.
pub(super) fn wrong(what: &str) -> EngineError {
    EngineError::invalid(
        "invalid_request",
        format!("this snapshot cannot be imported: {what}"),
    )
}

#[cfg(test)]
mod tests {
    use hypeman_vmm::Accelerator;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn papers() -> Papers {
        Papers {
            format: FORMAT,
            name: Some("baseline".into()),
            kind: SnapshotKind::Standby,
            tags: BTreeMap::from([("team".into(), "backend".into())]),
            created_at: Timestamp::UNIX_EPOCH,
            source: Source {
                id: "qilviffnqzck2jrim1x6s2b1".into(),
                name: "web".into(),
                image: "docker.io/library/nginx:latest".into(),
                image_digest: format!("sha256:{}", "a".repeat(64)),
                image_config: RuntimeConfig {
                    cmd: vec!["nginx".into()],
                    ..RuntimeConfig::default()
                },
                platform: Platform::host().to_string(),
                memory_bytes: 128 << 20,
                hotplug_bytes: 0,
                overlay_bytes: 256 << 20,
                vcpus: 1,
                disk_io_bytes_per_second: None,
                environment: BTreeMap::from([("A".into(), "b".into())]),
                network: Some(Bandwidth {
                    download: Some(1),
                    upload: None,
                }),
                hypervisor: VmmKind::Qemu,
                entrypoint: None,
                command: Some(vec!["true".into()]),
                tags: BTreeMap::new(),
                skip_kernel_headers: false,
                skip_guest_agent: false,
                boot_artifacts: "b".repeat(64),
            },
            memory: Some(Memory {
                compression: CompressionChoice::Off,
                agent_key: "c".repeat(64),
                identity: StateIdentity {
                    vmm: VmmKind::Qemu,
                    version: "7.2.19".into(),
                    machine: "pc-q35-7.2".into(),
                    cpu: "host".into(),
                    accelerator: Accelerator::Kvm,
                },
            }),
        }
    }

    fn open(value: &Value) -> Result<Papers, EngineError> {
        Papers::open(&serde_json::to_vec(value).unwrap(), &Limits::default())
    }

    #[test]
    fn they_are_read_as_they_were_written_and_name_nothing_of_a_host() {
        let read = Papers::open(&papers().seal().unwrap(), &Limits::default()).unwrap();
        assert_eq!(read, papers());
        let network = read.source().network.unwrap();
        assert_eq!((network.ip, network.tap.as_str()), (Ipv4Addr::UNSPECIFIED, ""));
    }

    #[test]
    fn what_no_server_would_have_made_is_refused() {
        let sound = serde_json::to_value(papers()).unwrap();
        open(&sound).unwrap();
        for (place, value) in [
            ("/format", json!(2)),
            ("/name", json!("../up")),
            ("/kind", json!("Stopped")),
            ("/tags", json!({"a\u{0}": "b"})),
            ("/memory", Value::Null),
            ("/memory/agent_key", json!("x".repeat(64))),
            (
                "/memory/compression",
                json!({"On": {"algorithm": "zstd", "level": 200}}),
            ),
            ("/memory/identity/vmm", json!("qemu-microvm")),
            ("/source/id", json!("../../../../etc/passwd00")),
            ("/source/name", json!("Web")),
            ("/source/image", json!("")),
            ("/source/image_digest", json!("sha256:../../x")),
            ("/source/image_digest", json!("rootdisk:../../x")),
            ("/source/image_config/env", json!(["A=\u{0}"])),
            ("/source/image_config/user", json!(7)),
            ("/source/platform", json!("windows/amd64")),
            ("/source/memory_bytes", json!(u64::MAX)),
            ("/source/hotplug_bytes", json!(u64::MAX)),
            ("/source/overlay_bytes", json!(1)),
            ("/source/vcpus", json!(0)),
            ("/source/environment", json!({"A=": "b"})),
            ("/source/command", json!(["a\u{0}"])),
            ("/source/network/download", json!(0)),
            ("/source/hypervisor", json!("bochs")),
            ("/source/boot_artifacts", json!("../".repeat(22))),
        ] {
            let mut changed = sound.clone();
            *changed.pointer_mut(place).unwrap() = value;
            assert!(open(&changed).is_err(), "{place}");
        }
        let mut more = sound;
        more["source"]["run"] = json!({"process": 1});
        assert!(open(&more).is_err(), "what is not known is not carried along");
    }

    proptest! {
        #[test]
        fn any_description_is_answered(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(Papers::open(&bytes, &Limits::default()).is_err());
        }
    }
}
