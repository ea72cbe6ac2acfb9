//! Many clients at once that capture, fork, restore and delete in any order: no guest is lost, nothing that is needed
//! goes, and nothing that nobody needs stays.
//!
//! The order is random. `STORY_SEED` repeats one, as far as the clients' races allow.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use futures::future::join_all;
use hypeman_tests::{Client, Reply, Server, eventually, have, skip_unless};
use serde_json::{Value, json};

use crate::snapshots::{counting, goes_on};

/// Clients, and what each of them does.
const CLIENTS: u64 = 5;
const STEPS: usize = 14;
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
}

struct One {
    client: Client,
    told: Arc<Mutex<Told>>,
    dice: Dice,
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
        if done("delete an instance", &self.client.delete(&path).await).is_some() {
            let mut told = self.told();
            told.instances.retain(|known| *known != id);
            told.deleted.insert(id);
        }
    }

    async fn delete_snapshot(&mut self) {
        let Some((id, _)) = self.a_snapshot() else { return };
        let reply = self.client.delete(&format!("/snapshots/{id}")).await;
        if done("delete a snapshot", &reply).is_some() {
            let mut told = self.told();
            told.snapshots.retain(|(known, _)| *known != id);
            told.deleted.insert(id);
        }
    }

    async fn capture(&mut self) {
        let Some(id) = self.an_instance() else { return };
        let body = json!({"kind": "Standby", "compression": {"enabled": self.dice.roll(2) == 0}});
        let reply = self
            .client
            .post(&format!("/instances/{id}/snapshots"), &body)
            .await;
        if let Some(made) = done("capture", &reply) {
            self.told().snapshots.push((id_of(&made), id));
        }
    }

    async fn fork_snapshot(&mut self) {
        let Some((id, _)) = self.a_snapshot() else { return };
        let body = json!({"name": self.fork_name()});
        let reply = self.client.post(&format!("/snapshots/{id}/fork"), &body).await;
        if let Some(made) = done("fork a snapshot", &reply) {
            self.told().instances.push(id_of(&made));
        }
    }

    async fn fork_instance(&mut self) {
        let Some(id) = self.an_instance() else { return };
        let body = json!({"name": self.fork_name(), "from_running": true});
        let reply = self.client.post(&format!("/instances/{id}/fork"), &body).await;
        if let Some(made) = done("fork an instance", &reply) {
            self.told().instances.push(id_of(&made));
        }
    }

    async fn standby_and_restore(&mut self) {
        let Some(id) = self.an_instance() else { return };
        let compression = json!({"compression": {"enabled": self.dice.roll(2) == 0, "algorithm": "lz4"}});
        let standby = self
            .client
            .post(&format!("/instances/{id}/standby"), &compression)
            .await;
        done("standby", &standby);
        let restore = self.client.post_empty(&format!("/instances/{id}/restore")).await;
        done("restore", &restore);
    }

    async fn rewind(&mut self) {
        let Some((id, source)) = self.a_snapshot() else {
            return;
        };
        let standby = self
            .client
            .post_empty(&format!("/instances/{source}/standby"))
            .await;
        done("standby", &standby);
        let path = format!("/instances/{source}/snapshots/{id}/restore");
        done("restore a snapshot", &self.client.post(&path, &json!({})).await);
    }

    async fn look(&mut self) {
        self.client.get("/snapshots").await.expect(200);
        if let Some((id, _)) = self.a_snapshot() {
            done("usage", &self.client.get(&format!("/snapshots/{id}/usage")).await);
            let verified = self.client.post_empty(&format!("/snapshots/{id}/verify")).await;
            if let Some(verified) = done("verify", &verified) {
                // One that is deleted meanwhile is read to its end.
                assert_eq!(verified["state"], "intact", "{verified}");
            }
        }
    }
}

async fn ids(client: &Client, list: &str) -> BTreeSet<String> {
    let listed = client.get(list).await.expect(200).json();
    listed.as_array().unwrap().iter().map(id_of).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_delete_what_others_fork_and_restore_break_nothing() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let seed = std::env::var("STORY_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("STORY_SEED={seed}");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let told = Arc::new(Mutex::new(Told::default()));
    for number in 0..3 {
        let hypervisor = if number == 0 { "qemu-microvm" } else { "qemu" };
        let name = format!("source-{number}");
        let guest = counting(&server, &image, json!({"name": name, "hypervisor": hypervisor})).await;
        told.lock().unwrap().instances.push(guest.id);
    }
    let clients = (0..CLIENTS).map(|number| {
        let mut one = One {
            client: client.clone(),
            told: Arc::clone(&told),
            dice: Dice(seed.wrapping_mul(1_000).wrapping_add(number)),
        };
        tokio::spawn(async move {
            for _ in 0..STEPS {
                one.step().await;
            }
        })
    });
    for ended in join_all(clients).await {
        ended.unwrap();
    }

    let told = Arc::into_inner(told).unwrap().into_inner().unwrap();
    eprintln!(
        "{} instances, {} snapshots, {} deleted",
        told.instances.len(),
        told.snapshots.len(),
        told.deleted.len()
    );
    assert_eq!(
        ids(client, "/instances").await,
        told.instances.iter().cloned().collect(),
        "what was made is there, what was deleted is not"
    );
    assert_eq!(
        ids(client, "/snapshots").await,
        told.snapshots.iter().map(|(id, _)| id.clone()).collect()
    );
    for (id, _) in &told.snapshots {
        let path = format!("/snapshots/{id}/verify");
        let verified = client.post_empty(&path).await.expect(200).json();
        assert_eq!(verified["state"], "intact", "{verified}");
    }
    for id in &told.instances {
        let guest = server.guest(id);
        let shown = guest
            .wait_until("it settles", |shown| {
                shown["state"] == "Running" || shown["state"] == "Standby"
            })
            .await;
        if shown["state"] == "Standby" {
            let restore = format!("/instances/{id}/restore");
            client.post_empty(&restore).await.expect(200);
        }
        goes_on(&guest, 0).await;
    }
    assert_eq!(server.vmms().len(), told.instances.len());

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
    for directory in ["instances", "snapshots", "memory"] {
        eventually(&format!("{directory} is empty"), || async {
            let path = server.data_directory().join(directory);
            std::fs::read_dir(path).unwrap().count() == 0
        })
        .await;
    }
    assert_eq!(server.vmms(), vec![]);
}
