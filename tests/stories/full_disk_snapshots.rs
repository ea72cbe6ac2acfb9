//! A disk that is full when memory is to be kept: the guest runs on, nothing half is listed, nothing is left over,
//! and what is there already can be used.

use std::collections::BTreeSet;

use hypeman_tests::{Guest, LoopDisk, Reply, Server, eventually, have, skip_unless};
use serde_json::json;

use crate::crash::paths;
use crate::full_disk::server_on;
use crate::snapshots::{counter, counting, goes_on};

const MIB: u64 = 1 << 20;

/// Room that is left, so that each of the writes of a capture is the one that fails.
const LEFT: [u64; 5] = [0, MIB, 12 * MIB, 30 * MIB, 160 * MIB];

/// A guest that counts, writes to its disk all the time, and has all of the room that it needs there.
async fn busy(server: &Server, image: &str) -> Guest {
    let guest = counting(server, image, json!({"name": "origin", "overlay_size": "64MB"})).await;
    guest
        .output("head -c 20000000 /dev/urandom > /dev/shm/random")
        .await;
    guest
        .output(
            "sh -c 'n=0; while :; do n=$((n+1)); head -c 300000 /dev/urandom > /root/load; echo $n > /root/n; sync; \
             done' >/dev/null 2>&1 </dev/null &",
        )
        .await;
    // The kernel of the guest has cleared its tables by then.
    eventually("it has written for a while", || async {
        guest.output("cat /root/n || echo 0").await.parse().unwrap_or(0) > 50
    })
    .await;
    reserve(server, &guest);
    guest
}

/// Gives the writable layer of a guest all the blocks that it may ever want.
fn reserve(server: &Server, guest: &Guest) {
    let directory = server.data_directory().join("instances").join(&guest.id);
    for entry in std::fs::read_dir(directory).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("overlay") {
            let file = std::fs::File::options().write(true).open(entry.path()).unwrap();
            let length = file.metadata().unwrap().len();
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length).unwrap();
        }
    }
}

/// It counts in its memory and on its disk.
async fn runs_on(guest: &Guest, at_least: u64) {
    // A VMM that is slow to answer on a busy host is not told to run, for that long.
    let shown = guest
        .wait_until("it runs", |shown| shown["state"] != "Unknown")
        .await;
    assert_eq!(shown["state"], "Running", "{shown}");
    goes_on(guest, at_least).await;
    let written = async || guest.output("cat /root/n").await;
    let before = written().await;
    eventually("it goes on writing", || async { written().await != before }).await;
}

/// Whether it was done; else the reason must be the disk.
#[track_caller]
fn done(what: &str, left: u64, reply: &Reply) -> bool {
    eprintln!("{what} with {left} bytes left: {} {}", reply.status, reply.text());
    if reply.status == 200 || reply.status == 201 {
        return true;
    }
    let said = reply.text();
    assert_eq!(reply.status, 409, "{what} with {left} bytes left: {said}");
    assert_eq!(reply.json()["code"], "insufficient_resources", "{said}");
    assert!(said.contains("space"), "{said}");
    false
}

/// Logs grow and verified files are remembered; all else was there before.
async fn nothing_new(server: &Server, before: &BTreeSet<String>) {
    let new = || -> Vec<String> {
        let mut after = paths(server.data_directory());
        after
            .retain(|path| !before.contains(path) && !path.contains("/logs/") && !path.ends_with("verified"));
        after.into_iter().collect()
    };
    eventually("what nobody needs is gone", || async {
        let new = new();
        if !new.is_empty() {
            eprintln!("still there: {new:?}");
        }
        new.is_empty()
    })
    .await;
}

async fn count_of(server: &Server, list: &str) -> usize {
    let listed = server.client().get(list).await.expect(200).json();
    listed.as_array().unwrap().len()
}

#[tokio::test]
async fn a_guest_that_cannot_be_captured_runs_on() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let Some(disk) = LoopDisk::mount(512) else {
        skip_unless!(false, "needs root and a loop device");
        return;
    };
    let server = server_on(&disk).await;
    let image = server.busybox().await;
    let guest = busy(&server, &image).await;
    // Of a booted guest all memory is kept, and that is what does not fit.
    capture_with_little_room(&server, &disk, &guest).await;
    // Of a restored one only what has changed: now it is the disk.
    let path = format!("/instances/{}", guest.id);
    server
        .client()
        .post_empty(&format!("{path}/standby"))
        .await
        .expect(200);
    server
        .client()
        .post_empty(&format!("{path}/restore"))
        .await
        .expect(200);
    guest
        .output("head -c 30000000 /dev/urandom > /root/large && sync")
        .await;
    reserve(&server, &guest);
    capture_with_little_room(&server, &disk, &guest).await;
    guest.delete().await;
}

/// Captures in all ways, with more room each time.
async fn capture_with_little_room(server: &Server, disk: &LoopDisk, guest: &Guest) {
    let client = server.client();
    let path = format!("/instances/{}", guest.id);
    let mut before = paths(server.data_directory());
    let (mut refused, mut succeeded) = (0, 0);
    for left in LEFT {
        for what in ["snapshots", "fork", "standby"] {
            let counted = counter(guest).await;
            let body = match what {
                "standby" => json!({}),
                "snapshots" => json!({"kind": "Standby", "name": "cramped"}),
                _ => json!({"name": "child", "from_running": true}),
            };
            let filler = disk.fill(left);
            let reply = client.post(&format!("{path}/{what}"), &body).await;
            let done = done(what, left, &reply);
            if !done {
                refused += 1;
                runs_on(guest, counted).await;
                assert_eq!(count_of(server, "/snapshots").await, 0);
                assert_eq!(count_of(server, "/instances").await, 1);
                assert_eq!(server.vmms().len(), 1);
            }
            std::fs::remove_file(&filler).unwrap();
            if done {
                succeeded += 1;
                let id = reply.json()["id"].as_str().unwrap().to_owned();
                match what {
                    "standby" => drop(client.post_empty(&format!("{path}/restore")).await.expect(200)),
                    "snapshots" => drop(client.delete(&format!("/snapshots/{id}")).await.expect(204)),
                    _ => server.guest(&id).delete().await,
                }
            }
            runs_on(guest, counted).await;
            if what == "standby" && done {
                // What it was restored from stays under it.
                before = paths(server.data_directory());
            }
            nothing_new(server, &before).await;
        }
    }
    assert!(refused >= 6 && succeeded >= 2, "{refused} and {succeeded}");
}

/// Images of memory, raw and without a parent, take up to this much more than they hold.
const SLACK: u64 = 12 * MIB;

#[tokio::test]
async fn memory_that_cannot_be_compressed_for_want_of_space_stays_usable_and_is_compressed_later() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let Some(disk) = LoopDisk::mount(512) else {
        skip_unless!(false, "needs root and a loop device");
        return;
    };
    let server = server_on(&disk).await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({"name": "origin", "overlay_size": "16MB"})).await;
    // Compressed, this takes as much as it does raw.
    guest
        .output("head -c 30000000 /dev/urandom > /dev/shm/random && sha256sum /dev/shm/random > /dev/shm/sum")
        .await;
    let path = format!("/instances/{}/snapshots", guest.id);
    let take = async |body| client.post(&path, &body).await.expect(201).json();
    let first = take(json!({"kind": "Standby"})).await;
    client
        .delete(&format!("/snapshots/{}", first["id"].as_str().unwrap()))
        .await
        .expect(204);
    eventually("its space is back", || async {
        std::fs::read_dir(server.data_directory().join("memory"))
            .unwrap()
            .count()
            == 0
    })
    .await;
    let before = paths(server.data_directory());

    let filler = disk.fill(first["size_bytes"].as_u64().unwrap() + SLACK);
    let snapshot = take(json!({"kind": "Standby", "compression": {"enabled": true}})).await;
    let shown = format!("/snapshots/{}", snapshot["id"].as_str().unwrap());
    eventually("there is no room for it", || async {
        client.get(&shown).await.expect(200).json()["compression_state"] == "error"
    })
    .await;
    let failed = client.get(&shown).await.json();
    let reason = failed["compression_error"].as_str().unwrap();
    assert!(reason.contains("space"), "{failed}");
    assert!(failed.get("compressed_size_bytes").is_none(), "{failed}");
    assert_eq!(
        client.get("/snapshots").await.json()[0],
        failed,
        "the list tells the same"
    );
    let intact = async || {
        let verified = client
            .post_empty(&format!("{shown}/verify"))
            .await
            .expect(200)
            .json();
        assert_eq!(verified["state"], "intact", "{verified}");
        let child = client
            .post(&format!("{shown}/fork"), &json!({"name": "child"}))
            .await
            .expect(201)
            .json();
        let child = server.guest(child["id"].as_str().unwrap());
        child.output("sha256sum -c /dev/shm/sum").await;
        goes_on(&child, 0).await;
        child.delete().await;
    };
    intact().await;

    std::fs::remove_file(&filler).unwrap();
    eventually("it is compressed after all", || async {
        client.get(&shown).await.expect(200).json()["compression_state"] == "compressed"
    })
    .await;
    let compressed = client.get(&shown).await.json();
    assert!(compressed.get("compression_error").is_none(), "{compressed}");
    assert!(
        compressed["compressed_size_bytes"].as_u64().unwrap() > 30_000_000,
        "{compressed}"
    );
    intact().await;
    goes_on(&guest, 0).await;
    client.delete(&shown).await.expect(204);
    nothing_new(&server, &before).await;
    guest.delete().await;
}

#[tokio::test]
async fn what_was_kept_comes_back_from_a_full_disk_or_stays_as_it_is() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let Some(disk) = LoopDisk::mount(512) else {
        skip_unless!(false, "needs root and a loop device");
        return;
    };
    let server = server_on(&disk).await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = busy(&server, &image).await;
    let path = format!("/instances/{}", guest.id);
    let counted = counter(&guest).await;
    let snapshot = client
        .post(&format!("{path}/snapshots"), &json!({"kind": "Standby"}))
        .await
        .expect(201)
        .json();
    let shown = format!("/snapshots/{}", snapshot["id"].as_str().unwrap());
    client.post_empty(&format!("{path}/standby")).await.expect(200);
    let before = paths(server.data_directory());
    for left in [0, MIB / 4, 4 * MIB, 30 * MIB] {
        let filler = disk.fill(left);
        let reply = client
            .post(&format!("{shown}/fork"), &json!({"name": "child", "count": 2}))
            .await;
        let mut made = Vec::new();
        if done("fork", left, &reply) {
            let answer = reply.json();
            for fork in answer["forks"].as_array().unwrap() {
                match fork["instance"]["id"].as_str() {
                    Some(id) => made.push(id.to_owned()),
                    None => assert_eq!(fork["error"]["code"], "insufficient_resources", "{fork}"),
                }
            }
        }
        assert_eq!(count_of(&server, "/instances").await, 1 + made.len());
        assert_eq!(server.vmms().len(), made.len());
        let back = client
            .post(
                &format!("{path}/snapshots/{}/restore", snapshot["id"].as_str().unwrap()),
                &json!({"target_state": "Standby"}),
            )
            .await;
        if done("restore of a snapshot", left, &back) {
            reserve(&server, &guest);
        }
        assert_eq!(guest.inspect().await["state"], "Standby");
        std::fs::remove_file(&filler).unwrap();
        for id in made {
            server.guest(&id).delete().await;
        }
        if back.status == 409 {
            nothing_new(&server, &before).await;
        }
    }
    // A restore needs next to nothing.
    let filler = disk.fill(0);
    let reply = client.post_empty(&format!("{path}/restore")).await;
    if !done("restore", 0, &reply) {
        assert_eq!(guest.inspect().await["state"], "Standby");
        assert_eq!(server.vmms(), vec![]);
        std::fs::remove_file(&filler).unwrap();
        client.post_empty(&format!("{path}/restore")).await.expect(200);
    } else {
        std::fs::remove_file(&filler).unwrap();
    }
    runs_on(&guest, counted).await;
    guest.delete().await;
    client.delete(&shown).await.expect(204);
    eventually("no memory is left", || async {
        std::fs::read_dir(server.data_directory().join("memory"))
            .unwrap()
            .count()
            == 0
    })
    .await;
}
