//! Memory is compressed behind everybody's back: when it was asked for, as it was asked for, and whatever comes between.

use std::path::PathBuf;

use hypeman_tests::{Clock, Guest, Server, ServerOptions, Snapshot, eventually, have, skip_unless};
use serde_json::{Value, json};

/// How many memory images have a file of this name.
fn with(server: &Server, name: &str) -> usize {
    let images = std::fs::read_dir(server.data_directory().join("memory")).unwrap();
    images
        .flatten()
        .filter(|image| image.path().join(name).exists())
        .count()
}

async fn state(snapshot: &Snapshot) -> Value {
    snapshot.inspect().await["compression_state"].clone()
}

async fn to_be_compressed(guest: &Guest) -> Snapshot {
    guest
        .take(json!({"kind": "Standby", "compression": {"enabled": true}}))
        .await
}

/// A server that waits at a step until the file is removed.
async fn held(step: &str, server: &mut Server, directory: &tempfile::TempDir) -> PathBuf {
    let file = directory.path().join("hold");
    std::fs::write(&file, "").unwrap();
    assert!(server.terminate());
    let hold = ("HYPEMAN_HOLD".to_owned(), format!("{step} {}", file.display()));
    server.start_again_with(vec![hold]).await;
    file
}

#[tokio::test]
async fn a_compressed_snapshot_is_restored_straight_from_its_frames() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({"name": "origin"})).await;
    guest
        .output("head -c 20000000 /dev/urandom > /dev/shm/random; sha256sum /dev/shm/random > /dev/shm/sum")
        .await;
    for compression in [
        json!({"enabled": true}),
        json!({"enabled": true, "algorithm": "zstd", "level": 19}),
        json!({"enabled": true, "algorithm": "lz4"}),
        json!({"enabled": true, "algorithm": "lz4", "level": 9}),
    ] {
        let body = json!({"kind": "Standby", "compression": compression});
        let snapshot = guest.take(body).await;
        let compressed = snapshot.compressed().await;
        let (small, large) = (
            compressed["compressed_size_bytes"].as_u64().unwrap(),
            compressed["uncompressed_size_bytes"].as_u64().unwrap(),
        );
        assert!(small < large, "{compressed}");
        snapshot.is_intact().await;
        let usage = snapshot.usage().await;
        assert!(usage["own_bytes"].as_u64().unwrap() > 0, "{usage}");
        let child = snapshot.fork(json!({"name": "child"})).await;
        child.output("sha256sum -c /dev/shm/sum").await;
        child.goes_on(0).await;
        snapshot.delete().await;
        child.goes_on(0).await;
        child.delete().await;
    }
    for wrong in [
        json!({"enabled": true, "algorithm": "zstd", "level": 20}),
        json!({"enabled": true, "algorithm": "lz4", "level": 10}),
    ] {
        let body = json!({"kind": "Standby", "compression": wrong});
        guest.post("/snapshots", &body).await.expect(400);
    }
    let standby = json!({"compression": {"enabled": true, "algorithm": "lz4"}, "compression_delay": "0s"});
    guest.post("/standby", &standby).await.expect(200);
    guest.restore().await;
    guest.output("sha256sum -c /dev/shm/sum").await;
    guest
        .post("/standby", &json!({"compression_delay": "soon"}))
        .await
        .refused(400, "invalid_compression_delay");
}

#[tokio::test]
async fn memory_in_standby_is_compressed_after_its_delay_also_by_the_next_server() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let clock = Clock::new();
    let mut server = Server::start_by(&clock).await;
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({})).await;
    let standby = json!({"compression": {"enabled": true, "algorithm": "lz4"}, "compression_delay": "1h"});
    for dies in [false, true] {
        clock.turn(0);
        guest.post("/standby", &standby).await.expect(200);
        assert_eq!(with(&server, "memory.raw"), 1, "not before its time");
        if dies {
            server.kill();
        }
        clock.turn(3_660);
        if dies {
            server.start_again_with(vec![clock.variable()]).await;
        }
        eventually("only frames are left", || async {
            with(&server, "frames.index") > 0 && with(&server, "memory.raw") == 0
        })
        .await;
        guest.restore().await;
        guest.goes_on(1).await;
    }
    guest.delete().await;
}

#[tokio::test]
async fn a_guest_that_wakes_up_before_is_not_compressed_any_more() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let clock = Clock::new();
    let server = Server::start_by(&clock).await;
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({})).await;
    let standby = json!({"compression": {"enabled": true}, "compression_delay": "1h"});
    guest.post("/standby", &standby).await.expect(200);
    guest.restore().await;
    clock.turn(7_200);
    // One image is compressed at a time: when the second is done, the one in question has had its turn.
    for number in 1..=2 {
        to_be_compressed(&guest).await.compressed().await;
        assert_eq!(
            with(&server, "frames.index"),
            number,
            "what the machine maps is left alone"
        );
    }
    guest.goes_on(1).await;
}

#[tokio::test]
async fn the_servers_choice_holds_where_nobody_says_otherwise() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start_with(ServerOptions {
        settings: vec![
            ("snapshot.compression_default.enabled", json!(true)),
            ("snapshot.compression_default.algorithm", json!("lz4")),
        ],
        ..ServerOptions::default()
    })
    .await;
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({})).await;
    let shown = guest.capture().await.compressed().await;
    assert_eq!(
        shown["compression"],
        json!({"enabled": true, "algorithm": "lz4", "level": 0})
    );
    let plain = json!({"kind": "Standby", "compression": {"enabled": false}});
    let plain = guest.take(plain).await;
    assert_eq!(state(&plain).await, "none");
}

#[tokio::test]
async fn nobody_waits_for_a_compression_that_runs_and_its_work_is_not_lost() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({"name": "origin"})).await;
    let hold = held("memory.compress.written", &mut server, &directory).await;
    let snapshot = to_be_compressed(&guest).await;
    let memory = server.data_directory().join("memory");
    eventually("it is being compressed", || async {
        let entries = std::fs::read_dir(&memory).unwrap().flatten();
        entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .any(|name| name.starts_with(".tmp-compress-"))
    })
    .await;
    let child = snapshot.fork(json!({"name": "child"})).await;
    child.goes_on(1).await;
    guest.stop().await;
    guest.go_back(&snapshot, json!({"target_state": "Running"})).await;
    guest.goes_on(1).await;
    assert_eq!(state(&snapshot).await, "compressing");
    std::fs::remove_file(hold).unwrap();
    snapshot.compressed().await;
    let framed = snapshot.fork(json!({"name": "framed"})).await;
    for guest in [&guest, &child, &framed] {
        guest.goes_on(1).await;
    }
}

#[tokio::test]
async fn a_compression_in_the_middle_of_which_the_server_ends_is_done_by_the_next() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({"name": "origin"})).await;
    let hold = held("memory.compress.begun", &mut server, &directory).await;
    let snapshot = to_be_compressed(&guest).await;
    eventually("it is being compressed", || async {
        state(&snapshot).await == "compressing"
    })
    .await;
    std::fs::remove_file(hold).unwrap();
    assert!(server.terminate(), "it ends well");
    server.start_again_with(Vec::new()).await;
    eventually("it is compressed after all", || async {
        state(&snapshot).await == "compressed" && with(&server, "memory.raw") == 0
    })
    .await;
    snapshot.is_intact().await;
    guest.goes_on(1).await;
}

#[tokio::test]
async fn a_snapshot_that_is_deleted_takes_its_compression_along() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({"name": "origin"})).await;
    let hold = held("memory.compress.begun", &mut server, &directory).await;
    let snapshot = to_be_compressed(&guest).await;
    let memory = server.data_directory().join("memory");
    let working = || std::fs::read_dir(&memory).unwrap().count() > 1;
    eventually("it is being compressed", || async { working() }).await;
    snapshot.delete().await;
    std::fs::remove_file(hold).unwrap();
    server.emptied(&["memory"]).await;
    guest.goes_on(1).await;
}
