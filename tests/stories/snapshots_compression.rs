//! Memory is compressed behind everybody's back: when it was asked for, as it was asked for, and whatever comes between.

use std::path::PathBuf;

use hypeman_tests::{Client, Server, ServerOptions, eventually, have, skip_unless};
use serde_json::{Value, json};

use crate::snapshots::{counting, goes_on};

/// How many memory images have a file of this name.
fn with(server: &Server, name: &str) -> usize {
    let images = std::fs::read_dir(server.data_directory().join("memory")).unwrap();
    images
        .flatten()
        .filter(|image| image.path().join(name).exists())
        .count()
}

async fn state(client: &Client, id: &str) -> String {
    let shown = client.get(&format!("/snapshots/{id}")).await.expect(200).json();
    shown["compression_state"].as_str().unwrap().to_owned()
}

async fn snapshot(client: &Client, instance: &str, compression: Option<Value>) -> String {
    let mut body = json!({"kind": "Standby"});
    if let Some(compression) = compression {
        body["compression"] = compression;
    }
    let made = client
        .post(&format!("/instances/{instance}/snapshots"), &body)
        .await
        .expect(201)
        .json();
    made["id"].as_str().unwrap().to_owned()
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
async fn memory_in_standby_is_compressed_after_its_delay_also_by_the_next_server() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let clock = tempfile::NamedTempFile::new().unwrap();
    let turned = || vec![("HYPEMAN_CLOCK".to_owned(), clock.path().display().to_string())];
    let mut server = Server::start().await;
    assert!(server.terminate());
    server.start_again_with(turned()).await;
    let client = server.client().clone();
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({})).await;
    let path = format!("/instances/{}", guest.id);
    let standby = json!({"compression": {"enabled": true, "algorithm": "lz4"}, "compression_delay": "1h"});
    for dies in [false, true] {
        std::fs::write(clock.path(), "0").unwrap();
        client
            .post(&format!("{path}/standby"), &standby)
            .await
            .expect(200);
        assert_eq!(with(&server, "memory.raw"), 1, "not before its time");
        if dies {
            server.kill();
        }
        std::fs::write(clock.path(), "3660").unwrap();
        if dies {
            server.start_again_with(turned()).await;
        }
        eventually("only frames are left", || async {
            with(&server, "frames.index") > 0 && with(&server, "memory.raw") == 0
        })
        .await;
        client.post_empty(&format!("{path}/restore")).await.expect(200);
        goes_on(&guest, 1).await;
    }
    guest.delete().await;
}

#[tokio::test]
async fn a_guest_that_wakes_up_before_is_not_compressed_any_more() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let clock = tempfile::NamedTempFile::new().unwrap();
    let mut server = Server::start().await;
    assert!(server.terminate());
    let turned = ("HYPEMAN_CLOCK".to_owned(), clock.path().display().to_string());
    server.start_again_with(vec![turned]).await;
    let client = server.client().clone();
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({})).await;
    let path = format!("/instances/{}", guest.id);
    let standby = json!({"compression": {"enabled": true}, "compression_delay": "1h"});
    client
        .post(&format!("{path}/standby"), &standby)
        .await
        .expect(200);
    client.post_empty(&format!("{path}/restore")).await.expect(200);
    std::fs::write(clock.path(), "7200").unwrap();
    // One image is compressed at a time: when the second is done, the one in question has had its turn.
    for number in 1..=2 {
        let id = snapshot(&client, &guest.id, Some(json!({"enabled": true}))).await;
        eventually("the snapshot is compressed", || async {
            state(&client, &id).await == "compressed"
        })
        .await;
        assert_eq!(
            with(&server, "frames.index"),
            number,
            "what the machine maps is left alone"
        );
    }
    goes_on(&guest, 1).await;
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
    let client = server.client();
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({})).await;
    let id = snapshot(client, &guest.id, None).await;
    eventually("it is compressed", || async {
        state(client, &id).await == "compressed"
    })
    .await;
    let shown = client.get(&format!("/snapshots/{id}")).await.json();
    assert_eq!(
        shown["compression"],
        json!({"enabled": true, "algorithm": "lz4", "level": 0})
    );
    let plain = snapshot(client, &guest.id, Some(json!({"enabled": false}))).await;
    assert_eq!(state(client, &plain).await, "none");
}

#[tokio::test]
async fn nobody_waits_for_a_compression_that_runs_and_its_work_is_not_lost() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({"name": "origin"})).await;
    let hold = held("memory.compress.written", &mut server, &directory).await;
    let client = server.client().clone();
    let id = snapshot(&client, &guest.id, Some(json!({"enabled": true}))).await;
    let memory = server.data_directory().join("memory");
    eventually("it is being compressed", || async {
        let entries = std::fs::read_dir(&memory).unwrap().flatten();
        entries
            .map(|entry| entry.file_name().into_string().unwrap())
            .any(|name| name.starts_with(".tmp-compress-"))
    })
    .await;
    let fork = json!({"name": "child"});
    let child = client.post(&format!("/snapshots/{id}/fork"), &fork).await;
    let child = server.guest(child.expect(201).json()["id"].as_str().unwrap());
    goes_on(&child, 1).await;
    guest.stop().await;
    let restore = json!({"target_state": "Running"});
    client
        .post(
            &format!("/instances/{}/snapshots/{id}/restore", guest.id),
            &restore,
        )
        .await
        .expect(200);
    goes_on(&guest, 1).await;
    assert_eq!(state(&client, &id).await, "compressing");
    std::fs::remove_file(hold).unwrap();
    eventually("it is compressed", || async {
        state(&client, &id).await == "compressed"
    })
    .await;
    let fork = json!({"name": "framed"});
    let framed = client.post(&format!("/snapshots/{id}/fork"), &fork).await;
    let framed = server.guest(framed.expect(201).json()["id"].as_str().unwrap());
    for guest in [&guest, &child, &framed] {
        goes_on(guest, 1).await;
    }
}

#[tokio::test]
async fn a_compression_in_the_middle_of_which_the_server_ends_is_done_by_the_next() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({"name": "origin"})).await;
    let hold = held("memory.compress.begun", &mut server, &directory).await;
    let client = server.client().clone();
    let id = snapshot(&client, &guest.id, Some(json!({"enabled": true}))).await;
    eventually("it is being compressed", || async {
        state(&client, &id).await == "compressing"
    })
    .await;
    std::fs::remove_file(hold).unwrap();
    assert!(server.terminate(), "it ends well");
    server.start_again_with(Vec::new()).await;
    eventually("it is compressed after all", || async {
        state(&client, &id).await == "compressed" && with(&server, "memory.raw") == 0
    })
    .await;
    let verified = client.post_empty(&format!("/snapshots/{id}/verify")).await;
    assert_eq!(verified.expect(200).json()["state"], "intact");
    goes_on(&guest, 1).await;
}

#[tokio::test]
async fn a_snapshot_that_is_deleted_takes_its_compression_along() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let directory = tempfile::tempdir().unwrap();
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({"name": "origin"})).await;
    let hold = held("memory.compress.begun", &mut server, &directory).await;
    let client = server.client().clone();
    let id = snapshot(&client, &guest.id, Some(json!({"enabled": true}))).await;
    let memory = server.data_directory().join("memory");
    let working = || std::fs::read_dir(&memory).unwrap().count() > 1;
    eventually("it is being compressed", || async { working() }).await;
    client.delete(&format!("/snapshots/{id}")).await.expect(204);
    std::fs::remove_file(hold).unwrap();
    eventually("nothing of it is left", || async {
        std::fs::read_dir(&memory).unwrap().count() == 0
    })
    .await;
    goes_on(&guest, 1).await;
}
