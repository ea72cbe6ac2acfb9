//! The server dies at each step of what is done with memory, and no guest, snapshot or byte is lost or doubled.

use std::collections::BTreeSet;
use std::time::Duration;

use hypeman_tests::{
    Client, Clock, Guest, Reply, Server, Snapshot, any_hypervisor, eventually, have, skip_unless,
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::crash::{cut, group, left_nothing, paths};

/// A guest that counts; what it has counted can't be had from any disk.
async fn counting(server: &Server, overrides: Value) -> Guest {
    let image = server.busybox().await;
    server.counting(&image, overrides).await
}

/// Whatever was cut: the guest is where it was or where it should be, and has forgotten nothing. How far it has counted.
async fn goes_on(server: &Server, guest: &Guest, after: u64, point: &str) -> u64 {
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
        guest.restore().await;
        guest.wait_for("Running").await;
    }
    let now = guest.goes_on(after).await;
    assert_eq!(server.vmms().len(), 1, "{point}");
    now
}

/// Asks for something that the server's death may cut. A guest that it has just taken back may not be up yet.
pub(crate) async fn post(client: Client, path: String, body: Value) {
    let refused = |reply: Option<Reply>| reply.is_some_and(|reply| reply.status == 409);
    while refused(client.try_post(&path, &body).await) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Asks for the end of a snapshot, which the server's death may cut.
async fn delete(client: Client, snapshot: &Snapshot) {
    client.try_delete(&snapshot.path("")).await;
}

/// What is listed is whole.
async fn all_verify(server: &Server) {
    for snapshot in server.snapshots().await {
        snapshot.is_intact().await;
    }
}

async fn delete_all(server: &Server) {
    for snapshot in server.snapshots().await {
        snapshot.delete().await;
    }
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
    let path = guest.path("/standby");
    let points = group("standby.").chain(group("memory.").filter(|point| point.contains("capture")));
    let mut counted = guest.count().await;
    for point in points {
        cut(&mut server, point, async |client| {
            post(client, path.clone(), json!({})).await
        })
        .await;
        counted = goes_on(&server, &guest, counted, point).await;
    }
    guest.delete().await;
    server.emptied(&["memory"]).await;
}

#[tokio::test]
async fn restore_is_cut_at_each_step() {
    restore_is_cut(&any_hypervisor()).await;
}

pub(crate) async fn restore_is_cut(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let guest = counting(&server, json!({"hypervisor": hypervisor})).await;
    let mut counted = guest.count().await;
    for point in group("restore.") {
        guest.standby().await;
        cut(&mut server, point, async |client| {
            post(client, guest.path("/restore"), json!({})).await;
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
    let path = guest.path("/snapshots");
    let memory = group("memory.").filter(|point| point.contains("capture"));
    let mut counted = guest.count().await;
    for point in group("capture.").chain(group("snapshot.")).chain(memory) {
        cut(&mut server, point, async |client| {
            post(client, path.clone(), json!({"kind": "Standby"})).await;
        })
        .await;
        counted = goes_on(&server, &guest, counted, point).await;
        all_verify(&server).await;
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
        let snapshot = guest.capture().await;
        cut(&mut server, point, async |client| delete(client, &snapshot).await).await;
        all_verify(&server).await;
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
    let counted = guest.count().await;
    let snapshot = guest.capture().await;
    let path = guest.path(&format!("/snapshots/{}/restore", snapshot.id));
    for point in group("rewind.") {
        guest.standby().await;
        cut(&mut server, point, async |client| {
            post(client, path.clone(), json!({})).await;
        })
        .await;
        goes_on(&server, &guest, counted, point).await;
        all_verify(&server).await;
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
    let snapshot = guest.capture().await;
    guest.delete().await;
    let before = paths(server.data_directory());
    let path = snapshot.path("/fork");
    let wake = group("restore.").filter(|point| *point != "restore.recorded");
    for point in group("fork.").chain(wake) {
        cut(&mut server, point, async |client| {
            post(client, path.clone(), json!({"name": "child"})).await;
        })
        .await;
        match server.guests().await.as_slice() {
            [] => assert_eq!(server.vmms(), vec![], "{point}"),
            [child] => {
                child.wait_for("Running").await;
                assert_eq!(child.output("hostname").await, "child", "{point}");
                child.delete().await;
            }
            several => panic!("{point}: {several:?}"),
        }
        all_verify(&server).await;
        nothing_left(&server, &before, point).await;
        snapshot.fork(json!({"name": "child"})).await.delete().await;
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
    let path = guest.path("/fork");
    let body = json!({"name": "child", "from_running": true});
    let taken = group("capture.").filter(|point| !point.contains("standby"));
    let mut counted = guest.count().await;
    for point in taken.chain(group("fork.")) {
        cut(&mut server, point, async |client| {
            post(client, path.clone(), body.clone()).await;
        })
        .await;
        for child in server.guests().await {
            if child.id != guest.id {
                child.wait_for("Running").await;
                assert_eq!(child.output("hostname").await, "child", "{point}");
                child.delete().await;
            }
        }
        counted = goes_on(&server, &guest, counted, point).await;
        assert_eq!(server.listed("/snapshots").await, Vec::<String>::new(), "{point}");
        nothing_left(&server, &before, point).await;
    }
}

/// A compressed snapshot of a guest that is gone: nothing but equal frames joins it with another one.
async fn compressed(server: &Server, name: &str) -> Snapshot {
    let guest = counting(server, json!({"name": name})).await;
    let body = json!({"kind": "Standby", "compression": {"enabled": true, "algorithm": "zstd", "level": 1}});
    let snapshot = guest.take(body).await;
    snapshot.compressed().await;
    guest.delete().await;
    snapshot
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
        cut(&mut server, point, async |client| delete(client, &first).await).await;
        let left = server.listed("/snapshots").await;
        assert_eq!(left, std::slice::from_ref(&second.id), "{point}");
        all_verify(&server).await;
        let child = second.fork(json!({"name": "child"})).await;
        assert!(child.count().await > 0);
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
    let counted = guest.count().await;
    let snapshot = guest.capture().await;
    let exported = server.client().get(&snapshot.path("/export")).await;
    let file = exported.expect(200).body;
    guest.delete().await;
    delete_all(&server).await;
    let image = format!("{}/stories/busybox:1", server.host());
    server.delete_image(&image).await;
    server.emptied(&["memory", "snapshots"]).await;
    let before = paths(server.data_directory());
    let memory = group("memory.").filter(|point| point.contains("capture"));
    for point in group("import.").chain(memory).chain(["snapshot.committed"]) {
        cut(&mut server, point, async |client| {
            let request = client
                .request(Method::POST, "/snapshots/import")
                .body(file.clone());
            client.try_send(request).await;
        })
        .await;
        let listed = server.snapshots().await;
        assert_eq!(
            listed.len(),
            usize::from(point == "snapshot.committed"),
            "{point}"
        );
        if let [snapshot] = listed.as_slice() {
            all_verify(&server).await;
            let child = snapshot.fork(json!({"name": "child"})).await;
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
    let path = guest.path("/snapshots");
    let memory = group("memory.").filter(|point| point.contains("compress") || point.contains("raw"));
    for point in group("compress.").chain(memory) {
        cut(&mut server, point, async |client| {
            let body = json!({"kind": "Standby", "compression": {"enabled": true}});
            post(client, path.clone(), body).await;
        })
        .await;
        let listed = server.snapshots().await;
        assert_eq!(
            listed.len(),
            1,
            "{point}: the client was told, or the row was there before the job"
        );
        // The compression is carried on.
        listed[0].compressed().await;
        // What the frames replace is not kept for ever, whatever was cut.
        eventually("the raw form is gone", || async {
            !memory_files(&server).iter().any(|name| name == "memory.raw")
        })
        .await;
        all_verify(&server).await;
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
    let path = guest.path("/snapshot-schedule");
    let clock = Clock::new();
    let body = json!({"interval": "1h", "retention": {"max_count": 9}});
    let client = server.client().clone();
    client
        .send(client.request(Method::PUT, &path).json(&body))
        .await
        .expect(200);
    for (run, point) in group("schedule.").enumerate() {
        server.kill();
        let fault = ("HYPEMAN_FAULT".to_owned(), point.to_owned());
        server.start_again_with(vec![fault, clock.variable()]).await;
        clock.turn((run as u64 + 1) * 4_500);
        server.ended().await;
        server.start_again_with(vec![clock.variable()]).await;
        eventually("the run that was cut is over", || async {
            let shown = server.client().get(&path).await.expect(200).json();
            let made = server.listed("/snapshots").await;
            made.len() > run && shown["last_snapshot_id"] == made[0]
        })
        .await;
        goes_on(&server, &guest, 0, point).await;
        all_verify(&server).await;
        let made = server.listed("/snapshots").await;
        assert_eq!(made.len(), run + 1, "{point}: a run was lost or doubled");
    }
    guest.delete().await;
}
