//! A server of its own for a bench: private data, a free port, gone afterwards.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::http::{Answer, Connection};
use crate::load::pause;
use crate::place::Place;
use crate::process;

/// Longer than a start takes, also when the kernel's modules must be packed first.
const START_PATIENCE: Duration = Duration::from_secs(120);
/// Longer than an image of the benches takes to convert.
const IMAGE_PATIENCE: Duration = Duration::from_secs(300);

/// The running server.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// May do everything.
    pub token: String,
    child: Child,
    hypeman: PathBuf,
    data: tempfile::TempDir,
    environment: Vec<(String, String)>,
    hypervisor: String,
}

impl Server {
    /// Starts a server on empty data.
    ///
    /// # Errors
    /// It does not come up; the error has the end of its log.
    pub fn start(context: &Context) -> Result<Self> {
        Self::start_in(context, &Place::usual())
    }

    /// Starts a server on empty data in a certain place, which must outlive it.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_in(context: &Context, place: &Place) -> Result<Self> {
        context.need_hypeman()?;
        let mut builder = tempfile::Builder::new();
        builder.prefix("hypeman-bench-");
        let data = match place.directory() {
            Some(directory) => builder.tempdir_in(directory),
            None => builder.tempdir(),
        };
        let data = data.map_err(|error| BenchError::io("make a data directory", error))?;
        let configuration = data.path().join("config.yaml");
        fs::write(&configuration, "").map_err(|error| BenchError::io("write a configuration", error))?;
        let mut environment = vec![
            ("CONFIG_PATH".to_owned(), configuration.display().to_string()),
            (
                "DATA_DIR".to_owned(),
                data.path().join("data").display().to_string(),
            ),
            ("LIMITS__MIN_FREE_DISK".to_owned(), "1MB".to_owned()),
            ("LIMITS__MAX_IMAGE_STORAGE".to_owned(), "1".to_owned()),
            ("LOGGING__LEVEL".to_owned(), "warn".to_owned()),
        ];
        for (key, path) in [
            ("KERNEL__PATH", &context.kernel),
            ("KERNEL__MODULES", &context.modules),
        ] {
            environment.extend(
                path.as_ref()
                    .map(|path| (key.to_owned(), path.display().to_string())),
            );
        }
        if context.trusts_kvm() {
            environment.push(("HYPERVISOR__TRUST_KVM".to_owned(), "true".to_owned()));
        }
        if context.hypervisor == "firecracker" {
            environment.push(("HYPERVISOR__FIRECRACKER__PAGER".to_owned(), context.pager.clone()));
            // Served however small it is: that is what is measured.
            environment.push((
                "HYPERVISOR__FIRECRACKER__PAGER_THRESHOLD".to_owned(),
                "0".to_owned(),
            ));
        }
        let mut server = Self::launch(context.hypeman.clone(), data, environment)?;
        server.hypervisor.clone_from(&context.hypervisor);
        Ok(server)
    }

    /// Kind of hypervisor of guests that are captured and restored.
    pub fn hypervisor(&self) -> &str {
        &self.hypervisor
    }

    fn launch(hypeman: PathBuf, data: tempfile::TempDir, environment: Vec<(String, String)>) -> Result<Self> {
        let port = free_port()?;
        if !running().iter().any(|folder| folder == data.path()) {
            running().push(data.path().to_owned());
        }
        let log = fs::File::create(data.path().join("server.log"))
            .map_err(|error| BenchError::io("make the server's log", error))?;
        let errors = log
            .try_clone()
            .map_err(|error| BenchError::io("make the server's log", error))?;
        let child = Command::new(&hypeman)
            .arg("serve")
            // Said twice, so that the process can be told from others by its command line.
            .arg("--data-dir")
            .arg(data.path().join("data"))
            .envs(environment.iter().cloned())
            .env("PORT", port.to_string())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(errors)
            .spawn()
            .map_err(|error| BenchError::io("start the server", error))?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut server = Self {
            address,
            token: String::new(),
            child,
            hypeman,
            data,
            environment,
            hypervisor: "qemu".to_owned(),
        };
        server.wait_until_up()?;
        server.token = server.mint()?;
        Ok(server)
    }

    /// Ends the server, lets `change` work on its database, and starts it on what is there then.
    ///
    /// # Errors
    /// The change fails, or the server does not come up again.
    pub fn restart(mut self, change: impl FnOnce(&Path) -> Result<()>) -> Result<Self> {
        self.end();
        change(&self.data_directory().join("metadata.db"))?;
        let data = tempfile::Builder::new()
            .tempdir()
            .map_err(|error| BenchError::io("make a directory", error))?;
        let data = std::mem::replace(&mut self.data, data);
        Self::launch(self.hypeman.clone(), data, self.environment.clone())
    }

    /// The server's data directory.
    pub fn data_directory(&self) -> PathBuf {
        self.data.path().join("data")
    }

    /// The server's process.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// A connection to the API.
    ///
    /// # Errors
    /// Nobody listens.
    pub fn connect(&self) -> Result<Connection> {
        Connection::open(self.address, &self.token)
    }

    /// Runs a command of the CLI against this server.
    ///
    /// # Errors
    /// It cannot be started; a failure of the command itself is in the output.
    pub fn cli(&self, arguments: &[&str]) -> Result<Output> {
        Command::new(&self.hypeman)
            .args(arguments)
            .envs(self.environment.iter().cloned())
            .env("HYPEMAN_BASE_URL", format!("http://{}", self.address))
            .env("HYPEMAN_API_KEY", &self.token)
            .stdin(Stdio::null())
            .output()
            .map_err(|error| BenchError::io("run the CLI", error))
    }

    /// The end of the server's log.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.data.path().join("server.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    fn mint(&self) -> Result<String> {
        let output = self.cli(&["token", "create", "--user-id", "bench"])?;
        let token = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !output.status.success() || token.is_empty() {
            let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            return Err(BenchError::Answer(format!("hypeman token create: {complaint}")));
        }
        Ok(token)
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let started = Instant::now();
        loop {
            let answer =
                Connection::open(self.address, "").and_then(|mut c| c.call("GET", "/health", "", &[]));
            if answer.is_ok_and(|answer| answer.status == 200 || answer.status == 401) {
                return Ok(());
            }
            let ended = self
                .child
                .try_wait()
                .map_err(|error| BenchError::io("watch the server", error))?;
            if ended.is_some() || started.elapsed() > START_PATIENCE {
                return Err(BenchError::Answer(format!(
                    "the server did not come up:\n{}",
                    self.log()
                )));
            }
            pause(Duration::from_millis(20));
        }
    }

    fn end(&mut self) {
        if let Some(process) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            let _ = rustix::process::kill_process(process, rustix::process::Signal::TERM);
        }
        let asked = Instant::now();
        while asked.elapsed() < Duration::from_secs(20) {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            pause(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        kill_left_over(self.data.path());
        running().retain(|folder| folder != self.data.path());
    }
}

/// Folders of servers that run now.
static RUNNING: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn running() -> MutexGuard<'static, Vec<PathBuf>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lets an interrupted bench leave as little behind as one that ends.
///
/// # Errors
/// The handler cannot be installed.
pub fn clean_up_when_interrupted() -> Result<()> {
    let fail = |error| BenchError::io("watch for an interrupt", error);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .map_err(fail)?;
    let (mut interrupt, mut terminate) = runtime
        .block_on(async { Ok((signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)) })
        .map_err(fail)?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        for folder in running().drain(..) {
            kill_left_over(&folder);
            let _ = fs::remove_dir_all(folder);
        }
        std::process::exit(130);
    });
    Ok(())
}

/// Kills the server and the VMs of a bench. VMs outlive their server by design; these have nobody left.
fn kill_left_over(folder: &Path) {
    for (process, _) in process::started_for(&folder.display().to_string()) {
        if process != std::process::id()
            && let Some(process) = rustix::process::Pid::from_raw(process.cast_signed())
        {
            let _ = rustix::process::kill_process(process, rustix::process::Signal::KILL);
        }
    }
}

fn free_port() -> Result<u16> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let address = listener.and_then(|listener| listener.local_addr());
    address
        .map(|address| address.port())
        .map_err(|error| BenchError::io("find a free port", error))
}

/// Calls the API with JSON and expects `status`.
///
/// # Errors
/// Another status, with the server's message.
pub fn call(
    api: &mut Connection,
    method: &str,
    path: &str,
    body: Option<&Value>,
    status: u16,
) -> Result<Value> {
    let body = body.map(Value::to_string).unwrap_or_default();
    let answer = api.call(method, path, "application/json", body.as_bytes())?;
    expect(&answer, status, &format!("{method} {path}"))?;
    if answer.body.is_empty() {
        Ok(Value::Null)
    } else {
        Ok(serde_json::from_slice(&answer.body)?)
    }
}

/// Fails unless the answer has `status`.
///
/// # Errors
/// Another status, with the server's message.
pub fn expect(answer: &Answer, status: u16, what: &str) -> Result<()> {
    if answer.status == status {
        return Ok(());
    }
    let text: String = String::from_utf8_lossy(&answer.body).chars().take(500).collect();
    Err(BenchError::Answer(format!(
        "{what} answered {} instead of {status}: {text}",
        answer.status
    )))
}

/// Waits until an image whose name ends with `name` is ready, and returns its full name.
///
/// # Errors
/// Its conversion failed.
pub fn wait_for_image(api: &mut Connection, name: &str) -> Result<String> {
    let started = Instant::now();
    loop {
        let images = call(api, "GET", "/images", None, 200)?;
        let ours = images.as_array().and_then(|images| {
            images
                .iter()
                .find(|image| image["name"].as_str().is_some_and(|full| full.ends_with(name)))
        });
        match ours.map(|image| (image["status"].as_str(), image)) {
            Some((Some("ready"), image)) => return Ok(image["name"].as_str().unwrap_or(name).to_owned()),
            Some((Some("failed"), image)) => {
                return Err(BenchError::Answer(format!("the image failed: {image}")));
            }
            _ if started.elapsed() > IMAGE_PATIENCE => {
                return Err(BenchError::Answer(format!(
                    "the image {name} does not get ready: {images}"
                )));
            }
            _ => pause(Duration::from_millis(50)),
        }
    }
}

/// The body that creates a small instance without network.
pub fn small_instance(name: &str, image: &str, hypervisor: &str) -> Value {
    json!({
        "name": name,
        "image": image,
        "size": "256MB",
        "overlay_size": "1GB",
        "vcpus": 1,
        "hypervisor": hypervisor,
        "network": { "enabled": false },
        "tags": { "purpose": "bench" },
    })
}

/// Creates an instance and waits until it runs; returns its id.
///
/// # Errors
/// It is refused or does not get to `Running`.
pub fn create_running(api: &mut Connection, body: &Value) -> Result<String> {
    let created = call(api, "POST", "/instances", Some(body), 201)?;
    let id = created["id"].as_str().unwrap_or_default().to_owned();
    wait_until_running(api, &id, &created)?;
    Ok(id)
}

/// Brings an instance back from standby; returns when it runs.
///
/// # Errors
/// It is refused or does not get to `Running`.
pub fn restore(api: &mut Connection, id: &str) -> Result<()> {
    let restored = call(api, "POST", &format!("/instances/{id}/restore"), None, 200)?;
    // A slow guest may not have answered yet.
    wait_until_running(api, id, &restored)
}

/// Waits for an instance that was in the state of `known` a moment ago.
fn wait_until_running(api: &mut Connection, id: &str, known: &Value) -> Result<()> {
    if known["state"] == "Running" {
        return Ok(());
    }
    let path = format!("/instances/{id}/wait?state=Running&timeout=5m");
    let answer = call(api, "GET", &path, None, 200)?;
    match answer["state"] == "Running" {
        true => Ok(()),
        false => Err(BenchError::Answer(format!(
            "the instance did not get to Running: {answer}"
        ))),
    }
}

/// Deletes an instance without waiting for its guest.
///
/// # Errors
/// It is refused.
pub fn delete(api: &mut Connection, id: &str) -> Result<()> {
    call(
        api,
        "DELETE",
        &format!("/instances/{id}?graceful_shutdown=false"),
        None,
        204,
    )
    .map(drop)
}
