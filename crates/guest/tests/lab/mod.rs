//! A real machine for tests: QEMU without hardware help, a kernel, the real guest program, a busybox image.
//!
//! Kernel: `HYPEMAN_TEST_KERNEL` (an uncompressed PVH kernel, as `kernel/build` makes it). Modules for a kernel that
//! needs them: `HYPEMAN_TEST_MODULES`, a directory with `order`. Guest program: `HYPEMAN_TEST_GUEST` or
//! `HYPEMAN_GUEST_BINARY`, built with
//! `cargo build -p hypeman-guest --profile guest --target x86_64-unknown-linux-musl`.
// The lints' exception for tests does not reach helpers of integration tests; not every test uses every helper.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

pub mod cloud_hypervisor;
pub mod machines;

use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use hypeman_guest_api::{
    AgentKey, ExecRequest, GuestConfig, GuestEvent, InitMode, Program,
    host::{ExecOutput, GuestClient, GuestEvents},
};
use tokio::net::UnixStream;

pub const KEY: AgentKey = AgentKey([7; 32]);
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a machine is made of.
pub struct Lab {
    pub directory: tempfile::TempDir,
    pub board: String,
    qemu: Child,
}

fn kernel() -> Option<PathBuf> {
    std::env::var_os("HYPEMAN_TEST_KERNEL")
        .map(PathBuf::from)
        .filter(|kernel| kernel.is_file())
}

fn guest() -> Option<PathBuf> {
    let named = ["HYPEMAN_TEST_GUEST", "HYPEMAN_GUEST_BINARY"]
        .iter()
        .find_map(std::env::var_os)
        .map(PathBuf::from);
    let target = PathBuf::from(env!("CARGO_BIN_EXE_hypeman-guest"));
    let built = target
        .ancestors()
        .nth(2)?
        .join("x86_64-unknown-linux-musl/guest/hypeman-guest");
    named.or(Some(built)).filter(|path| path.exists())
}

/// Whether this computer can run the tests; says what is missing.
pub fn is_possible() -> bool {
    let tools = ["qemu-system-x86_64", "mkfs.erofs", "mkfs.ext4", "/bin/busybox"];
    for tool in tools {
        let found = if tool.starts_with('/') {
            Path::new(tool).exists()
        } else {
            std::env::var("PATH")
                .unwrap_or_default()
                .split(':')
                .any(|directory| Path::new(directory).join(tool).exists())
        };
        if !found {
            println!("SKIPPED: {tool} is missing");
            return false;
        }
    }
    if kernel().is_none() || guest().is_none() {
        println!("SKIPPED: no kernel or no guest program (see tests/lab/mod.rs)");
        return false;
    }
    true
}

/// One entry of a cpio archive in the `newc` format.
fn cpio_entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let mut header = String::from("070701");
    let fields = [
        1,
        mode,
        0,
        0,
        1,
        0,
        content.len() as u32,
        0,
        0,
        0,
        0,
        name.len() as u32 + 1,
        0,
    ];
    for field in fields {
        header.push_str(&format!("{field:08x}"));
    }
    archive.extend_from_slice(header.as_bytes());
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

fn initramfs(path: &Path) {
    let mut archive = Vec::new();
    cpio_entry(
        &mut archive,
        "init",
        0o100_755,
        &fs::read(guest().unwrap()).unwrap(),
    );
    if let Some(modules) = std::env::var_os("HYPEMAN_TEST_MODULES").map(PathBuf::from) {
        cpio_entry(&mut archive, "modules", 0o040_755, b"");
        let order = fs::read_to_string(modules.join("order")).unwrap();
        for name in order.lines() {
            let content = fs::read(modules.join(name)).unwrap();
            cpio_entry(&mut archive, &format!("modules/{name}"), 0o100_644, &content);
        }
        cpio_entry(&mut archive, "modules/order", 0o100_644, order.as_bytes());
    }
    cpio_entry(&mut archive, "TRAILER!!!", 0, b"");
    fs::write(path, archive).unwrap();
}

fn image(directory: &Path) {
    let root = directory.join("image");
    for name in ["bin", "sbin", "etc", "root", "tmp", "usr/bin", "data"] {
        fs::create_dir_all(root.join(name)).unwrap();
    }
    fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
    fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755)).unwrap();
    let applets = Command::new("/bin/busybox").arg("--list").output().unwrap();
    for applet in String::from_utf8(applets.stdout)
        .unwrap()
        .lines()
        .filter(|name| *name != "busybox")
    {
        symlink("/bin/busybox", root.join("bin").join(applet)).unwrap();
    }
    // An init as images bring one: services, then waiting for the word to power off.
    symlink("/bin/busybox", root.join("sbin/init")).unwrap();
    fs::write(
        root.join("etc/inittab"),
        "::sysinit:/bin/echo the init speaks\n::respawn:/bin/sleep 1000\n",
    )
    .unwrap();
    fs::write(
        root.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home/web:/bin/sh\n",
    )
    .unwrap();
    fs::write(
        root.join("etc/group"),
        "root:x:0:\nweb:x:1000:\nlogs:x:1001:web\n",
    )
    .unwrap();
    fs::write(root.join("etc/not-executable"), "text").unwrap();
    fs::write(root.join("data/base"), "from the image\n").unwrap();
    fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).unwrap();
    run(Command::new("mkfs.erofs")
        .arg("--quiet")
        .arg(directory.join("root.erofs"))
        .arg(&root));
    disk(&directory.join("layer.ext4"));
}

pub fn disk(path: &Path) {
    fs::File::create(path).unwrap().set_len(128 << 20).unwrap();
    run(Command::new("mkfs.ext4")
        .args(["-q", "-F", "-E", "lazy_itable_init=1,nodiscard"])
        .arg(path));
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Lab {
    /// Starts a machine on the board of `HYPEMAN_TEST_BOARD` (`q35` or `microvm`) with further disks.
    pub fn start(further_disks: &[&str]) -> Lab {
        let directory = tempfile::Builder::new().prefix("guest-lab").tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        initramfs(&at("initramfs"));
        image(directory.path());
        let board = std::env::var("HYPEMAN_TEST_BOARD").unwrap_or_else(|_| "q35".into());
        let suffix = if board == "microvm" { "device" } else { "pci" };
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args([
            "-machine",
            &board,
            "-accel",
            "tcg,thread=multi",
            "-bios",
            "qboot.rom",
            "-m",
            "256",
        ])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
            "-kernel",
        ])
        .arg(kernel().unwrap())
        .arg("-initrd")
        .arg(at("initramfs"))
        .args([
            "-append",
            &std::env::var("HYPEMAN_TEST_APPEND").unwrap_or_else(|_| kernel_words(&board)),
        ])
        .args(["-serial", &format!("file:{}", at("console").display())])
        .args([
            "-chardev",
            &format!(
                "socket,id=agent,path={},server=on,wait=off",
                at("agent").display()
            ),
        ])
        .args([
            "-chardev",
            &format!("file,id=log,path={},append=on", at("log").display()),
        ])
        .args(["-netdev", "user,id=net,restrict=on"])
        .args(["-device", &format!("virtio-net-{suffix},netdev=net")])
        .args(["-device", &format!("virtio-serial-{suffix}")])
        .args(["-device", "virtserialport,chardev=agent,name=hypeman.agent.0"])
        .args(["-device", "virtserialport,chardev=log,name=hypeman.log.0"]);
        let mut disks = vec![("root.erofs", true), ("layer.ext4", false)];
        for name in further_disks {
            disk(&at(name));
            disks.push((name, false));
        }
        for (number, (name, read_only)) in disks.into_iter().enumerate() {
            let read_only = if read_only { "on" } else { "off" };
            let path = at(name);
            qemu.args([
                "-drive",
                &format!(
                    "if=none,id=d{number},format=raw,readonly={read_only},file={}",
                    path.display()
                ),
            ])
            .args(["-device", &format!("virtio-blk-{suffix},drive=d{number}")]);
        }
        let errors = fs::File::create(at("qemu")).unwrap();
        let qemu = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .unwrap();
        Lab {
            directory,
            board,
            qemu,
        }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.file("log")).unwrap_or_default()).into_owned()
    }

    pub fn pid(&self) -> u32 {
        self.qemu.id()
    }

    /// The byte stream of the agent's port.
    pub async fn socket(&self) -> UnixStream {
        loop {
            if let Ok(stream) = UnixStream::connect(self.file("agent")).await {
                return stream;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn connect(&self, key: Option<&AgentKey>) -> (GuestClient, GuestEvents) {
        match GuestClient::connect(self.socket().await, key, PATIENCE).await {
            Ok(connection) => connection,
            Err(error) => panic!("{error}\n{}", self.console()),
        }
    }

    pub fn console(&self) -> String {
        let read =
            |name| String::from_utf8_lossy(&fs::read(self.file(name)).unwrap_or_default()).into_owned();
        format!("{}\n{}", read("console"), read("qemu"))
    }

    /// Waits for the machine to end by itself.
    pub async fn ended(&mut self) {
        let begun = std::time::Instant::now();
        loop {
            if self.qemu.try_wait().unwrap().is_some() {
                return;
            }
            assert!(
                begun.elapsed() < PATIENCE,
                "the machine did not end\n{}",
                self.console()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn kernel_words(board: &str) -> String {
    let mut words = "console=ttyS0 reboot=t panic=-1 cryptomgr.notests".to_owned();
    if board == "microvm" {
        words.push_str(" no_timer_check");
        if let Some(khz) = host_tsc_khz() {
            words.push_str(&format!(" tsc_early_khz={khz}"));
        }
    }
    words
}

fn host_tsc_khz() -> Option<u64> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("cpu MHz"))?;
    let megahertz: f64 = line.split(':').nth(1)?.trim().parse().ok()?;
    Some((megahertz * 1000.0) as u64)
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = std::io::stderr().write_all(self.console().as_bytes());
            let _ = std::io::stderr().write_all(self.log().as_bytes());
        }
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

pub fn program(command: &[&str]) -> GuestConfig {
    GuestConfig {
        key: KEY,
        instance_id: "tz4a98xxat96iws9zmbrgj3a".into(),
        hostname: "lab".into(),
        time_unix_nanos: SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap()
            .as_nanos() as i128,
        entropy: vec![3; 64],
        init_mode: InitMode::Exec,
        program: Program {
            argv: command.iter().map(|word| (*word).to_owned()).collect(),
            environment: vec![("GREETING".into(), "hello world".into())],
            working_directory: String::new(),
            user: String::new(),
        },
        network: None,
        volumes: Vec::new(),
        skip_agent: false,
    }
}

/// Everything that a command says, and its exit code.
pub async fn shell(client: &GuestClient, script: &str) -> (String, i32) {
    run_command(
        client,
        ExecRequest {
            command: vec!["sh".into(), "-c".into(), script.into()],
            ..ExecRequest::default()
        },
    )
    .await
}

pub async fn run_command(client: &GuestClient, request: ExecRequest) -> (String, i32) {
    let mut session = client.exec(request).await.unwrap();
    let mut said = Vec::new();
    while let Some(output) = session.next().await.unwrap() {
        match output {
            ExecOutput::Stdout(data) | ExecOutput::Stderr(data) => said.extend_from_slice(&data),
            ExecOutput::Exit(code) => return (String::from_utf8_lossy(&said).into_owned(), code),
        }
    }
    unreachable!("a session ends with an exit code");
}

pub async fn expect(events: &mut GuestEvents, wanted: GuestEvent) {
    assert_eq!(events.next().await, Some(wanted));
}
