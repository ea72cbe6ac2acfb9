//! From values to what the engine, the network and the VMMs are told.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use hypeman_api::instance::Hypervisor;
use hypeman_core::snapshot::{Algorithm, CompressionChoice};
use hypeman_engine::{EngineOptions, Limits, LogOptions, PagingMode, PagingOptions, SnapshotOptions};
use hypeman_kernel::KernelOptions;
use hypeman_network::NetworkOptions;
use hypeman_vmm::{Accelerator, JailOptions, VmmKind, VmmOptions};

use super::{Values, data_directory};
use crate::error::CliError;
use crate::guest_program::GuestProgram;

/// Where the API listens.
///
/// # Errors
/// When address or port make no sense.
pub(crate) fn listen_address(values: &Values) -> Result<SocketAddr, CliError> {
    let address: IpAddr = values.parsed(
        "listen_address",
        "write an IP address, such as 127.0.0.1 or 0.0.0.0",
    )?;
    let port: u16 = values.parsed("port", "write a number from 0 to 65535; 0 takes a free port")?;
    Ok(SocketAddr::new(address, port))
}

/// Everything that the engine is told.
///
/// # Errors
/// When a value makes no sense; it is named with the place that it came from.
pub(crate) fn engine(values: &Values, guest: GuestProgram) -> Result<EngineOptions, CliError> {
    let data_directory = data_directory(values)?;
    let whole = "write a whole number";
    let share: f64 = values.parsed("limits.max_image_storage", "write a share from 0 to 1")?;
    if !(0.0..=1.0).contains(&share) {
        return Err(CliError::usage("limits.max_image_storage must be from 0 to 1"));
    }
    Ok(EngineOptions {
        guest_program: guest.bytes,
        default_hypervisor: default_hypervisor(values)?,
        limits: Limits {
            max_vcpus_per_instance: values.parsed("limits.max_vcpus_per_instance", whole)?,
            max_memory_per_instance: values.size("limits.max_memory_per_instance")?,
            max_overlay_size: values.size("limits.max_overlay_size")?,
            max_concurrent_builds: values.parsed("limits.max_concurrent_builds", whole)?,
            max_image_storage: share,
            min_free_disk: values.size("limits.min_free_disk")?,
        },
        vmm: vmm(values, &data_directory, Some(data_directory.join("system")))?,
        kernel: kernel(values)?,
        network: network(values)?,
        images: super::images::options(values)?,
        logs: LogOptions {
            max_size: values.size("logging.max_size")?,
            max_files: values.parsed("logging.max_files", whole)?,
            rotate_interval: values.duration("logging.rotate_interval")?,
        },
        snapshots: SnapshotOptions {
            compression_default: compression_default(values)?,
        },
        paging: paging(values)?,
        data_directory,
    })
}

/// How restored memory is served.
fn paging(values: &Values) -> Result<PagingOptions, CliError> {
    let mode = match values.text("hypervisor.firecracker.pager").as_deref() {
        None | Some("auto") => PagingMode::Auto,
        Some("off") => PagingMode::Off,
        Some("always") => PagingMode::Always,
        Some(other) => {
            return Err(CliError::usage(format!(
                "hypervisor.firecracker.pager cannot be {other:?}: choose auto, off or always"
            )));
        }
    };
    let after = values
        .text("hypervisor.firecracker.graduate_after")
        .unwrap_or_default();
    let after = hypeman_core::duration::parse_non_negative(&after)
        .map_err(|failure| CliError::usage(format!("hypervisor.firecracker.graduate_after: {failure}")))?;
    Ok(PagingOptions {
        mode,
        served_from: values.size("hypervisor.firecracker.pager_threshold")?,
        // An upgrade may have replaced the file since this process began; this name leads to the one that runs.
        program: Some("/proc/self/exe".into()),
        release: env!("CARGO_PKG_VERSION").to_owned(),
        cache_bytes: values.size("hypervisor.firecracker.pager_cache")?,
        graduate_after: (!after.is_zero()).then_some(after),
    })
}

/// What becomes of memory when nobody says anything.
fn compression_default(values: &Values) -> Result<CompressionChoice, CliError> {
    let enabled = values.parsed("snapshot.compression_default.enabled", "write true or false")?;
    let algorithm: Algorithm =
        values.parsed("snapshot.compression_default.algorithm", "choose zstd or lz4")?;
    let levels = "write a whole number: zstd 1 to 19, lz4 0 to 9";
    let level: Option<i64> = values.optional("snapshot.compression_default.level", levels)?;
    CompressionChoice::new(enabled, Some(algorithm), level).map_err(|failure| {
        CliError::usage_with(format!("snapshot.compression_default.level: {failure}"), levels)
    })
}

fn default_hypervisor(values: &Values) -> Result<VmmKind, CliError> {
    let expected = "choose cloud-hypervisor, firecracker, qemu, qemu-microvm or vz";
    Ok(match values.parsed("hypervisor.default", expected)? {
        Hypervisor::CloudHypervisor => VmmKind::CloudHypervisor,
        Hypervisor::Firecracker => VmmKind::Firecracker,
        Hypervisor::Qemu => VmmKind::Qemu,
        Hypervisor::QemuMicrovm => VmmKind::QemuMicrovm,
        Hypervisor::Vz => VmmKind::Vz,
    })
}

/// Where VMMs are.
///
/// # Errors
/// When the acceleration is none that exists.
pub(crate) fn vmm(
    values: &Values,
    data_directory: &Path,
    cache_directory: Option<PathBuf>,
) -> Result<VmmOptions, CliError> {
    let accelerator = match values.text("hypervisor.acceleration").as_deref() {
        None | Some("auto") => None,
        Some("kvm") => Some(Accelerator::Kvm),
        Some("tcg") => Some(Accelerator::Tcg),
        Some(other) => {
            return Err(CliError::usage(format!(
                "hypervisor.acceleration cannot be {other:?}: choose auto, kvm or tcg"
            )));
        }
    };
    Ok(VmmOptions {
        qemu_binary: values.path("hypervisor.qemu_binary_path"),
        cloud_hypervisor_binary: values.path("hypervisor.cloud_hypervisor_binary_path"),
        firecracker_binary: values.path("hypervisor.firecracker_binary_path"),
        versions_directory: Some(data_directory.join("system/vmm")),
        trust_kvm: values.parsed("hypervisor.trust_kvm", "choose true or false")?,
        accelerator,
        search_path: Vec::new(),
        cache_directory,
        jail: jail(values)?,
    })
}

/// How VMMs are confined.
fn jail(values: &Values) -> Result<JailOptions, CliError> {
    let whole = "write a whole number";
    let mut options = JailOptions {
        mode: values.parsed("hypervisor.jail", "choose auto, off or required")?,
        memory_overhead: values.size("hypervisor.jail_memory_overhead")?,
        processes: values.parsed("hypervisor.jail_processes", whole)?,
        descriptors: values.parsed("hypervisor.jail_descriptors", whole)?,
        ..JailOptions::default()
    };
    let ids = values.text("hypervisor.jail_ids").unwrap_or_default();
    options
        .set_ids(&ids)
        .map_err(|failure| CliError::usage(format!("hypervisor.jail_ids: {failure}")))?;
    Ok(options)
}

/// Where the guest kernel comes from.
///
/// # Errors
/// When modules are named that the kernel's place does not lead to.
pub(crate) fn kernel(values: &Values) -> Result<KernelOptions, CliError> {
    let (kernel, modules) = (values.path("kernel.path"), values.path("kernel.modules"));
    if let Some(modules) = modules
        && !modules.is_dir()
    {
        return Err(CliError::usage_with(
            format!("kernel.modules: {} is no directory", modules.display()),
            "leave it out: modules are found beside the kernel, in lib/modules",
        ));
    }
    Ok(KernelOptions {
        kernel,
        search: fetched_kernel().into_iter().collect(),
    })
}

/// Where `kernel/fetch` and `kernel/build` put their kernels unless told otherwise.
fn fetched_kernel() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))?;
    Some(cache.join("hypeman/kernel"))
}

/// The network of the guests.
///
/// # Errors
/// When an address makes no sense.
pub(crate) fn network(values: &Values) -> Result<NetworkOptions, CliError> {
    let bridge = values.text("network.bridge_name").unwrap_or_default();
    let options = NetworkOptions {
        subnet_cidr: values.parsed("network.subnet_cidr", "write a network, such as 10.100.0.0/16")?,
        gateway: values.optional("network.subnet_gateway", "write an address of the subnet")?,
        uplink: values.text("network.uplink_interface"),
        dns: values.list("network.dns_server", "write addresses, separated by commas")?,
        ..NetworkOptions::for_bridge(&bridge)
    };
    options
        .validate()
        .map_err(|failure| CliError::usage(format!("network: {failure}")))?;
    Ok(options)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn default_of(yaml: &str) -> Result<CompressionChoice, CliError> {
        let mut values = Values::default();
        values.add_yaml(yaml, Path::new("config.yaml"))?;
        compression_default(&values)
    }

    #[test]
    fn memory_is_compressed_only_when_somebody_says_so() {
        assert_eq!(default_of("").unwrap(), CompressionChoice::Off);
        let on = |rest: &str| {
            default_of(&format!(
                "snapshot: {{compression_default: {{enabled: true{rest}}}}}"
            ))
        };
        let with = |algorithm, level| CompressionChoice::On { algorithm, level };
        assert_eq!(on("").unwrap(), with(Algorithm::Zstd, 1));
        assert_eq!(on(", algorithm: lz4").unwrap(), with(Algorithm::Lz4, 0));
        assert_eq!(
            on(", algorithm: zstd, level: 19").unwrap(),
            with(Algorithm::Zstd, 19)
        );
        for wrong in [
            ", algorithm: gzip",
            ", level: 20",
            ", algorithm: lz4, level: 10",
            ", level: high",
        ] {
            assert!(on(wrong).is_err(), "{wrong}");
        }
    }
}
