//! Machines for the tests: a small guest, the kernels at hand, and everything ends with the test.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests"
)]

pub mod captured;
pub mod stories;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use hypeman_kernel::{BootArtifacts, KernelOptions, Kernels};
use hypeman_vmm::{
    Accelerator, AgentChannel, Disk, Machine, MachineSpec, MemoryBacking, Vmm, VmmKind, VmmOptions, Vmms,
};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// Long enough for any machine, however busy.
pub const PATIENCE: Duration = Duration::from_secs(400);
/// A guest that is up answers within this, however slow it is.
const SILENCE: Duration = Duration::from_secs(10);
pub const BOARDS: [VmmKind; 2] = [VmmKind::Qemu, VmmKind::QemuMicrovm];

pub struct Lab {
    pub directory: tempfile::TempDir,
    pub vmms: Vmms,
    boot: BootArtifacts,
}

impl Lab {
    /// `None`, with the reason printed, where this host lacks something.
    pub fn new() -> Option<Self> {
        let kernel = kernels().into_iter().next();
        if kernel.is_none() {
            println!(
                "SKIPPED: no guest kernel: set HYPEMAN_TEST_KERNEL to what kernel/fetch or kernel/build made"
            );
        }
        Self::with_kernel(&kernel?)
    }

    pub fn with_kernel(kernel: &Path) -> Option<Self> {
        if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
            println!("SKIPPED: QEMU is not installed");
            return None;
        }
        let guest = guest()?;
        let directory = tempfile::Builder::new().prefix("hv").tempdir().unwrap();
        let options = KernelOptions {
            kernel: Some(kernel.to_owned()),
            search: Vec::new(),
        };
        let boot = Kernels::open(&directory.path().join("system"), options)
            .unwrap()
            .prepare(guest)
            .unwrap();
        let vmms = Vmms::detect(VmmOptions {
            qemu_binary: std::env::var_os("HYPEMAN_TEST_QEMU").map(PathBuf::from),
            accelerator: Some(Accelerator::Tcg),
            ..VmmOptions::default()
        });
        Some(Self {
            directory,
            vmms,
            boot,
        })
    }

    /// A lab for Cloud Hypervisor. `None`, with the reason printed, where this host lacks something.
    pub fn cloud_hypervisor() -> Option<Self> {
        let Some(binary) = named_or_in_path("HYPEMAN_TEST_CLOUD_HYPERVISOR", "cloud-hypervisor") else {
            println!(
                "SKIPPED: there is no Cloud Hypervisor: set HYPEMAN_TEST_CLOUD_HYPERVISOR to its binary"
            );
            return None;
        };
        let options = VmmOptions {
            cloud_hypervisor_binary: Some(binary),
            trust_kvm: true,
            ..VmmOptions::default()
        };
        Self::on_kvm(options)
    }

    /// A lab for Firecracker. `None`, with the reason printed, where this host lacks something.
    pub fn firecracker() -> Option<Self> {
        let Some(binary) = named_or_in_path("HYPEMAN_TEST_FIRECRACKER", "firecracker") else {
            println!("SKIPPED: there is no Firecracker: set HYPEMAN_TEST_FIRECRACKER to its binary");
            return None;
        };
        let options = VmmOptions {
            firecracker_binary: Some(binary),
            trust_kvm: true,
            ..VmmOptions::default()
        };
        Self::on_kvm(options)
    }

    /// A lab whose guests run on this host's KVM, with the kernel that was made for it.
    fn on_kvm(options: VmmOptions) -> Option<Self> {
        let Some(kernel) = std::env::var_os("HYPEMAN_TEST_KVM_KERNEL").map(PathBuf::from) else {
            println!(
                "SKIPPED: no kernel for this host's KVM: set HYPEMAN_TEST_KVM_KERNEL to one that it can run"
            );
            return None;
        };
        if let Err(error) = std::fs::File::open("/dev/kvm") {
            println!("SKIPPED: /dev/kvm cannot be opened: {error}");
            return None;
        }
        let guest = guest()?;
        let directory = tempfile::Builder::new().prefix("hv").tempdir().unwrap();
        let kernels = KernelOptions {
            kernel: Some(kernel),
            search: Vec::new(),
        };
        let boot = Kernels::open(&directory.path().join("system"), kernels)
            .unwrap()
            .prepare(guest)
            .unwrap();
        Some(Self {
            directory,
            vmms: Vmms::detect(options),
            boot,
        })
    }

    /// As [`Lab::spec`], for a guest whose agent is reached by vsock.
    pub fn vsock_spec(&self, id: &str) -> MachineSpec {
        let mut spec = self.spec(id);
        spec.kernel_arguments = vec!["hypeman.test.vsock".to_owned()];
        spec
    }

    pub fn release(&self) -> &str {
        &self.boot.kernel_release
    }

    pub fn driver(&self, kind: VmmKind) -> Arc<dyn Vmm> {
        self.vmms.get(kind).unwrap()
    }

    /// A machine of 128 MiB that has nothing but its channels.
    pub fn spec(&self, id: &str) -> MachineSpec {
        let runtime_directory = self.directory.path().join(id);
        std::fs::create_dir_all(&runtime_directory).unwrap();
        MachineSpec {
            id: id.to_owned(),
            cpus: 1,
            memory_bytes: 256 << 20,
            memory: MemoryBacking::Anonymous,
            hotplug_bytes: 0,
            kernel: self.boot.kernel.clone(),
            initramfs: self.boot.initramfs.clone(),
            kernel_arguments: Vec::new(),
            disks: Vec::new(),
            host_devices: Vec::new(),
            nic: None,
            workload_log: runtime_directory.join("app.log"),
            vmm_log: runtime_directory.join("vmm.log"),
            runtime_directory,
        }
    }

    pub fn disk(&self, name: &str, mebibytes: u64) -> Disk {
        let path = self.directory.path().join(name);
        std::fs::File::create(&path)
            .unwrap()
            .set_len(mebibytes << 20)
            .unwrap();
        Disk {
            path,
            read_only: false,
            limit: None,
        }
    }

    pub async fn launch(&self, kind: VmmKind, spec: &MachineSpec) -> Running {
        Running::of(self.driver(kind).launch(spec).await.unwrap())
    }
}

/// A machine that does not outlive its test.
pub struct Running(Option<Box<dyn Machine>>);

impl Running {
    pub fn of(machine: Box<dyn Machine>) -> Self {
        Self(Some(machine))
    }

    /// Drops the handle and lets the process live.
    pub fn abandon(mut self) {
        self.0 = None;
    }
}

impl std::ops::Deref for Running {
    type Target = dyn Machine;

    fn deref(&self) -> &Self::Target {
        self.0.as_deref().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(machine) = &self.0 else { return };
        let identity = machine.process();
        if identity.is_alive() {
            let _ = Command::new("kill")
                .args(["-9", &identity.pid.to_string()])
                .status();
        }
    }
}

/// The agent's port, as the tests' guest speaks on it.
pub struct Agent(BufReader<UnixStream>);

impl Agent {
    pub async fn connect(machine: &dyn Machine) -> Self {
        match machine.agent_channel() {
            AgentChannel::SerialSocket(path) => {
                Self(BufReader::new(UnixStream::connect(path).await.unwrap()))
            }
            AgentChannel::VsockSocket { path, port } => {
                let reached = async {
                    loop {
                        // Made just before a restored guest lets go of all connections, it is silent for ever.
                        let attempt = tokio::time::timeout(SILENCE, Self::reach(&path, port)).await;
                        if let Ok(Some(agent)) = attempt {
                            break agent;
                        }
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                };
                tokio::time::timeout(PATIENCE, reached).await.unwrap()
            }
        }
    }

    /// `None` while nobody in the guest listens and answers.
    async fn reach(path: &Path, port: u32) -> Option<Self> {
        let mut agent = Self(BufReader::new(UnixStream::connect(path).await.ok()?));
        agent
            .0
            .get_mut()
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .await
            .ok()?;
        let mut line = String::new();
        agent.0.read_line(&mut line).await.ok()?;
        if !line.starts_with("OK ") {
            return None;
        }
        agent.0.get_mut().write_all(b"ping\n").await.ok()?;
        line.clear();
        agent.0.read_line(&mut line).await.ok()?;
        (line == "pong\n").then_some(agent)
    }

    /// Sends an order and does not wait for what becomes of it.
    pub async fn order(&mut self, order: &str) {
        self.0
            .get_mut()
            .write_all(format!("{order}\n").as_bytes())
            .await
            .unwrap();
    }

    pub async fn ask(&mut self, order: &str) -> String {
        self.order(order).await;
        self.answer().await
    }

    pub async fn answer(&mut self) -> String {
        let mut line = String::new();
        tokio::time::timeout(PATIENCE, self.0.read_line(&mut line))
            .await
            .unwrap()
            .unwrap();
        line.trim_end().to_owned()
    }
}

/// Whether every thread of a process was stopped by a signal.
pub fn is_stopped(pid: &str) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("stat")).ok())
        .all(|stat| stat.contains(") T "))
}

pub async fn ended(machine: &dyn Machine) {
    tokio::time::timeout(PATIENCE, machine.exited())
        .await
        .expect("the machine should have ended");
}

/// Sends a signal to a VMM behind the back of its driver.
pub fn signal(machine: &Running, signal: &str) {
    let pid = machine.process().pid.to_string();
    let status = Command::new("kill").args([signal, &pid]).status();
    assert!(status.unwrap().success());
}

/// Of a machine that is gone only its logs stay.
pub fn assert_nothing_is_left(lab: &Lab, kind: VmmKind, spec: &MachineSpec) {
    let left: Vec<_> = std::fs::read_dir(&spec.runtime_directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.contains(".log") && !name.starts_with("vsock.sock_"))
        .collect();
    assert_eq!(left, [""; 0]);
    let orphans = lab.driver(kind).find_orphans(&spec.runtime_directory).unwrap();
    assert!(orphans.is_empty());
}

/// A file system of a few mebibytes that goes away with the test.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    pub fn mount(path: PathBuf) -> Option<Self> {
        std::fs::create_dir_all(&path).unwrap();
        let mounted = mount(&["-t", "tmpfs", "-o", "size=4m", "none"], &path);
        if !mounted {
            println!("SKIPPED: mounting a small file system needs root");
        }
        mounted.then_some(Self(path))
    }

    pub fn grow(&self) {
        assert!(mount(&["-o", "remount,size=64m"], &self.0));
    }

    pub fn shrink(&self) {
        assert!(mount(&["-o", "remount,size=4m"], &self.0));
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

fn mount(arguments: &[&str], path: &Path) -> bool {
    let output = Command::new("mount").args(arguments).arg(path).output();
    output.is_ok_and(|output| output.status.success())
}

/// Kernels at hand, the quickest first: `HYPEMAN_TEST_KERNEL` names them as `PATH` names directories.
pub fn kernels() -> Vec<PathBuf> {
    let named = std::env::var_os("HYPEMAN_TEST_KERNEL").unwrap_or_default();
    std::env::split_paths(&named)
        .filter(|path| path.is_file() || path.join("vmlinux").is_file() || path.join("boot").is_dir())
        .collect()
}

/// A program that a variable names, or the first of its name in `$PATH`.
fn named_or_in_path(variable: &str, program: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = || std::env::split_paths(&path).map(|directory| directory.join(program));
    named.or_else(|| found().find(|path| path.is_file()))
}

/// The guest program, built once.
fn guest() -> Option<&'static [u8]> {
    static GUEST: OnceLock<Option<Vec<u8>>> = OnceLock::new();
    GUEST.get_or_init(build_guest).as_deref()
}

fn build_guest() -> Option<Vec<u8>> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/init.rs");
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("init");
    let built = Command::new(std::env::var_os("RUSTC").unwrap_or("rustc".into()))
        .args([
            "--edition=2024",
            "--target=x86_64-unknown-linux-musl",
            "-Copt-level=s",
            "-Cpanic=abort",
        ])
        .args(["-Cstrip=symbols", "-Ctarget-feature=+crt-static", "-o"])
        .arg(&program)
        .arg(source)
        .output()
        .unwrap();
    if !built.status.success() {
        println!(
            "SKIPPED: the guest cannot be built: {}",
            String::from_utf8_lossy(&built.stderr)
        );
        return None;
    }
    Some(std::fs::read(program).unwrap())
}
