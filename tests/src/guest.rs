//! An instance as the stories use it.

use serde_json::{Value, json};

use crate::{Client, Entry, ExecSession, Executed, LogStream, Reply, Snapshot, copy, eventually};

/// An instance.
#[derive(Debug, Clone)]
pub struct Guest {
    client: Client,
    /// Id.
    pub id: String,
}

/// What a shell returns that died of one, and how many are put up with.
const SEGMENTATION_FAULT: i64 = 139;
const SEGMENTATION_FAULTS: u32 = 4;

impl Guest {
    pub(crate) fn new(client: Client, id: &str) -> Self {
        Self {
            client,
            id: id.to_owned(),
        }
    }

    /// The instance that an answer shows.
    pub(crate) fn shown(client: &Client, instance: &Value) -> Self {
        let id = instance["id"].as_str();
        Self::new(
            client.clone(),
            id.unwrap_or_else(|| panic!("no instance: {instance}")),
        )
    }

    /// All of the forks that an answer tells of, each with its name; fails the story when one did not come about.
    pub(crate) fn all_forked(client: &Client, answer: &Value) -> Vec<(String, Self)> {
        let forks = answer["forks"].as_array().expect("several forks").iter();
        forks
            .map(|fork| {
                assert!(fork["error"].is_null(), "{fork}");
                let name = fork["name"].as_str().expect("name").to_owned();
                (name, Self::shown(client, &fork["instance"]))
            })
            .collect()
    }

    /// Its path in the API, and what comes after it, such as `/standby`.
    #[must_use]
    pub fn path(&self, rest: &str) -> String {
        format!("/instances/{}{rest}", self.id)
    }

    /// The instance as the API shows it.
    pub async fn inspect(&self) -> Value {
        self.client.get(&self.path("")).await.expect(200).json()
    }

    /// Waits until the instance is in `state`; fails the story when it settles in another one.
    pub async fn wait_for(&self, state: &str) {
        let path = self.path(&format!("/wait?state={state}&timeout=5m"));
        let reply = self.client.get(&path).await.expect(200).json();
        if reply["state"] != state {
            panic!("{reply} instead of {state}: {}", self.inspect().await);
        }
    }

    /// Waits until the instance shows something.
    pub async fn wait_until(&self, what: &str, condition: impl Fn(&Value) -> bool) -> Value {
        eventually(what, || async { condition(&self.inspect().await) }).await;
        self.inspect().await
    }

    /// Starts a command with further fields of the request.
    pub async fn exec_session(&self, request: Value) -> ExecSession {
        ExecSession::start(&self.client, &self.id, &request)
            .await
            .expect("exec accepted")
    }

    /// Whether a command can be run now. The agent of a guest that had no memory left may be away for a moment.
    pub async fn is_reachable(&self) -> bool {
        let request = json!({"command": ["true"], "tty": false});
        match ExecSession::start(&self.client, &self.id, &request).await {
            Ok(session) => session.finish().await.exit_code == 0,
            Err(_) => false,
        }
    }

    /// Runs a command to its end.
    pub async fn exec(&self, words: &[&str]) -> Executed {
        self.exec_session(json!({"command": words, "tty": false}))
            .await
            .finish()
            .await
    }

    /// Runs a shell line to its end.
    pub async fn shell(&self, line: &str) -> Executed {
        self.exec(&["sh", "-c", line]).await
    }

    /// Runs a shell line that must succeed; its output. A shell that dies of a segmentation fault is asked again, a few
    /// times: where KVM interprets guests, programs of theirs now and then lose registers.
    pub async fn output(&self, line: &str) -> String {
        let mut executed = self.shell(line).await;
        for _ in 0..SEGMENTATION_FAULTS {
            if executed.exit_code != SEGMENTATION_FAULT {
                break;
            }
            executed = self.shell(line).await;
        }
        assert_eq!(executed.exit_code, 0, "{line}: {}", executed.text());
        executed.text()
    }

    /// Copies a file in.
    pub async fn copy_in(&self, guest_path: &str, bytes: &[u8], extra: Value) -> Value {
        let mut request = extra;
        request["guest_path"] = json!(guest_path);
        copy::send(&self.client, &self.id, request, Some(bytes)).await
    }

    /// Makes a directory by copying it in.
    pub async fn copy_in_directory(&self, guest_path: &str, extra: Value) -> Value {
        let mut request = extra;
        request["guest_path"] = json!(guest_path);
        copy::send(&self.client, &self.id, request, None).await
    }

    /// Starts to copy a file in and breaks off.
    pub async fn break_off_copy(&self, guest_path: &str, bytes: &[u8]) {
        copy::send_and_break_off(&self.client, &self.id, guest_path, bytes).await;
    }

    /// Copies a file or tree out.
    ///
    /// # Errors
    /// The message of the server's error frame.
    pub async fn copy_out(&self, guest_path: &str, follow_links: bool) -> Result<Vec<Entry>, String> {
        copy::fetch(&self.client, &self.id, guest_path, follow_links).await
    }

    /// Opens the log.
    pub async fn logs(&self, query: &str) -> LogStream {
        LogStream::open(&self.client, &self.id, query).await
    }

    /// Stops it; waits until it is stopped.
    pub async fn stop(&self) {
        self.client.post_empty(&self.path("/stop")).await.expect(200);
        self.wait_for("Stopped").await;
    }

    /// Starts it; waits until it runs.
    pub async fn start(&self, body: Value) {
        self.client.post(&self.path("/start"), &body).await.expect(200);
        self.wait_for("Running").await;
    }

    /// Asks for something to be done with it, such as `/standby`; what came of it.
    pub async fn post(&self, rest: &str, body: &Value) -> Reply {
        self.client.post(&self.path(rest), body).await
    }

    /// The same without a body.
    pub async fn post_empty(&self, rest: &str) -> Reply {
        self.client.post_empty(&self.path(rest)).await
    }

    /// Puts it to standby; what it shows then.
    pub async fn standby(&self) -> Value {
        self.post_empty("/standby").await.expect(200).json()
    }

    /// Ends its standby; what it shows then.
    pub async fn restore(&self) -> Value {
        self.post_empty("/restore").await.expect(200).json()
    }

    /// Takes a snapshot of it.
    pub async fn take(&self, body: Value) -> Snapshot {
        let taken = self.post("/snapshots", &body).await.expect(201).json();
        Snapshot::new(self.client.clone(), taken["id"].as_str().expect("id"))
    }

    /// Takes a snapshot with its memory.
    pub async fn capture(&self) -> Snapshot {
        self.take(json!({"kind": "Standby"})).await
    }

    /// Asks for it to go back to a snapshot; what came of it.
    pub async fn try_go_back(&self, snapshot: &Snapshot, body: &Value) -> Reply {
        let rest = format!("/snapshots/{}/restore", snapshot.id);
        self.post(&rest, body).await
    }

    /// Goes back to a snapshot; what it shows then.
    pub async fn go_back(&self, snapshot: &Snapshot, body: Value) -> Value {
        self.try_go_back(snapshot, &body).await.expect(200).json()
    }

    /// Makes another instance of it.
    pub async fn fork(&self, body: Value) -> Self {
        let made = self.post("/fork", &body).await.expect(201).json();
        Self::shown(&self.client, &made)
    }

    /// Makes several other instances of it, all of which must come about; each with its name.
    pub async fn forks(&self, body: Value) -> Vec<(String, Self)> {
        let made = self.post("/fork", &body).await.expect(201).json();
        Self::all_forked(&self.client, &made)
    }

    /// Deletes it without a graceful shutdown.
    pub async fn delete(&self) {
        self.client
            .delete(&self.path("?graceful_shutdown=false"))
            .await
            .expect(204);
    }
}
