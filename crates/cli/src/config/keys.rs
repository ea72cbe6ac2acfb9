//! The table of all keys.

/// One key of the configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    /// Dotted name.
    pub name: &'static str,
    /// Default, as it would be written; empty when there is none.
    pub default: &'static str,
    /// What it is.
    pub help: &'static str,
}

const fn key(name: &'static str, default: &'static str, help: &'static str) -> Key {
    Key { name, default, help }
}

/// All keys, by family.
pub const KEYS: &[Key] = &[
    key("port", "8080", "TCP port of the API"),
    key(
        "listen_address",
        "127.0.0.1",
        "address that the API listens on; 0.0.0.0 for all",
    ),
    key(
        "data_dir",
        "",
        "where everything lives; /var/lib/hypeman for root, else $XDG_DATA_HOME/hypeman",
    ),
    key(
        "jwt_secret",
        "",
        "secret that signs tokens; made in the data directory when absent",
    ),
    key(
        "guest_binary",
        "",
        "the static guest program, when the build has none in it",
    ),
    key(
        "docker_config",
        "",
        "Docker's credential file; ~/.docker/config.json when absent",
    ),
    key("network.bridge_name", "vmbr0", "name of the bridge"),
    key(
        "network.subnet_cidr",
        "10.100.0.0/16",
        "addresses of the VMs and the gateway",
    ),
    key(
        "network.subnet_gateway",
        "",
        "the host's address on the bridge; the first of the subnet when absent",
    ),
    key(
        "network.uplink_interface",
        "",
        "the way out of the host; found when absent",
    ),
    key(
        "network.dns_server",
        "1.1.1.1",
        "name servers of the guests, separated by commas",
    ),
    key(
        "limits.max_vcpus_per_instance",
        "16",
        "most virtual CPUs of an instance",
    ),
    key(
        "limits.max_memory_per_instance",
        "32GB",
        "most memory of an instance, hotplug included",
    ),
    key("limits.max_overlay_size", "100GB", "largest writable layer"),
    key("limits.max_concurrent_builds", "1", "image conversions at once"),
    key(
        "limits.max_image_storage",
        "0.2",
        "share of the data disk that images may take",
    ),
    key(
        "limits.min_free_disk",
        "5GB",
        "what pulls, pushes and conversions leave free",
    ),
    key(
        "hypervisor.default",
        "qemu",
        "hypervisor of instances that name none",
    ),
    key(
        "hypervisor.qemu_binary_path",
        "",
        "QEMU; found in $PATH when absent",
    ),
    key(
        "hypervisor.cloud_hypervisor_binary_path",
        "",
        "Cloud Hypervisor; found in $PATH or data_dir/system/vmm/cloud-hypervisor/VERSION when absent",
    ),
    key(
        "hypervisor.firecracker_binary_path",
        "",
        "Firecracker; found in $PATH or data_dir/system/vmm/firecracker/VERSION when absent",
    ),
    key(
        "hypervisor.firecracker.pager",
        "auto",
        "restored memory of Firecracker is served page by page: auto (where it is compressed and large), off or always",
    ),
    key(
        "hypervisor.firecracker.pager_threshold",
        "1GB",
        "compressed memory with less content is expanded before the restore instead",
    ),
    key(
        "hypervisor.firecracker.pager_cache",
        "4GB",
        "memory images that the pager keeps in RAM",
    ),
    key(
        "hypervisor.firecracker.graduate_after",
        "10m",
        "how long a machine is served before all of its memory is filled; 0: until it ends",
    ),
    key(
        "hypervisor.acceleration",
        "auto",
        "what runs the guests of QEMU: auto (KVM when it truly works), kvm or tcg",
    ),
    key(
        "hypervisor.trust_kvm",
        "false",
        "take KVM for good without trying it: for hosts whose KVM runs only kernels made for it",
    ),
    key(
        "hypervisor.jail",
        "auto",
        "auto (VMMs are confined as far as the host allows), off or required",
    ),
    key(
        "hypervisor.jail_ids",
        "200000-265535",
        "user ids of confined VMMs, one each; the first is their group",
    ),
    key(
        "hypervisor.jail_memory_overhead",
        "2GB",
        "memory of a confined VMM beyond its guest's",
    ),
    key(
        "hypervisor.jail_processes",
        "1024",
        "processes and threads of a confined VMM",
    ),
    key(
        "hypervisor.jail_descriptors",
        "4096",
        "open descriptors of a confined VMM",
    ),
    key("kernel.path", "", "guest kernel; found when absent"),
    key("kernel.modules", "", "directory with that kernel's modules"),
    key("images.compress", "false", "root disks are compressed with lz4"),
    key(
        "images.insecure_registries",
        "",
        "registries spoken to without TLS, host[:port], separated by commas",
    ),
    key(
        "images.trusted_realms",
        "",
        "token services that get a registry's credentials though named otherwise: REGISTRY=HOST, separated by commas",
    ),
    key(
        "images.ca_file",
        "",
        "certificate authorities of registries besides the system's, PEM",
    ),
    key(
        "images.proxy",
        "",
        "proxy for registries over TLS, http://host:port; $HTTPS_PROXY is not looked at",
    ),
    key(
        "snapshot.compression_default.enabled",
        "false",
        "memory of snapshots is compressed when neither request nor instance says otherwise",
    ),
    key("snapshot.compression_default.algorithm", "zstd", "zstd or lz4"),
    key(
        "snapshot.compression_default.level",
        "",
        "zstd 1 to 19, lz4 0 to 9; the fastest when absent",
    ),
    key("logging.level", "info", "error, warn, info, debug or trace"),
    key(
        "logging.levels",
        "",
        "levels of single subsystems, for example engine: debug",
    ),
    key(
        "logging.max_size",
        "50MB",
        "a log of an instance larger than this is rotated",
    ),
    key("logging.max_files", "1", "rotated logs that are kept"),
    key(
        "logging.rotate_interval",
        "5m",
        "how often sizes are looked at; those of running machines every 2 s besides",
    ),
];

/// The family of keys whose last part is free: `logging.levels.<subsystem>`.
pub(super) const LEVELS: &str = "logging.levels.";

/// Whether a key exists.
pub(super) fn known(name: &str) -> bool {
    KEYS.iter().any(|key| key.name == name)
        || name.strip_prefix(LEVELS).is_some_and(|subsystem| {
            !subsystem.is_empty()
                && subsystem
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        })
}

/// The key that is meant by a wrong one, when one is near enough.
pub fn nearest(wrong: &str) -> Option<&'static str> {
    let last = |name: &str| name.rsplit('.').next().unwrap_or_default().to_owned();
    let (distance, name) = KEYS
        .iter()
        .map(|key| {
            // The right name in the wrong family counts as near, too, and so does the beginning of a name.
            let whole = distance(wrong, key.name);
            let begun = wrong.len() >= 4 && key.name.starts_with(wrong);
            let end = if begun || last(wrong) == last(key.name) {
                1
            } else {
                usize::MAX
            };
            (whole.min(end), key.name)
        })
        .min()?;
    (distance <= 1 + wrong.len() / 4).then_some(name)
}

/// Edits (insert, remove, replace) between two words.
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (line, character) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = line + 1;
        for (column, candidate) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(character != *candidate);
            diagonal = row[column + 1];
            row[column + 1] = replaced.min(diagonal + 1).min(row[column] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_finds_its_key() {
        let cases = [
            ("prot", Some("port")),
            ("data-dir", Some("data_dir")),
            ("network.bridge", Some("network.bridge_name")),
            ("max_overlay_size", Some("limits.max_overlay_size")),
            ("limit.max_overlay_size", Some("limits.max_overlay_size")),
            ("completely.different.thing", None),
        ];
        for (wrong, expected) in cases {
            assert_eq!(nearest(wrong), expected, "{wrong}");
        }
    }

    #[test]
    fn names_are_unique_and_plain() {
        for (position, key) in KEYS.iter().enumerate() {
            assert!(
                key.name
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || matches!(byte, b'_' | b'.'))
            );
            assert!(
                KEYS[position + 1..].iter().all(|other| other.name != key.name),
                "{}",
                key.name
            );
        }
    }
}
