//! Many clients at once that capture, fork, restore and delete in any order, while the server is killed now and then: no
//! guest is lost, nothing that is needed goes, and nothing that nobody needs stays.
//!
//! The order is random. `STORY_SEED` repeats one, as far as the clients' races allow.
//!
//! A client whose connection broke does not know whether what it asked for was done. So the model has three parts: what
//! is there, what is gone, and what may be either.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hypeman_tests::{Client, Reply, Server, have, hypervisors, skip_unless};
use reqwest::Method;
use serde_json::{Value, json};

/// Clients, and what each of them does in a round; all rounds but the last end with the server's death.
const CLIENTS: u64 = 5;
const STEPS: usize = 5;
const ROUNDS: u64 = 4;
/// So many of each kind; above that they are deleted.
const INSTANCES: usize = 7;
const SNAPSHOTS: usize = 8;

/// A small generator of numbers, good enough to choose.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % sides as u64).unwrap()
    }

    fn pick<T: Clone>(&mut self, from: &[T]) -> Option<T> {
        (!from.is_empty()).then(|| from[self.roll(from.len())].clone())
    }
}

/// What the clients were told that there is, and is no more.
#[derive(Default)]
struct Told {
    instances: Vec<String>,
    /// With the source of each.
    snapshots: Vec<(String, String)>,
    deleted: BTreeSet<String>,
    forks: usize,
    /// Instances and snapshots whose deletion was cut.
    perhaps_deleted: BTreeSet<String>,
    /// Captures and forks that were cut: so many more than told there may be.
    perhaps_made: usize,
}

struct One {
    client: Client,
    told: Arc<Mutex<Told>>,
    dice: Dice,
    /// The server died under this client.
    cut: bool,
}

/// Done, or refused for what another client did; nothing else may come of it.
#[track_caller]
fn done(what: &str, reply: &Reply) -> Option<Value> {
    match reply.status {
        200 | 201 => return Some(reply.json()),
        204 => return Some(Value::Null),
        404 => assert_eq!(reply.json()["code"], "not_found", "{what}: {}", reply.text()),
        409 => {
            let code = reply.json()["code"].as_str().unwrap_or_default().to_owned();
            let expected = ["invalid_state", "conflict", "insufficient_resources"];
            assert!(expected.contains(&code.as_str()), "{what}: {}", reply.text());
        }
        other => panic!("{what}: {other} {}", reply.text()),
    }
    None
}

fn id_of(made: &Value) -> String {
    made["id"].as_str().unwrap().to_owned()
}

impl One {
    /// What came of a request: done, or not for what another client did. Without an answer the client is cut.
    async fn ask(&mut self, what: &str, method: Method, path: &str, body: Option<Value>) -> Option<Value> {
        let mut request = self.client.request(method, path);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let Some(reply) = self.client.try_send(request).await else {
            self.cut = true;
            return None;
        };
        done(what, &reply)
    }

    /// Asks for a new instance or snapshot; its id.
    async fn make(&mut self, what: &str, path: &str, body: Value) -> Option<String> {
        let made = self.ask(what, Method::POST, path, Some(body)).await;
        if self.cut {
            self.told().perhaps_made += 1;
        }
        made.as_ref().map(id_of)
    }

    /// Asks for the end of one; whether it is told to be gone.
    async fn end(&mut self, what: &str, path: &str, id: &str) -> bool {
        let ended = self.ask(what, Method::DELETE, path, None).await.is_some();
        let mut told = self.told.lock().unwrap();
        if self.cut {
            told.perhaps_deleted.insert(id.to_owned());
        } else if ended {
            told.deleted.insert(id.to_owned());
        }
        ended
    }

    fn told(&self) -> std::sync::MutexGuard<'_, Told> {
        self.told.lock().unwrap()
    }

    fn an_instance(&mut self) -> Option<String> {
        let known = self.told().instances.clone();
        self.dice.pick(&known)
    }

    fn a_snapshot(&mut self) -> Option<(String, String)> {
        let known = self.told().snapshots.clone();
        self.dice.pick(&known)
    }

    fn fork_name(&self) -> String {
        let mut told = self.told();
        told.forks += 1;
        format!("fork-{}", told.forks)
    }

    async fn step(&mut self) {
        let (instances, snapshots) = {
            let told = self.told();
            (told.instances.len(), told.snapshots.len())
        };
        let choice = match () {
            () if instances > INSTANCES => 0,
            () if snapshots > SNAPSHOTS => 1,
            () => self.dice.roll(10),
        };
        match choice {
            0 => self.delete_instance().await,
            1 => self.delete_snapshot().await,
            2 | 3 => self.capture().await,
            4 | 5 => self.fork_snapshot().await,
            6 => self.fork_instance().await,
            7 => self.standby_and_restore().await,
            8 => self.rewind().await,
            _ => self.look().await,
        }
    }

    async fn delete_instance(&mut self) {
        let Some(id) = self.an_instance() else { return };
        let path = format!("/instances/{id}?graceful_shutdown=false");
        if self.end("delete an instance", &path, &id).await {
            self.told().instances.retain(|known| *known != id);
        }
    }

    async fn delete_snapshot(&mut self) {
        let Some((id, _)) = self.a_snapshot() else { return };
        if self
            .end("delete a snapshot", &format!("/snapshots/{id}"), &id)
            .await
        {
            self.told().snapshots.retain(|(known, _)| *known != id);
        }
    }

    async fn capture(&mut self) {
        let Some(id) = self.an_instance() else { return };
        let body = json!({"kind": "Standby", "compression": {"enabled": self.dice.roll(2) == 0}});
        let path = format!("/instances/{id}/snapshots");
        if let Some(made) = self.make("capture", &path, body).await {
            self.told().snapshots.push((made, id));
        }
    }

    async fn fork_snapshot(&mut self) {
        let Some((id, _)) = self.a_snapshot() else { return };
        let body = json!({"name": self.fork_name()});
        let path = format!("/snapshots/{id}/fork");
        if let Some(made) = self.make("fork a snapshot", &path, body).await {
            self.told().instances.push(made);
        }
    }

    async fn fork_instance(&mut self) {
        let Some(id) = self.an_instance() else { return };
        let body = json!({"name": self.fork_name(), "from_running": true});
        let path = format!("/instances/{id}/fork");
        if let Some(made) = self.make("fork an instance", &path, body).await {
            self.told().instances.push(made);
        }
    }

    async fn standby_and_restore(&mut self) {
        let Some(id) = self.an_instance() else { return };
        let compression = json!({"compression": {"enabled": self.dice.roll(2) == 0, "algorithm": "lz4"}});
        let path = format!("/instances/{id}/standby");
        self.ask("standby", Method::POST, &path, Some(compression)).await;
        let path = format!("/instances/{id}/restore");
        self.ask("restore", Method::POST, &path, None).await;
    }

    async fn rewind(&mut self) {
        let Some((id, source)) = self.a_snapshot() else {
            return;
        };
        let path = format!("/instances/{source}/standby");
        self.ask("standby", Method::POST, &path, None).await;
        let path = format!("/instances/{source}/snapshots/{id}/restore");
        self.ask("restore a snapshot", Method::POST, &path, Some(json!({})))
            .await;
    }

    async fn look(&mut self) {
        self.ask("list", Method::GET, "/snapshots", None).await;
        if let Some((id, _)) = self.a_snapshot() {
            let path = format!("/snapshots/{id}");
            self.ask("usage", Method::GET, &format!("{path}/usage"), None)
                .await;
            let verified = self
                .ask("verify", Method::POST, &format!("{path}/verify"), None)
                .await;
            if let Some(verified) = verified {
                // One that is deleted meanwhile is read to its end.
                assert_eq!(verified["state"], "intact", "{verified}");
            }
        }
    }
}

async fn list(client: &Client, path: &str) -> Vec<Value> {
    let listed = client.get(path).await.expect(200).json();
    listed.as_array().unwrap().clone()
}

impl Told {
    /// Holds what is there against what clients were told, and learns what came of that which was cut.
    async fn compare(&mut self, client: &Client) {
        let (instances, snapshots) = (list(client, "/instances").await, list(client, "/snapshots").await);
        let there: BTreeSet<String> = instances.iter().chain(&snapshots).map(id_of).collect();
        let told = self
            .instances
            .iter()
            .chain(self.snapshots.iter().map(|(id, _)| id));
        let told: BTreeSet<String> = told.cloned().collect();
        let lost: Vec<&String> = told.difference(&there).collect();
        assert!(
            lost.iter().all(|id| self.perhaps_deleted.contains(*id)),
            "lost: {lost:?}, perhaps deleted: {:?}",
            self.perhaps_deleted
        );
        let back: Vec<&String> = self.deleted.intersection(&there).collect();
        assert!(back.is_empty(), "deleted and there: {back:?}");
        let unheard = there.difference(&told).count();
        assert!(
            unheard <= self.perhaps_made,
            "{unheard} that nobody made, of {} whose making was cut",
            self.perhaps_made
        );
        self.instances = instances.iter().map(id_of).collect();
        self.snapshots = snapshots
            .iter()
            .map(|snapshot| {
                let source = snapshot["source_instance_id"].as_str().unwrap();
                (id_of(snapshot), source.to_owned())
            })
            .collect();
        self.perhaps_deleted.clear();
        self.perhaps_made = 0;
    }
}

/// All guests go on and all snapshots are whole.
async fn all_is_well(server: &Server, told: &Told) {
    for (id, _) in &told.snapshots {
        server.snapshot(id).is_intact().await;
    }
    for id in &told.instances {
        let guest = server.guest(id);
        let shown = guest
            .wait_until("it settles", |shown| {
                shown["state"] == "Running" || shown["state"] == "Standby"
            })
            .await;
        if shown["state"] == "Standby" {
            guest.restore().await;
        }
        guest.goes_on(0).await;
    }
    assert_eq!(server.vmms().len(), told.instances.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_delete_what_others_fork_and_restore_break_nothing() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let seed = std::env::var("STORY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("STORY_SEED={seed}");
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let told = Arc::new(Mutex::new(Told::default()));
    let offered = hypervisors();
    for number in 0..3 {
        let hypervisor = offered[number % offered.len()];
        let overrides = json!({"name": format!("source-{number}"), "hypervisor": hypervisor});
        let guest = server.counting(&image, overrides).await;
        told.lock().unwrap().instances.push(guest.id);
    }
    let mut death = Dice(seed);
    for round in 0..ROUNDS {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let mut one = One {
                    client: server.client().clone(),
                    told: Arc::clone(&told),
                    dice: Dice(seed.wrapping_mul(1_000).wrapping_add(round * CLIENTS + number)),
                    cut: false,
                };
                tokio::spawn(async move {
                    for _ in 0..STEPS {
                        one.step().await;
                        if one.cut {
                            break;
                        }
                    }
                })
            })
            .collect();
        let last = round + 1 == ROUNDS;
        if !last {
            tokio::time::sleep(Duration::from_millis(200 + death.roll(3_000) as u64)).await;
            server.kill();
        }
        for ended in join_all(clients).await {
            ended.unwrap();
        }
        if !last {
            server.start_again().await;
        }
        let mut now = std::mem::take(&mut *told.lock().unwrap());
        now.compare(server.client()).await;
        all_is_well(&server, &now).await;
        eprintln!(
            "round {round}: {} instances, {} snapshots, {} deleted",
            now.instances.len(),
            now.snapshots.len(),
            now.deleted.len()
        );
        *told.lock().unwrap() = now;
    }

    let told = Arc::into_inner(told).unwrap().into_inner().unwrap();
    let client = server.client();
    // All of it goes, at once.
    let instances = told
        .instances
        .iter()
        .map(|id| format!("/instances/{id}?graceful_shutdown=false"));
    let snapshots = told.snapshots.iter().map(|(id, _)| format!("/snapshots/{id}"));
    let paths: Vec<String> = instances.chain(snapshots).collect();
    for reply in join_all(paths.iter().map(|path| client.delete(path))).await {
        reply.expect(204);
    }
    server.emptied(&["instances", "snapshots", "memory"]).await;
    assert_eq!(server.vmms(), vec![]);
}
