//! Checks of processor, hypervisors, kernel, network and limits.

use std::net::TcpListener;
use std::path::Path;

use hypeman_kernel::{KernelError, KernelOptions, Kernels, stored_kernels};
use hypeman_network::{Availability, Network};
use hypeman_vmm::{Accelerator, Capabilities, Jail, JailMode, JailOptions, VmmKind, Vmms};
use rustix::process::{Resource, getrlimit};

use super::Check;
use crate::config::{self, Values, options};
use crate::error::CliError;
use crate::guest_program;

/// Each VM takes a few descriptors, each client one.
const ENOUGH_FILES: u64 = 4096;

/// Turns a wrong setting into a check.
fn misconfigured(name: &'static str, failure: &CliError) -> Check {
    Check::fail(
        name,
        failure.to_string(),
        failure
            .hint()
            .unwrap_or_else(|| "mend the configuration".to_owned()),
    )
}

pub(super) fn platform() -> Check {
    let found = format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH);
    if cfg!(target_os = "linux") && matches!(std::env::consts::ARCH, "x86_64" | "aarch64") {
        Check::ok("platform", found)
    } else {
        Check::fail("platform", found, "a server runs on Linux, x86_64 or aarch64")
    }
}

pub(super) fn guest_program(values: &Values) -> Check {
    match guest_program::find(values) {
        Ok(program) => Check::ok(
            "guest program",
            format!("{} ({} bytes)", program.origin, program.bytes.len()),
        ),
        Err(failure) => misconfigured("guest program", &failure),
    }
}

/// QEMU, and whether KVM truly runs a guest.
pub(super) async fn hypervisors(values: &Values, data: &Path) -> Vec<Check> {
    let options = match options::vmm(values, data, None) {
        Ok(options) => options,
        Err(failure) => return vec![misconfigured("qemu", &failure)],
    };
    let vmms = Vmms::detect(options);
    let list = vmms.list().await;
    let mut checks = Vec::new();
    let mut accelerated = None;
    for (kind, capabilities) in &list {
        let name = match kind {
            VmmKind::Qemu => "qemu",
            VmmKind::QemuMicrovm => "qemu microvm",
            VmmKind::CloudHypervisor => "cloud hypervisor",
            VmmKind::Firecracker => "firecracker",
            // Not of this platform: its absence is nothing to mend.
            VmmKind::Vz => continue,
        };
        let needed = matches!(kind, VmmKind::Qemu | VmmKind::QemuMicrovm);
        checks.push(match capabilities {
            Capabilities::Available {
                version, accelerator, ..
            } => {
                if needed {
                    accelerated = accelerated.or(Some(*accelerator));
                }
                Check::ok(name, format!("version {version}"))
            }
            Capabilities::Unavailable { reason } if !needed => Check::ok(name, format!("not used: {reason}")),
            Capabilities::Unavailable { reason } => Check::fail(
                name,
                reason.clone(),
                "install QEMU: on Debian `apt-get install qemu-system-x86`",
            ),
        });
    }
    checks.push(match (accelerated, vmms.reason_against_kvm().await) {
        (Some(Accelerator::Kvm), _) => Check::ok("kvm", "a guest really runs with it"),
        (Some(Accelerator::Tcg), reason) => Check::warn(
            "kvm",
            format!(
                "not used: {}; guests run by translation, some five times slower",
                reason.unwrap_or_else(|| "the configuration chose tcg".to_owned())
            ),
            "use a machine (or a nested one) whose KVM runs guests, and give the server's user access to /dev/kvm",
        ),
        (None, _) => Check::warn("kvm", "cannot be tried without QEMU", "install QEMU first"),
    });
    checks
}

/// Finds and unpacks the guest kernel in a temporary directory, as a server does in its own.
pub(super) async fn kernel(values: &Values, data: &Path) -> Check {
    const FIX: &str = "kernel/fetch gets the distribution's, kernel/build makes one that boots faster; \
                       or name one in kernel.path of the configuration";
    let mut options = match options::kernel(values) {
        Ok(options) => options,
        Err(failure) => return misconfigured("kernel", &failure),
    };
    // The data directory's own kernels come first for a server: here they are found by searching.
    let system = data.join("system");
    options.search.splice(0..0, stored_kernels(&system));
    let program = guest_program::find(values)
        .map(|program| program.bytes)
        .unwrap_or(b"\x7fELF".into());
    let tried = tokio::task::spawn_blocking(move || prepare(options, &program, &system)).await;
    match tried {
        Ok(Ok(found)) => Check::ok("kernel", found),
        Ok(Err(failure)) => Check::fail("kernel", failure, FIX),
        Err(failure) => Check::fail("kernel", failure.to_string(), FIX),
    }
}

fn prepare(options: KernelOptions, program: &[u8], system: &Path) -> Result<String, String> {
    let temporary = tempfile::tempdir().map_err(|failure| format!("no temporary directory: {failure}"))?;
    // Messages name the place where a server would look.
    let told = |failure: KernelError| {
        failure.to_string().replace(
            &temporary.path().display().to_string(),
            &system.display().to_string(),
        )
    };
    let kernels = Kernels::open(temporary.path(), options).map_err(told)?;
    let artifacts = kernels.prepare(program).map_err(told)?;
    let modules = match artifacts.modules.len() {
        0 => "everything built in".to_owned(),
        count => format!("{count} modules in the initramfs"),
    };
    Ok(format!("{}, {modules}", artifacts.kernel_release))
}

pub(super) async fn network(values: &Values) -> Check {
    let options = match options::network(values) {
        Ok(options) => options,
        Err(failure) => return misconfigured("network", &failure),
    };
    match Network::probe(&options).await {
        Availability::Available => Check::ok(
            "network",
            format!("bridge {} for {}", options.bridge_name, options.subnet_cidr),
        ),
        Availability::Unavailable { reason } => Check::warn(
            "network",
            reason,
            "mend it, or run instances with --network=false; everything else works without",
        ),
    }
}

pub(super) fn privileges() -> Check {
    let user = rustix::process::geteuid();
    let net_admin = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::NET_ADMIN));
    match (user.is_root(), net_admin) {
        (true, true) => Check::ok("privileges", "root"),
        (false, true) => Check::ok("privileges", format!("user {} with CAP_NET_ADMIN", user.as_raw())),
        (_, false) => Check::warn(
            "privileges",
            format!("user {} without CAP_NET_ADMIN", user.as_raw()),
            "networking wants root, or AmbientCapabilities=CAP_NET_ADMIN in the server's unit",
        ),
    }
}

/// Builds a jail and executes nothing in it.
pub(super) async fn jail(values: &Values, data: &Path) -> Check {
    let options = match options::vmm(values, data, None) {
        Ok(options) => options.jail,
        Err(failure) => return misconfigured("jail", &failure),
    };
    if options.mode == JailMode::Off {
        let fix = "remove hypervisor.jail from the configuration";
        return Check::warn(
            "jail",
            "hypervisor.jail is off: VMMs run as the server's user",
            fix,
        );
    }
    let required = options.mode == JailMode::Required;
    let work = move || {
        let state = tempfile::tempdir()?;
        let options = JailOptions {
            state: state.path().to_owned(),
            ..options
        };
        Ok::<_, std::io::Error>(Jail::new(options).report())
    };
    let tried = tokio::task::spawn_blocking(work).await;
    let report = match tried.map_err(std::io::Error::from).flatten() {
        Ok(report) => report,
        Err(failure) => return Check::fail("jail", failure.to_string(), "look at the server's log"),
    };
    let active: Vec<&str> = report.active.iter().map(|item| item.name()).collect();
    if report.is_complete() {
        return Check::ok("jail", active.join(", "));
    }
    let found = match active.is_empty() {
        true => format!("VMMs are not confined ({})", report.missing_text()),
        false => format!("{}; not {}", active.join(", "), report.missing_text()),
    };
    let fix = "run the server as root on Linux 5.14 or newer, with control groups of version 2";
    match required {
        true => Check::fail(
            "jail",
            format!("{found}; hypervisor.jail requires all of it"),
            fix,
        ),
        false => Check::warn("jail", found, fix),
    }
}

pub(super) fn cgroups() -> Check {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Check::ok("cgroups", "version 2");
    }
    let found = if Path::new("/sys/fs/cgroup/memory").exists() {
        "version 1"
    } else {
        "not mounted"
    };
    Check::warn(
        "cgroups",
        found,
        "machines are not limited as a group; boot with systemd.unified_cgroup_hierarchy=1",
    )
}

pub(super) fn open_files() -> Check {
    let limit = getrlimit(Resource::Nofile);
    match limit.current {
        Some(current) if current < ENOUGH_FILES => Check::warn(
            "open files",
            format!("at most {current}"),
            format!("`ulimit -n {ENOUGH_FILES}` before the server starts, or LimitNOFILE= in its unit"),
        ),
        Some(current) => Check::ok("open files", format!("at most {current}")),
        None => Check::ok("open files", "no limit"),
    }
}

pub(super) fn port(values: &Values) -> Check {
    let address = match options::listen_address(values) {
        Ok(address) => address,
        Err(failure) => return misconfigured("port", &failure),
    };
    match TcpListener::bind(address) {
        Ok(_) => Check::ok("port", format!("{address} is free")),
        Err(taken) if taken.kind() == std::io::ErrorKind::AddrInUse => Check::warn(
            "port",
            format!("{address} is in use"),
            "fine when it is the server itself (`hypeman health`); otherwise `hypeman serve --port N`",
        ),
        Err(failure) => Check::fail(
            "port",
            format!("{address}: {failure}"),
            "choose another listen_address or port",
        ),
    }
}

pub(super) fn secret(values: &Values) -> Check {
    match config::find_secret(values) {
        Ok(Some(_)) => Check::ok("secret", "there is one to sign tokens with"),
        Ok(None) => Check::ok("secret", "none yet; the server makes one at its first start"),
        Err(CliError::Io { context, source }) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            Check::warn(
                "secret",
                format!("{context}: {source}"),
                "run this as the user that runs the server",
            )
        }
        Err(failure) => misconfigured("secret", &failure),
    }
}
