//! Machines of the real driver, so that they can be captured and restored.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use hypeman_guest_api::{
    AgentKey,
    host::{GuestClient, GuestEvents},
};
use hypeman_kernel::{BootArtifacts, KernelOptions, Kernels};
use hypeman_vmm::{
    Accelerator, AgentChannel, Disk, DiskCopy, Machine, MachineSpec, MemoryBacking, Nic, Restore,
    StateIdentity, Vmm, VmmKind, VmmOptions, Vmms,
};
use tokio::net::UnixStream;

use super::PATIENCE;

/// A TAP device with an address of the host, which is a guest's gateway.
pub struct Tap {
    pub name: String,
    /// First three numbers of its network; the gateway is `.1`.
    pub network: [u8; 3],
}

impl Tap {
    /// `None` without the right to make one.
    pub fn new(number: u8) -> Option<Self> {
        let id = std::process::id();
        let tap = Self {
            name: format!("hvt{id}-{number}"),
            network: [10, 200 + (id / 64 % 50) as u8, (id % 64) as u8 * 4 + number],
        };
        let [a, b, c] = tap.network;
        let made = ip(&["tuntap", "add", "dev", &tap.name, "mode", "tap"])
            && ip(&["addr", "add", &format!("{a}.{b}.{c}.1/24"), "dev", &tap.name])
            && ip(&["link", "set", &tap.name, "up"]);
        if !made {
            println!("SKIPPED: TAP devices need root");
        }
        made.then_some(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        ip(&["link", "del", &self.name]);
    }
}

fn ip(arguments: &[&str]) -> bool {
    let output = Command::new("ip").args(arguments).output();
    output.is_ok_and(|output| output.status.success())
}

/// A captured machine, in files.
pub struct Snapshot {
    pub identity: StateIdentity,
    pub device_state: Vec<u8>,
    pub memory: PathBuf,
    pub layer: PathBuf,
}

pub struct Machines {
    pub directory: tempfile::TempDir,
    driver: Arc<dyn Vmm>,
    boot: BootArtifacts,
}

impl Machines {
    pub fn new(kind: VmmKind) -> Self {
        let directory = tempfile::Builder::new().prefix("hg").tempdir().unwrap();
        super::image(directory.path());
        let kernel = KernelOptions {
            kernel: super::kernel(),
            search: Vec::new(),
        };
        let guest = std::fs::read(super::guest().unwrap()).unwrap();
        let boot = Kernels::open(&directory.path().join("system"), kernel)
            .unwrap()
            .prepare(&guest)
            .unwrap();
        let options = VmmOptions {
            accelerator: Some(Accelerator::Tcg),
            ..VmmOptions::default()
        };
        Self {
            directory,
            driver: Vmms::detect(options).get(kind).unwrap(),
            boot,
        }
    }

    pub fn spec(&self, id: &str, tap: &Tap, layer: PathBuf) -> MachineSpec {
        let runtime_directory = self.directory.path().join(id);
        std::fs::create_dir_all(&runtime_directory).unwrap();
        let disk = |path, read_only| Disk {
            path,
            read_only,
            limit: None,
        };
        MachineSpec {
            id: id.to_owned(),
            cpus: 1,
            memory_bytes: 256 << 20,
            memory: MemoryBacking::Anonymous,
            hotplug_bytes: 0,
            kernel: self.boot.kernel.clone(),
            initramfs: self.boot.initramfs.clone(),
            kernel_arguments: Vec::new(),
            disks: vec![
                disk(self.directory.path().join("root.erofs"), true),
                disk(layer, false),
            ],
            host_devices: Vec::new(),
            nic: Some(Nic {
                tap: tap.name.clone(),
                mac: format!("02:00:00:00:{:02x}:fe", tap.network[2]),
                download: None,
                upload: None,
            }),
            workload_log: runtime_directory.join("app.log"),
            vmm_log: runtime_directory.join("vmm.log"),
            runtime_directory,
        }
    }

    pub async fn launch(&self, spec: &MachineSpec) -> Running {
        Running(self.driver.launch(spec).await.unwrap())
    }

    /// Everything of one instant of a running machine, which goes on.
    pub async fn capture(&self, machine: &Running, name: &str) -> Snapshot {
        let layer = self.directory.path().join(format!("{name}.ext4"));
        let copy = DiskCopy {
            disk: 1,
            target: layer.clone(),
        };
        let memory = machine.0.guest_memory().await.unwrap();
        let mut copies = machine.0.prepare_disk_copies(&[copy]).await.unwrap();
        let room = memory.room_for_copy().unwrap();
        let begun = Instant::now();
        machine.0.pause().await.unwrap();
        copies.begin().await.unwrap();
        let device_state = machine.0.save_devices().await.unwrap();
        let ranges = memory.populated().unwrap();
        let taken = File::from(memory.copy_into(room, &ranges).unwrap());
        machine.0.resume().await.unwrap();
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        println!("pause of {:?} for {} MiB", begun.elapsed(), bytes >> 20);
        copies.finish().await.unwrap();
        let path = self.directory.path().join(format!("{name}.memory"));
        let file = File::create(&path).unwrap();
        file.set_len(memory.len()).unwrap();
        let mut buffer = vec![0; 1 << 20];
        for range in ranges {
            for at in range.clone().step_by(1 << 20) {
                let piece = &mut buffer[..(range.end - at).min(1 << 20) as usize];
                taken.read_exact_at(piece, at).unwrap();
                file.write_all_at(piece, at).unwrap();
            }
        }
        Snapshot {
            identity: machine.0.state_identity().unwrap().clone(),
            device_state,
            memory: path,
            layer,
        }
    }

    /// A fork of the snapshot with a layer of its own.
    pub async fn fork(&self, snapshot: &Snapshot, id: &str, tap: &Tap) -> Running {
        let layer = self.directory.path().join(format!("{id}.ext4"));
        assert!(
            Command::new("cp")
                .arg("--sparse=always")
                .arg(&snapshot.layer)
                .arg(&layer)
                .status()
                .unwrap()
                .success()
        );
        let mut spec = self.spec(id, tap, layer);
        spec.memory = MemoryBacking::Private(snapshot.memory.clone());
        let begun = Instant::now();
        let restore = Restore {
            identity: snapshot.identity.clone(),
            device_state: snapshot.device_state.clone(),
            patch: None,
        };
        let machine = Running(self.driver.restore(&spec, restore).await.unwrap());
        let restored = begun.elapsed();
        machine.0.resume().await.unwrap();
        println!(
            "{id}: restored in {restored:?}, running after {:?}",
            begun.elapsed()
        );
        machine
    }
}

/// A machine that ends with its test.
pub struct Running(pub Box<dyn Machine>);

impl Running {
    pub async fn socket(&self) -> UnixStream {
        let AgentChannel::SerialSocket(path) = self.0.agent_channel() else {
            panic!("no serial channel")
        };
        UnixStream::connect(path).await.unwrap()
    }

    pub async fn connect(&self, key: Option<&AgentKey>) -> (GuestClient, GuestEvents) {
        GuestClient::connect(self.socket().await, key, PATIENCE)
            .await
            .unwrap()
    }

    pub async fn ended(&self) {
        tokio::time::timeout(PATIENCE, self.0.exited())
            .await
            .expect("the machine should have ended");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let process = self.0.process();
        if process.is_alive() {
            let _ = Command::new("kill")
                .args(["-9", &process.pid.to_string()])
                .status();
        }
    }
}

/// Longer than clocks may differ.
pub const A_WHILE: Duration = Duration::from_millis(1500);
