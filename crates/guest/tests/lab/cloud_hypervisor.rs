//! A machine in a real Cloud Hypervisor, whose only ways out are a vsock device and the console.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream as Socket,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use hypeman_guest_api::{
    AGENT_VSOCK_PORT, AgentKey, LOG_VSOCK_PORT,
    host::{GuestClient, GuestEvents},
};
use hypeman_vmm::WorkloadLog;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};

/// A host whose KVM interprets the guest's kernel takes minutes to boot it when it is busy.
pub const PATIENCE: Duration = Duration::from_secs(900);

/// A machine, and the directory in which it and its successors live.
pub struct Hypervisor {
    directory: tempfile::TempDir,
    program: PathBuf,
    process: Option<Child>,
}

/// A file that an environment variable names.
fn named(variable: &str) -> Option<PathBuf> {
    let path = std::env::var_os(variable).map(PathBuf::from);
    if path.as_ref().is_none_or(|path| !path.exists()) {
        println!("SKIPPED: {variable} names no file");
        return None;
    }
    path
}

impl Hypervisor {
    /// Boots the guest program under `HYPEMAN_TEST_CLOUD_HYPERVISOR`, with the kernel `HYPEMAN_TEST_KVM_KERNEL`.
    pub fn start() -> Option<Hypervisor> {
        let (program, kernel) = (
            named("HYPEMAN_TEST_CLOUD_HYPERVISOR")?,
            named("HYPEMAN_TEST_KVM_KERNEL")?,
        );
        let directory = tempfile::Builder::new().prefix("guest-lab").tempdir().unwrap();
        super::initramfs(&directory.path().join("initramfs"));
        super::image(directory.path());
        let place = directory.path().to_owned();
        let at = |name: &str| place.join(name).display().to_string();
        let mut machine = Hypervisor {
            program,
            process: None,
            directory,
        };
        machine.spawn(&[
            "--kernel",
            &kernel.display().to_string(),
            "--initramfs",
            &at("initramfs"),
            "--cmdline",
            "console=ttyS0 quiet reboot=k panic=-1",
            "--cpus",
            "boot=1",
            "--memory",
            "size=256M,shared=on",
            "--disk",
            &format!("path={},readonly=on,image_type=raw", at("root.erofs")),
            &format!("path={},image_type=raw", at("layer.ext4")),
            "--vsock",
            &format!("cid=3,socket={}", at("vsock")),
            "--console",
            "off",
            "--serial",
            &format!("file={}", at("console")),
        ]);
        Some(machine)
    }

    fn spawn(&mut self, arguments: &[&str]) {
        let output = fs::File::create(self.file("vmm")).unwrap();
        for socket in ["api", "vsock"] {
            let _ = fs::remove_file(self.file(socket));
        }
        let process = Command::new(&self.program)
            .args(["--seccomp", "false", "--api-socket"])
            .arg(self.file("api"))
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        self.process = Some(process);
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Takes what the workload prints.
    pub fn log(&self) -> WorkloadLog {
        WorkloadLog::listen(
            &self.file(&format!("vsock_{LOG_VSOCK_PORT}")),
            &self.file("app.log"),
        )
        .unwrap()
    }

    pub async fn connect(&self, key: Option<&AgentKey>) -> (GuestClient, GuestEvents) {
        let begun = Instant::now();
        loop {
            if let Some(stream) = agent(&self.file("vsock")).await
                && let Ok(connection) = GuestClient::connect(stream, key, PATIENCE).await
            {
                return connection;
            }
            assert!(begun.elapsed() < PATIENCE, "{}", self.console());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub fn console(&self) -> String {
        let read =
            |name| String::from_utf8_lossy(&fs::read(self.file(name)).unwrap_or_default()).into_owned();
        format!("{}\n{}", read("console"), read("vmm"))
    }

    /// A call of the VMM's own interface.
    pub fn call(&self, name: &str, body: &str) {
        let mut socket = loop {
            match Socket::connect(self.file("api")) {
                Ok(socket) => break socket,
                Err(_) => std::thread::yield_now(),
            }
        };
        let length = body.len();
        let request = format!(
            "PUT /api/v1/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        socket.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        while !answer.windows(4).any(|end| end == b"\r\n\r\n") {
            let mut byte = [0];
            socket.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        let answer = String::from_utf8(answer).unwrap();
        assert!(answer.contains(" 20"), "{name}: {answer}\n{}", self.console());
    }

    /// Captures the machine, which stands still from then on.
    pub fn capture(&self) {
        let snapshot = self.file("snapshot");
        let _ = fs::remove_dir_all(&snapshot);
        fs::create_dir(&snapshot).unwrap();
        self.call("vm.pause", "");
        let body = format!("{{\"destination_url\":\"file://{}\"}}", snapshot.display());
        self.call("vm.snapshot", &body);
    }

    /// Another process becomes the captured machine.
    pub fn restore(&mut self) {
        self.kill();
        let source = format!("source_url=file://{}", self.file("snapshot").display());
        self.spawn(&["--restore", &source]);
        self.call("vm.resume", "");
    }

    pub fn has_ended(&mut self) -> bool {
        self.process.as_mut().unwrap().try_wait().unwrap().is_some()
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Drop for Hypervisor {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = std::io::stderr().write_all(self.console().as_bytes());
        }
        self.kill();
    }
}

/// A connection to the agent, if it listens yet.
async fn agent(socket: &Path) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).await.ok()?;
    let request = format!("CONNECT {AGENT_VSOCK_PORT}\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut byte = [0];
    while byte != *b"\n" {
        stream.read_exact(&mut byte).await.ok()?;
    }
    Some(stream)
}
