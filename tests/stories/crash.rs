//! The server dies at each step of each operation, and the next one finds everything as before or as after.
//!
//! The steps are the engine's own list; a build with the feature `fault-points` ends itself at the step that
//! `HYPEMAN_FAULT` names, as `kill -9` would.

use std::collections::BTreeSet;
use std::path::Path;

use hypeman_engine::faults;
use hypeman_tests::{
    Guest, Image, ImageBuilder, LayerBuilder, Server, Upstream, encode, eventually, have, skip_unless,
};
use serde_json::json;

use crate::full_disk::noise;

const GROUPS: [&str; 19] = [
    "standby.",
    "restore.",
    "capture.",
    "snapshot.delete.",
    "snapshot.",
    "import.",
    "rewind.",
    "fork.",
    "memory.sweep.",
    "memory.",
    "compress.",
    "schedule.",
    "create.",
    "start.",
    "stop.",
    "delete.",
    "push.",
    "image.delete.",
    "image.",
];

pub(crate) fn group(prefix: &'static str) -> impl Iterator<Item = &'static str> {
    let belongs =
        move |point: &&str| GROUPS.into_iter().find(|group| point.starts_with(group)) == Some(prefix);
    faults::ALL.iter().copied().filter(belongs)
}

#[test]
fn every_step_belongs_to_a_story() {
    let told: usize = GROUPS.into_iter().map(|prefix| group(prefix).count()).sum();
    assert_eq!(told, faults::ALL.len(), "a step of the engine that no story cuts");
}

/// Every path of the data directory but those that belong to the server and not to an object: the database's own,
/// boot files and templates, which are made when they are first needed.
pub(crate) fn paths(directory: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut open = vec![directory.to_owned()];
    while let Some(next) = open.pop() {
        for entry in std::fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = path
                .strip_prefix(directory)
                .unwrap()
                .to_string_lossy()
                .into_owned();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(path);
            }
            if !name.ends_with("-wal") && !name.ends_with("-shm") && !name.starts_with("system") {
                found.insert(name);
            }
        }
    }
    found
}

pub(crate) fn left_nothing(server: &Server, before: &BTreeSet<String>, point: &str) {
    let after = paths(server.data_directory());
    let left: Vec<&String> = after.difference(before).collect();
    assert!(left.is_empty(), "{point} left {left:?}");
}

/// What belongs to an instance in the data directory, by its state.
pub(crate) struct Traces {
    running: BTreeSet<String>,
    stopped: BTreeSet<String>,
}

impl Traces {
    /// Of a running instance, which runs again afterwards.
    pub(crate) async fn of(server: &Server, guest: &Guest) -> Self {
        let running = paths(server.data_directory());
        guest.stop().await;
        let stopped = paths(server.data_directory());
        guest.start(json!({})).await;
        // A second run may keep what a first one does not have yet.
        let again = paths(server.data_directory());
        Self {
            running: &(&running | &again) | &stopped,
            stopped,
        }
    }

    /// Nothing is there but what belongs to the instance in this state.
    pub(crate) fn left_nothing(&self, server: &Server, state: &str, point: &str) {
        let own = if state == "Running" {
            &self.running
        } else {
            &self.stopped
        };
        left_nothing(server, own, point);
    }
}

/// A server that dies at `point` during `operation`, and lives again.
pub(crate) async fn cut<F: Future>(
    server: &mut Server,
    point: &str,
    operation: impl FnOnce(hypeman_tests::Client) -> F,
) {
    eprintln!("cut at {point}");
    server.kill();
    server
        .start_again_with(vec![("HYPEMAN_FAULT".to_owned(), point.to_owned())])
        .await;
    let client = server.client().clone();
    // The operation may answer before the step is passed, which then follows by itself.
    operation(client).await;
    server.ended().await;
    server.start_again_with(Vec::new()).await;
}

async fn usable(guest: &Guest) {
    assert_eq!(guest.output("echo usable").await, "usable");
}

/// The instance settles as before or as after, and what runs on the host is what the API shows.
pub(crate) async fn settled(server: &Server, guest: &Guest, states: &[&str]) -> String {
    let shown = guest
        .wait_until("it settles", |instance| {
            states.iter().any(|state| instance["state"] == *state)
        })
        .await;
    let state = shown["state"].as_str().unwrap().to_owned();
    let running = usize::from(state == "Running");
    eventually("VMMs match the states", || async {
        server.vmms().len() == running
    })
    .await;
    if running == 1 {
        usable(guest).await;
    }
    state
}

#[tokio::test]
async fn create_is_cut_at_each_step() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let image = server.busybox().await;
    server
        .run(&image, json!({"name": "warm-up"}))
        .await
        .delete()
        .await;
    let before = paths(server.data_directory());
    for point in group("create.") {
        let request = json!({"name": "cut", "image": image, "size": "128MB", "overlay_size": "256MB", "vcpus": 1, "network": {"enabled": false}});
        cut(&mut server, point, async |client| {
            client.try_post("/instances", &request).await
        })
        .await;
        match server.guests().await.as_slice() {
            [] => assert_eq!(server.vmms(), vec![], "{point}"),
            [guest] => {
                settled(&server, guest, &["Running", "Stopped"]).await;
                guest.delete().await;
            }
            several => panic!("{point}: {several:?}"),
        }
        assert_eq!(server.vmms(), vec![], "{point}");
        left_nothing(&server, &before, point);
        let again = server
            .create(&image, json!({"name": "cut", "cmd": ["true"]}))
            .await;
        again.delete().await;
    }
}

#[tokio::test]
async fn start_is_cut_at_each_step() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    let traces = Traces::of(&server, &guest).await;
    for point in group("start.") {
        guest.stop().await;
        let path = format!("/instances/{}/start", guest.id);
        cut(&mut server, point, async |client| {
            client.try_post(&path, &json!({})).await
        })
        .await;
        let state = settled(&server, &guest, &["Running", "Stopped"]).await;
        traces.left_nothing(&server, &state, point);
        if state == "Stopped" {
            guest.start(json!({})).await;
        }
        usable(&guest).await;
    }
    guest.delete().await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn stop_is_cut_at_each_step() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    let traces = Traces::of(&server, &guest).await;
    for point in group("stop.") {
        let path = format!("/instances/{}/stop", guest.id);
        cut(&mut server, point, async |client| {
            client.try_post_empty(&path).await
        })
        .await;
        let state = settled(&server, &guest, &["Running", "Stopped"]).await;
        traces.left_nothing(&server, &state, point);
        if state == "Stopped" {
            guest.start(json!({})).await;
        }
        usable(&guest).await;
    }
    guest.delete().await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn delete_is_cut_at_each_step() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let image = server.busybox().await;
    server
        .run(&image, json!({"name": "warm-up"}))
        .await
        .delete()
        .await;
    let before = paths(server.data_directory());
    for point in group("delete.") {
        let guest = server.run(&image, json!({"name": "cut"})).await;
        let path = format!("/instances/{}", guest.id);
        cut(&mut server, point, async |client| client.try_delete(&path).await).await;
        if !server.guests().await.is_empty() {
            settled(&server, &guest, &["Running", "Stopped"]).await;
            guest.delete().await;
        }
        assert_eq!(server.vmms(), vec![], "{point}");
        left_nothing(&server, &before, point);
    }
}

fn image_of(point: &str) -> Image {
    ImageBuilder::empty()
        .layer(LayerBuilder::default().file("point", 0o644, point.as_bytes()))
        .build()
}

async fn as_before_or_after(server: &Server, name: &str) -> bool {
    let path = format!("/images/{}", encode(name));
    if server.client().get(&path).await.status == 404 {
        return false;
    }
    let settled = server.image_settled(name).await;
    assert!(
        settled["status"] == "ready" || settled["error"].is_string(),
        "{settled}"
    );
    settled["status"] == "ready"
}

async fn push_again_and_delete(
    server: &Server,
    name: &str,
    image: &Image,
    before: &BTreeSet<String>,
    point: &str,
) {
    let (repository, tag) = name.split_once('/').unwrap().1.split_once(':').unwrap();
    server.push(image, repository, tag).await;
    server.delete_image(name).await;
    let blobs_aside = |paths: BTreeSet<String>| -> BTreeSet<String> {
        paths
            .into_iter()
            .filter(|path| !path.contains("sha256"))
            .collect()
    };
    let after = blobs_aside(paths(server.data_directory()));
    assert!(
        after.is_subset(&blobs_aside(before.clone())),
        "{point} left: {:?}",
        after.difference(before).collect::<Vec<_>>()
    );
}

async fn warmed_up() -> (Server, BTreeSet<String>) {
    let server = Server::start().await;
    let name = server.push(&image_of("warm-up"), "cut", "warm-up").await;
    let before = paths(server.data_directory());
    server.delete_image(&name).await;
    (server, before)
}

#[tokio::test]
async fn push_and_conversion_are_cut_at_each_step() {
    let (mut server, before) = warmed_up().await;
    let name = format!("{}/cut:1", server.host());
    for point in group("push.").chain(group("image.").filter(|point| *point != "image.pulled")) {
        let image = image_of(point);
        let pushed = image.clone();
        cut(&mut server, point, async |client| {
            for (digest, bytes) in &pushed.blobs {
                Image::push_blob(&client, "cut", digest, bytes).await.expect(201);
            }
            let request = client
                .request(reqwest::Method::PUT, "/v2/cut/manifests/1")
                .header("content-type", pushed.media_type)
                .body(pushed.manifest.clone());
            client.try_send(request).await
        })
        .await;
        as_before_or_after(&server, &name).await;
        push_again_and_delete(&server, &name, &image, &before, point).await;
    }
}

#[tokio::test]
async fn pull_is_cut_at_each_step() {
    let upstream = Server::start().await;
    let (mut server, before) = warmed_up().await;
    let credentials = json!({"username": upstream.client().token().unwrap(), "password": "x"});
    for (number, point) in group("image.").enumerate() {
        let image = image_of(&format!("pull {point}"));
        let name = upstream.push(&image, "cut", &number.to_string()).await;
        let request = json!({"name": name, "credentials": credentials});
        cut(&mut server, point, async |client| {
            client.try_post("/images", &request).await
        })
        .await;
        // A pull with borrowed credentials cannot go on by itself: it is absent, failed or ready, and never pending for ever.
        as_before_or_after(&server, &name).await;
        server.client().post("/images", &request).await.expect(202);
        ready_and_gone_without_a_trace(&server, &name, &before, point).await;
    }
}

/// An image becomes ready without anybody asking for it, and all of it goes when it is deleted.
async fn ready_and_gone_without_a_trace(server: &Server, name: &str, before: &BTreeSet<String>, point: &str) {
    assert_eq!(server.image_settled(name).await["status"], "ready", "{point}");
    server.delete_image(name).await;
    left_nothing(server, before, point);
}

#[tokio::test]
async fn a_pull_that_needs_no_credentials_goes_on_by_itself() {
    let upstream = Upstream::start().await;
    let (mut server, before) = warmed_up().await;
    for (number, point) in group("image.").enumerate() {
        let image = image_of(&format!("open {point}"));
        let name = upstream.offer(&image, "cut", &number.to_string());
        let request = json!({"name": name});
        cut(&mut server, point, async |client| {
            client.try_post("/images", &request).await
        })
        .await;
        ready_and_gone_without_a_trace(&server, &name, &before, point).await;
    }
}

#[tokio::test]
async fn a_pull_killed_in_the_middle_of_a_layer_goes_on_by_itself() {
    let upstream = Upstream::start().await;
    let (mut server, before) = warmed_up().await;
    let image = ImageBuilder::empty()
        .layer(LayerBuilder::default().file("noise", 0o644, &noise(8 << 20)))
        .build();
    let name = upstream.offer(&image, "cut", "layer");
    upstream.hold();
    server
        .client()
        .post("/images", &json!({"name": name}))
        .await
        .expect(202);
    upstream.stopped().await;
    server.kill();
    upstream.release();
    server.start_again().await;
    ready_and_gone_without_a_trace(&server, &name, &before, "a layer").await;
}

#[tokio::test]
async fn deleting_an_image_is_cut_at_each_step() {
    let (mut server, before) = warmed_up().await;
    let name = format!("{}/cut:1", server.host());
    for point in group("image.delete.") {
        let image = image_of(point);
        server.push(&image, "cut", "1").await;
        let path = format!("/images/{}", encode(&name));
        cut(&mut server, point, async |client| client.try_delete(&path).await).await;
        as_before_or_after(&server, &name).await;
        push_again_and_delete(&server, &name, &image, &before, point).await;
    }
}
