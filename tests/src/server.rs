//! A real server process in a directory of its own.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    Client, CommandLine, Guest, Image, ImageBuilder, Snapshot, VmmProcess, encode, eventually, interrupt,
    mint, vmms_of,
};

const SECRET: &str = "a-secret-of-the-stories-0123456789abcdef";

/// How a server is started.
#[derive(Debug, Default)]
pub struct ServerOptions {
    /// Settings over the stories' own, nested as in the configuration file.
    pub settings: Vec<(&'static str, Value)>,
    /// Variables of its environment.
    pub environment: Vec<(String, String)>,
    /// Data directory, when it must lie somewhere particular.
    pub data_directory: Option<PathBuf>,
    /// Words put before the program, such as `ip netns exec NAME`.
    pub wrapper: Vec<String>,
}

/// A running server. Dropping it ends the server and the VMMs of its data directory.
#[derive(Debug)]
pub struct Server {
    options: ServerOptions,
    child: Child,
    client: Client,
    port: u16,
    data_directory: PathBuf,
    directory: TempDir,
}

/// The `hypeman` program that was built beside the stories.
fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("HYPEMAN_TEST_BINARY") {
        return PathBuf::from(path);
    }
    let stories = std::env::current_exe().expect("own path");
    let profile = stories.ancestors().nth(2).expect("target directory");
    let program = profile.join("hypeman");
    assert!(
        program.exists(),
        "{} is missing: run `cargo build --workspace` first",
        program.display()
    );
    program
}

impl Server {
    /// Starts one with the stories' defaults.
    pub async fn start() -> Self {
        Self::start_with(ServerOptions::default()).await
    }

    /// Starts one.
    pub async fn start_with(options: ServerOptions) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("hm-")
            .tempdir()
            .expect("directory");
        let data_directory = options
            .data_directory
            .clone()
            .unwrap_or_else(|| directory.path().join("d"));
        let (child, port) = launch(&options, directory.path(), &data_directory, 0).await;
        let client = Client::new(&format!("http://127.0.0.1:{port}"), Some(&mint(SECRET, None)));
        let server = Self {
            options,
            child,
            client,
            port,
            data_directory,
            directory,
        };
        eventually("the server answers", || async {
            let request = server.client.request(reqwest::Method::GET, "/health");
            server
                .client
                .try_send(request)
                .await
                .is_some_and(|reply| reply.status == 200)
        })
        .await;
        server
    }

    /// Tries to start a second server on the same data directory; what it printed and whether it failed.
    #[must_use]
    pub fn start_second(&self) -> (bool, String) {
        let configuration = write_configuration(
            &self.options,
            self.directory.path(),
            &self.data_directory,
            0,
            "second",
        );
        let output = command(&self.options, &configuration)
            .output()
            .expect("second server");
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    /// A client with full rights.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Secret that signs tokens.
    #[must_use]
    pub fn secret(&self) -> &str {
        SECRET
    }

    /// `127.0.0.1:PORT`, which is also the registry's name.
    #[must_use]
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Data directory.
    #[must_use]
    pub fn data_directory(&self) -> &Path {
        &self.data_directory
    }

    /// A directory for the story's own files.
    #[must_use]
    pub fn scratch(&self) -> PathBuf {
        let scratch = self.directory.path().join("scratch");
        std::fs::create_dir_all(&scratch).expect("scratch directory");
        scratch
    }

    /// The command line, pointed at this server.
    #[must_use]
    pub fn command_line(&self) -> CommandLine {
        CommandLine::new(
            program(),
            self.client.base(),
            self.client.token().unwrap_or_default(),
            &self.scratch(),
        )
    }

    /// The server's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// VMMs of its data directory.
    #[must_use]
    pub fn vmms(&self) -> Vec<VmmProcess> {
        vmms_of(&self.data_directory)
    }

    /// Ends it as a power cut would, VMMs excepted.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
    }

    /// Asks it to end and waits; whether it ended well.
    pub fn terminate(&mut self) -> bool {
        let pid = i32::try_from(self.child.id())
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            .expect("pid");
        rustix::process::kill_process(pid, Signal::TERM).expect("SIGTERM");
        self.child.wait().expect("wait").success()
    }

    /// Waits until it has ended on its own; used where a fault point ends it.
    pub async fn ended(&mut self) {
        let mut tries = crate::PATIENCE.as_millis() / 20;
        while self.child.try_wait().expect("wait").is_none() {
            tries -= 1;
            assert!(tries > 0, "gave up waiting for the server to end");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("wait").is_some()
    }

    /// Starts it again on the same data and port, after it ended.
    pub async fn start_again(&mut self) {
        let options = std::mem::take(&mut self.options.environment);
        self.start_again_with(options).await;
    }

    /// As [`Self::start_again`], with other variables in its environment.
    pub async fn start_again_with(&mut self, environment: Vec<(String, String)>) {
        self.options.environment = environment;
        let (child, port) = launch(
            &self.options,
            self.directory.path(),
            &self.data_directory,
            self.port,
        )
        .await;
        (self.child, self.port) = (child, port);
        eventually("the server answers again", || async {
            let request = self.client.request(reqwest::Method::GET, "/health");
            self.client
                .try_send(request)
                .await
                .is_some_and(|reply| reply.status == 200)
        })
        .await;
    }

    /// Puts words before the program at the next start.
    pub fn set_wrapper(&mut self, wrapper: &[&str]) {
        self.options.wrapper = wrapper.iter().map(|word| (*word).to_owned()).collect();
    }

    /// What the server has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("server.log")).unwrap_or_default()
    }

    /// Pushes an image and waits until it is ready; its full name.
    pub async fn push(&self, image: &Image, repository: &str, tag: &str) -> String {
        let _ = image.push(&self.client, repository, tag).await;
        let name = format!("{}/{repository}:{tag}", self.host());
        let image = self.image_settled(&name).await;
        assert_eq!(
            image["status"], "ready",
            "the image did not become ready: {image}"
        );
        name
    }

    /// Waits until an image is ready or failed.
    pub async fn image_settled(&self, name: &str) -> Value {
        let path = format!("/images/{}", encode(name));
        let settled = |image: &Value| image["status"] == "ready" || image["status"] == "failed";
        eventually(&format!("image {name} is ready or failed"), || async {
            let reply = self.client.get(&path).await;
            reply.status == 200 && settled(&reply.json())
        })
        .await;
        self.client.get(&path).await.expect(200).json()
    }

    /// Deletes an image.
    pub async fn delete_image(&self, name: &str) {
        let path = format!("/images/{}", encode(name));
        self.client.delete(&path).await.expect(204);
    }

    /// Pushes the busybox image; its full name.
    pub async fn busybox(&self) -> String {
        let image = ImageBuilder::busybox()
            .expect("a static /bin/busybox on the host")
            .build();
        self.push(&image, "stories/busybox", "1").await
    }

    /// Creates an instance of `image` with the stories' small defaults under `overrides`.
    pub async fn create(&self, image: &str, overrides: Value) -> Guest {
        let mut request = json!({
            "name": "story", "image": image, "size": "128MB", "overlay_size": "256MB", "vcpus": 1,
            "network": {"enabled": false},
        });
        for (key, value) in overrides.as_object().into_iter().flatten() {
            request[key] = value.clone();
        }
        let instance = self.client.post("/instances", &request).await.expect(201).json();
        Guest::new(self.client.clone(), instance["id"].as_str().expect("id"))
    }

    /// The instance `id`.
    #[must_use]
    pub fn guest(&self, id: &str) -> Guest {
        Guest::new(self.client.clone(), id)
    }

    /// The snapshot `id`.
    #[must_use]
    pub fn snapshot(&self, id: &str) -> Snapshot {
        Snapshot::new(self.client.clone(), id)
    }

    /// All instances, as the API lists them.
    pub async fn guests(&self) -> Vec<Guest> {
        let ids = self.listed("/instances").await.into_iter();
        ids.map(|id| self.guest(&id)).collect()
    }

    /// All snapshots, as the API lists them: newest first.
    pub async fn snapshots(&self) -> Vec<Snapshot> {
        let ids = self.listed("/snapshots").await.into_iter();
        ids.map(|id| self.snapshot(&id)).collect()
    }

    /// Ids of what a list names.
    pub async fn listed(&self, list: &str) -> Vec<String> {
        let listed = self.client.get(list).await.expect(200).json();
        let entries = listed.as_array().expect("a list").iter();
        entries
            .map(|entry| entry["id"].as_str().expect("id").to_owned())
            .collect()
    }

    /// Waits until directories of the data directory are empty, as they become by themselves when nobody needs what
    /// was in them.
    pub async fn emptied(&self, directories: &[&str]) {
        for directory in directories {
            let path = self.data_directory.join(directory);
            eventually(&format!("{directory} is empty"), || async {
                std::fs::read_dir(&path).expect("directory").count() == 0
            })
            .await;
        }
    }

    /// Creates an instance and waits until it runs.
    pub async fn run(&self, image: &str, overrides: Value) -> Guest {
        let guest = self.create(image, overrides).await;
        guest.wait_for("Running").await;
        guest
    }
}

/// Directory name, then value, of nested settings: `("logging.max_size", …)` becomes `logging: {max_size: …}`.
fn write_configuration(
    options: &ServerOptions,
    directory: &Path,
    data: &Path,
    port: u16,
    name: &str,
) -> PathBuf {
    let mut settings = json!({
        "listen_address": "127.0.0.1", "port": port.to_string(), "data_dir": data, "jwt_secret": SECRET,
        "hypervisor": {"default": crate::any_hypervisor()},
    });
    if let Some(kernel) = crate::kernel() {
        settings["kernel"] = json!({"path": kernel});
    }
    if crate::kvm_kernel().is_some() {
        settings["hypervisor"]["trust_kvm"] = json!("true");
    }
    for (key, value) in &options.settings {
        let place = key.split('.').fold(&mut settings, |place, part| &mut place[part]);
        *place = value.clone();
    }
    let path = directory.join(format!("{name}.yaml"));
    // JSON is YAML.
    std::fs::write(&path, settings.to_string()).expect("configuration");
    path
}

fn command(options: &ServerOptions, configuration: &Path) -> Command {
    let mut words = options
        .wrapper
        .iter()
        .map(std::ffi::OsString::from)
        .chain([program().into_os_string()]);
    let mut command = Command::new(words.next().expect("program"));
    command
        .args(words)
        .arg("serve")
        .arg("--config")
        .arg(configuration);
    command
        .envs(options.environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null());
    command
}

/// Starts the process and finds out its port. A port that it had before may for a moment be the near end of somebody
/// else's connection.
async fn launch(options: &ServerOptions, directory: &Path, data: &Path, port: u16) -> (Child, u16) {
    let end = tokio::time::Instant::now() + crate::PATIENCE;
    loop {
        match try_launch(options, directory, data, port).await {
            Ok(launched) => return launched,
            Err(text) => assert!(
                text.contains("Address already in use") && tokio::time::Instant::now() < end,
                "{text}"
            ),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Starts the process once; what it printed when it ended at once.
async fn try_launch(
    options: &ServerOptions,
    directory: &Path,
    data: &Path,
    port: u16,
) -> Result<(Child, u16), String> {
    let configuration = write_configuration(options, directory, data, port, "server");
    let path = directory.join("server.log");
    let log: File = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .expect("log");
    let earlier = usize::try_from(log.metadata().expect("log").len()).expect("length");
    let mut child = command(options, &configuration)
        .stdout(log.try_clone().expect("log"))
        .stderr(log)
        .spawn()
        .expect("server starts");
    let mut tries = crate::PATIENCE.as_millis() / 20;
    loop {
        let text = std::fs::read(&path).expect("log");
        let text = String::from_utf8_lossy(text.get(earlier..).unwrap_or_default()).into_owned();
        if let Some(port) = announced_port(&text) {
            interrupt::started(child.id(), data, directory);
            return Ok((child, port));
        }
        if let Some(status) = child.try_wait().expect("wait") {
            return Err(format!("the server ended at once ({status}):\n{text}"));
        }
        tries -= 1;
        assert!(tries > 0, "the server did not announce its address:\n{text}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The port in `http://127.0.0.1:PORT` of a complete line.
fn announced_port(log: &str) -> Option<u16> {
    let complete = &log[..=log.rfind('\n')?];
    let (_, rest) = complete.split_once("http://127.0.0.1:")?;
    rest.split(|character: char| !character.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        interrupt::ended(self.directory.path());
        for vmm in self.vmms() {
            vmm.signal(Signal::KILL);
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let (earlier, last) = lines.split_at(lines.len().saturating_sub(80));
            for line in earlier.iter().filter(|line| line.contains(" ERROR ")) {
                eprintln!("{line}");
            }
            eprintln!("--- end of the server's log ---\n{}\n---", last.join("\n"));
        }
    }
}
