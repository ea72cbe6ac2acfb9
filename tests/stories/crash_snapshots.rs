//! The server dies at each step of what is done with memory, and no guest, snapshot or byte is lost or doubled.

use std::collections::BTreeSet;

use hypeman_tests::{Guest, Server, any_hypervisor, encode, eventually, have, skip_unless};
use serde_json::{Value, json};

use crate::crash::{cut, group, left_nothing, paths};
use crate::snapshots::{self, counter};
use crate::snapshots_schedules::turn;

/// Counts in memory; what it has counted can't be had from any disk.
async fn counting(server: &Server, overrides: Value) -> Guest {
    let image = server.busybox().await;
    snapshots::counting(server, &image, overrides).await
}

/// Whatever was cut: the guest is where it was or where it should be, and has forgotten nothing. How far it has counted.
async fn goes_on(server: &Server, guest: &Guest, at_least: u64, point: &str) -> u64 {
    let shown = guest
        .wait_until("it settles", |instance| {
            instance["state"] == "Running" || instance["state"] == "Standby"
        })
        .await;
    if shown["state"] == "Standby" {
        eventually("no VMM for what is in standby", || async {
            server.vmms().is_empty()
        })
        .await;
        let restore = format!("/instances/{}/restore", guest.id);
        server.client().post_empty(&restore).await.expect(200);
        guest.wait_for("Running").await;
    }
    let now = snapshots::goes_on(guest, at_least).await;
    assert_eq!(server.vmms().len(), 1, "{point}");
    now
}

async fn post(client: hypeman_tests::Client, path: String, body: Value) {
    client
        .try_send(client.request(reqwest::Method::POST, &path).json(&body))
        .await;
}

async fn stored(server: &Server) -> Vec<String> {
    let listed = server.client().get("/snapshots").await.expect(200).json();
    let ids = listed.as_array().unwrap().iter();
    ids.map(|snapshot| snapshot["id"].as_str().unwrap().to_owned())
        .collect()
}

/// What is listed is whole.
async fn all_verify(server: &Server, point: &str) {
    for id in stored(server).await {
        let path = format!("/snapshots/{id}/verify");
        let verified = server.client().post_empty(&path).await.expect(200).json();
        assert!(verified["damage"].is_null(), "{point}: {verified}");
    }
}

async fn delete_all(server: &Server) {
    for id in stored(server).await {
        server
            .client()
            .delete(&format!("/snapshots/{id}"))
            .await
            .expect(204);
    }
}

async fn take(server: &Server, guest: &Guest, body: Value) -> String {
    let path = format!("/instances/{}/snapshots", guest.id);
    let snapshot = server.client().post(&path, &body).await.expect(201).json();
    snapshot["id"].as_str().unwrap().to_owned()
}

async fn nothing_left(server: &Server, before: &BTreeSet<String>, point: &str) {
    eventually("what nobody needs is gone", || async {
        let after = paths(server.data_directory());
        after
            .difference(before)
            .all(|path| path.contains("/logs/") || path.ends_with("verified"))
    })
    .await;
    let allowed: BTreeSet<String> = paths(server.data_directory())
        .into_iter()
        .filter(|path| path.contains("/logs/"))
        .chain(before.iter().cloned())
        .collect();
    left_nothing(server, &allowed, point);
}

#[tokio::test]
async fn standby_is_cut_at_each_step() {
    standby_is_cut(&any_hypervisor()).await;
}

pub(crate) async fn standby_is_cut(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"hypervisor": hypervisor})).await;
    let path = format!("/instances/{}/standby", guest.id);
    let points = group("standby.").chain(group("memory.").filter(|point| point.contains("capture")));
    let mut counted = counter(&guest).await;
    for point in points {
        cut(&mut server, point, async |client| {
            post(client, path.clone(), json!({})).await
        })
        .await;
        counted = goes_on(&server, &guest, counted, point).await;
    }
    guest.delete().await;
    eventually("no memory is left", || async {
        std::fs::read_dir(server.data_directory().join("memory"))
            .unwrap()
            .count()
            == 0
    })
    .await;
}

#[tokio::test]
async fn restore_is_cut_at_each_step() {
    restore_is_cut(&any_hypervisor()).await;
}

pub(crate) async fn restore_is_cut(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"hypervisor": hypervisor})).await;
    let mut counted = counter(&guest).await;
    for point in group("restore.") {
        let path = format!("/instances/{}", guest.id);
        server
            .client()
            .post_empty(&format!("{path}/standby"))
            .await
            .expect(200);
        cut(&mut server, point, async |client| {
            post(client, format!("{path}/restore"), json!({})).await;
        })
        .await;
        counted = goes_on(&server, &guest, counted, point).await;
    }
    guest.delete().await;
}

#[tokio::test]
async fn capture_is_cut_at_each_step() {
    capture_is_cut(&any_hypervisor()).await;
}

pub(crate) async fn capture_is_cut(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"hypervisor": hypervisor})).await;
    let before = paths(server.data_directory());
    let path = format!("/instances/{}/snapshots", guest.id);
    let mut counted = counter(&guest).await;
    let memory = group("memory.").filter(|point| point.contains("capture"));
    for point in group("capture.").chain(group("snapshot.")).chain(memory) {
        cut(&mut server, point, async |client| {
            post(client, path.clone(), json!({"kind": "Standby"})).await;
        })
        .await;
        counted = goes_on(&server, &guest, counted, point).await;
        all_verify(&server, point).await;
        delete_all(&server).await;
        nothing_left(&server, &before, point).await;
    }
    guest.delete().await;
}

#[tokio::test]
async fn deleting_a_snapshot_is_cut_at_each_step() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({})).await;
    let before = paths(server.data_directory());
    let removals = group("memory.sweep.").filter(|point| point.contains("re"));
    for point in group("snapshot.delete.").chain(removals.filter(|point| !point.ends_with("reduced"))) {
        let id = take(&server, &guest, json!({"kind": "Standby"})).await;
        cut(&mut server, point, async |client| {
            let path = format!("/snapshots/{id}");
            client
                .try_send(client.request(reqwest::Method::DELETE, &path))
                .await;
        })
        .await;
        all_verify(&server, point).await;
        delete_all(&server).await;
        goes_on(&server, &guest, 0, point).await;
        nothing_left(&server, &before, point).await;
    }
    guest.delete().await;
}

#[tokio::test]
async fn restoring_a_snapshot_is_cut_at_each_step() {
    restoring_a_snapshot_is_cut(&any_hypervisor()).await;
}

pub(crate) async fn restoring_a_snapshot_is_cut(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"hypervisor": hypervisor})).await;
    let counted = counter(&guest).await;
    let id = take(&server, &guest, json!({"kind": "Standby"})).await;
    let path = format!("/instances/{}", guest.id);
    for point in group("rewind.") {
        server
            .client()
            .post_empty(&format!("{path}/standby"))
            .await
            .expect(200);
        cut(&mut server, point, async |client| {
            post(client, format!("{path}/snapshots/{id}/restore"), json!({})).await;
        })
        .await;
        goes_on(&server, &guest, counted, point).await;
        all_verify(&server, point).await;
    }
    guest.delete().await;
}

#[tokio::test]
async fn fork_is_cut_at_each_step() {
    fork_is_cut(&any_hypervisor()).await;
}

pub(crate) async fn fork_is_cut(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"name": "origin", "hypervisor": hypervisor})).await;
    let id = take(&server, &guest, json!({"kind": "Standby"})).await;
    guest.delete().await;
    let before = paths(server.data_directory());
    let path = format!("/snapshots/{id}/fork");
    let wake = group("restore.").filter(|point| *point != "restore.recorded");
    for point in group("fork.").chain(wake) {
        cut(&mut server, point, async |client| {
            post(client, path.clone(), json!({"name": "child"})).await;
        })
        .await;
        let listed = server.client().get("/instances").await.expect(200).json();
        match listed.as_array().unwrap().as_slice() {
            [] => assert_eq!(server.vmms(), vec![], "{point}"),
            [child] => {
                let child = server.guest(child["id"].as_str().unwrap());
                child.wait_for("Running").await;
                assert_eq!(child.output("hostname").await, "child", "{point}");
                child.delete().await;
            }
            several => panic!("{point}: {several:?}"),
        }
        all_verify(&server, point).await;
        nothing_left(&server, &before, point).await;
        let forked = server
            .client()
            .post(&path, &json!({"name": "child"}))
            .await
            .expect(201)
            .json();
        server.guest(forked["id"].as_str().unwrap()).delete().await;
    }
}

#[tokio::test]
async fn a_fork_of_a_running_guest_is_cut_at_each_step() {
    a_fork_of_a_running_guest_is_cut(&any_hypervisor()).await;
}

pub(crate) async fn a_fork_of_a_running_guest_is_cut(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"name": "origin", "hypervisor": hypervisor})).await;
    let before = paths(server.data_directory());
    let path = format!("/instances/{}/fork", guest.id);
    let body = json!({"name": "child", "from_running": true});
    let mut counted = counter(&guest).await;
    let taken = group("capture.").filter(|point| !point.contains("standby"));
    for point in taken.chain(group("fork.")) {
        cut(&mut server, point, async |client| {
            post(client, path.clone(), body.clone()).await;
        })
        .await;
        let listed = server.client().get("/instances").await.expect(200).json();
        for child in listed.as_array().unwrap() {
            let child = server.guest(child["id"].as_str().unwrap());
            if child.id != guest.id {
                child.wait_for("Running").await;
                assert_eq!(child.output("hostname").await, "child", "{point}");
                child.delete().await;
            }
        }
        counted = goes_on(&server, &guest, counted, point).await;
        assert_eq!(stored(&server).await, Vec::<String>::new(), "{point}");
        nothing_left(&server, &before, point).await;
    }
}

/// A compressed snapshot of a guest that is gone: nothing but equal frames joins it with another one.
async fn compressed(server: &Server, name: &str) -> String {
    let guest = counting(server, json!({"name": name})).await;
    let body = json!({"kind": "Standby", "compression": {"enabled": true, "algorithm": "zstd", "level": 1}});
    let id = take(server, &guest, body).await;
    eventually("it is compressed", || async {
        let shown = server.client().get(&format!("/snapshots/{id}")).await;
        shown.expect(200).json()["compression_state"] == "compressed"
    })
    .await;
    guest.delete().await;
    id
}

#[tokio::test]
async fn cutting_down_what_others_have_frames_of_is_cut_at_each_step() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    server.busybox().await;
    for point in ["memory.sweep.reduced", "memory.sweep.cut"] {
        let before = paths(server.data_directory());
        let first = compressed(&server, "first").await;
        let second = compressed(&server, "second").await;
        cut(&mut server, point, async |client| {
            let path = format!("/snapshots/{first}");
            client
                .try_send(client.request(reqwest::Method::DELETE, &path))
                .await;
        })
        .await;
        assert_eq!(stored(&server).await, std::slice::from_ref(&second), "{point}");
        all_verify(&server, point).await;
        let fork = format!("/snapshots/{second}/fork");
        let forked = server.client().post(&fork, &json!({"name": "child"})).await;
        let child = server.guest(forked.expect(201).json()["id"].as_str().unwrap());
        assert!(counter(&child).await > 0);
        child.delete().await;
        delete_all(&server).await;
        nothing_left(&server, &before, point).await;
    }
}

#[tokio::test]
async fn import_is_cut_at_each_step() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"name": "origin"})).await;
    let counted = counter(&guest).await;
    let id = take(&server, &guest, json!({"kind": "Standby"})).await;
    let path = format!("/snapshots/{id}/export");
    let file = server.client().get(&path).await.expect(200).body;
    guest.delete().await;
    delete_all(&server).await;
    let image = format!(
        "/images/{}",
        encode(&format!("{}/stories/busybox:1", server.host()))
    );
    server.client().delete(&image).await.expect(204);
    eventually("nothing of it is here", || async {
        ["memory", "snapshots"].into_iter().all(|directory| {
            let entries = std::fs::read_dir(server.data_directory().join(directory));
            entries.unwrap().count() == 0
        })
    })
    .await;
    let before = paths(server.data_directory());
    let memory = group("memory.").filter(|point| point.contains("capture"));
    for point in group("import.").chain(memory).chain(["snapshot.committed"]) {
        cut(&mut server, point, async |client| {
            let request = client
                .request(reqwest::Method::POST, "/snapshots/import")
                .body(file.clone());
            client.try_send(request).await;
        })
        .await;
        let listed = stored(&server).await;
        assert_eq!(
            listed.len(),
            usize::from(point == "snapshot.committed"),
            "{point}"
        );
        if let [id] = listed.as_slice() {
            all_verify(&server, point).await;
            let path = format!("/snapshots/{id}/fork");
            let forked = server
                .client()
                .post(&path, &json!({"name": "child"}))
                .await
                .expect(201)
                .json();
            let child = server.guest(forked["id"].as_str().unwrap());
            goes_on(&server, &child, counted, point).await;
            child.delete().await;
        }
        delete_all(&server).await;
        nothing_left(&server, &before, point).await;
    }
}

#[tokio::test]
async fn compression_is_cut_at_each_step_and_goes_on() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"name": "origin"})).await;
    let path = format!("/instances/{}/snapshots", guest.id);
    let memory = group("memory.").filter(|point| point.contains("compress") || point.contains("raw"));
    for point in group("compress.").chain(memory) {
        cut(&mut server, point, async |client| {
            let body = json!({"kind": "Standby", "compression": {"enabled": true}});
            post(client, path.clone(), body).await;
        })
        .await;
        let listed = stored(&server).await;
        assert_eq!(
            listed.len(),
            1,
            "{point}: the client was told, or the row was there before the job"
        );
        eventually("the compression is carried on", || async {
            let shown = server
                .client()
                .get(&format!("/snapshots/{}", listed[0]))
                .await
                .expect(200)
                .json();
            shown["compression_state"] == "compressed"
        })
        .await;
        // What the frames replace is not kept for ever, whatever was cut.
        eventually("the raw form is gone", || async {
            !memory_files(&server).iter().any(|name| name == "memory.raw")
        })
        .await;
        all_verify(&server, point).await;
        goes_on(&server, &guest, 0, point).await;
        delete_all(&server).await;
    }
    guest.delete().await;
}

/// Names of the files of all memory images.
fn memory_files(server: &Server) -> Vec<String> {
    let images = std::fs::read_dir(server.data_directory().join("memory")).unwrap();
    let files = images
        .flatten()
        .filter_map(|image| std::fs::read_dir(image.path()).ok())
        .flat_map(|files| files.flatten());
    files
        .filter_map(|file| file.file_name().into_string().ok())
        .collect()
}

#[tokio::test]
async fn a_scheduled_run_is_cut_at_each_step_and_neither_lost_nor_doubled() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"name": "origin"})).await;
    let path = format!("/instances/{}/snapshot-schedule", guest.id);
    let clock = tempfile::NamedTempFile::new().unwrap();
    let body = json!({"interval": "1h", "retention": {"max_count": 9}});
    let client = server.client().clone();
    client
        .send(client.request(reqwest::Method::PUT, &path).json(&body))
        .await
        .expect(200);
    for (run, point) in group("schedule.").enumerate() {
        let turned = ("HYPEMAN_CLOCK".to_owned(), clock.path().display().to_string());
        server.kill();
        server
            .start_again_with(vec![
                ("HYPEMAN_FAULT".to_owned(), point.to_owned()),
                turned.clone(),
            ])
            .await;
        turn(clock.path(), (run as u64 + 1) * 4_500);
        server.ended().await;
        server.start_again_with(vec![turned]).await;
        eventually("the run that was cut is over", || async {
            let shown = server.client().get(&path).await.expect(200).json();
            let made = stored(&server).await;
            made.len() > run && shown["last_snapshot_id"] == made[0]
        })
        .await;
        goes_on(&server, &guest, 0, point).await;
        all_verify(&server, point).await;
        let made = stored(&server).await;
        assert_eq!(made.len(), run + 1, "{point}: a run was lost or doubled");
    }
    guest.delete().await;
}
