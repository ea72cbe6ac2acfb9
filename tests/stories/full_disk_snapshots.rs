//! A disk that is full when memory is to be kept: the guest runs on, nothing half is listed, nothing is left over,
//! and what is there already can be used.

use std::collections::BTreeSet;

use hypeman_tests::{Guest, LoopDisk, Reply, Server, eventually, have, or_skip, skip_unless};
use serde_json::json;

use crate::crash::paths;
use crate::full_disk::server_on;

const MIB: u64 = 1 << 20;

/// Room that is left, so that each of the writes of a capture is the one that fails.
const LEFT: [u64; 5] = [0, MIB, 12 * MIB, 30 * MIB, 160 * MIB];

/// A guest that counts, writes to its disk all the time, and has all of the room that it needs there.
async fn busy(server: &Server, image: &str) -> Guest {
    let overrides = json!({"name": "origin", "overlay_size": "64MB"});
    let guest = server.counting(image, overrides).await;
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
    guest.goes_on(at_least).await;
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
    server.listed(list).await.len()
}

#[tokio::test]
async fn a_guest_that_cannot_be_captured_runs_on() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let disk = or_skip!(LoopDisk::mount(512), "needs root and a loop device");
    let server = server_on(&disk).await;
    let image = server.busybox().await;
    let guest = busy(&server, &image).await;
    // Of a booted guest all memory is kept, and that is what does not fit.
    capture_with_little_room(&server, &disk, &guest).await;
    // Of a restored one only what has changed: now it is the disk.
    guest.standby().await;
    guest.restore().await;
    guest
        .output("head -c 30000000 /dev/urandom > /root/large && sync")
        .await;
    reserve(&server, &guest);
    capture_with_little_room(&server, &disk, &guest).await;
    guest.delete().await;
}

/// Captures in all ways, with more room each time.
async fn capture_with_little_room(server: &Server, disk: &LoopDisk, guest: &Guest) {
    let mut before = paths(server.data_directory());
    let (mut refused, mut succeeded) = (0, 0);
    for left in LEFT {
        for what in ["snapshots", "fork", "standby"] {
            let counted = guest.count().await;
            let body = match what {
                "standby" => json!({}),
                "snapshots" => json!({"kind": "Standby", "name": "cramped"}),
                _ => json!({"name": "child", "from_running": true}),
            };
            let filler = disk.fill(left);
            let reply = guest.post(&format!("/{what}"), &body).await;
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
                    "standby" => drop(guest.restore().await),
                    "snapshots" => server.snapshot(&id).delete().await,
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
    let disk = or_skip!(LoopDisk::mount(512), "needs root and a loop device");
    let server = server_on(&disk).await;
    let client = server.client();
    let image = server.busybox().await;
    let overrides = json!({"name": "origin", "overlay_size": "16MB"});
    let guest = server.counting(&image, overrides).await;
    // Compressed, this takes as much as it does raw.
    guest
        .output("head -c 30000000 /dev/urandom > /dev/shm/random && sha256sum /dev/shm/random > /dev/shm/sum")
        .await;
    let first = guest.capture().await;
    let size = first.inspect().await["size_bytes"].as_u64().unwrap();
    first.delete().await;
    // Its space is back.
    server.emptied(&["memory"]).await;
    let before = paths(server.data_directory());

    let filler = disk.fill(size + SLACK);
    let body = json!({"kind": "Standby", "compression": {"enabled": true}});
    let snapshot = guest.take(body).await;
    eventually("there is no room for it", || async {
        snapshot.inspect().await["compression_state"] == "error"
    })
    .await;
    let failed = snapshot.inspect().await;
    let reason = failed["compression_error"].as_str().unwrap();
    assert!(reason.contains("space"), "{failed}");
    assert!(failed.get("compressed_size_bytes").is_none(), "{failed}");
    assert_eq!(
        client.get("/snapshots").await.json()[0],
        failed,
        "the list tells the same"
    );
    let intact = async || {
        snapshot.is_intact().await;
        let child = snapshot.fork(json!({"name": "child"})).await;
        child.output("sha256sum -c /dev/shm/sum").await;
        child.goes_on(0).await;
        child.delete().await;
    };
    intact().await;

    std::fs::remove_file(&filler).unwrap();
    let compressed = snapshot.compressed().await;
    assert!(compressed.get("compression_error").is_none(), "{compressed}");
    assert!(
        compressed["compressed_size_bytes"].as_u64().unwrap() > 30_000_000,
        "{compressed}"
    );
    intact().await;
    guest.goes_on(0).await;
    snapshot.delete().await;
    nothing_new(&server, &before).await;
    guest.delete().await;
}

#[tokio::test]
async fn what_was_kept_comes_back_from_a_full_disk_or_stays_as_it_is() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let disk = or_skip!(LoopDisk::mount(512), "needs root and a loop device");
    let server = server_on(&disk).await;
    let image = server.busybox().await;
    let guest = busy(&server, &image).await;
    let counted = guest.count().await;
    let snapshot = guest.capture().await;
    guest.standby().await;
    let before = paths(server.data_directory());
    for left in [0, MIB / 4, 4 * MIB, 30 * MIB] {
        let filler = disk.fill(left);
        let reply = snapshot.try_fork(&json!({"name": "child", "count": 2})).await;
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
        let back = guest
            .try_go_back(&snapshot, &json!({"target_state": "Standby"}))
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
    let reply = guest.post_empty("/restore").await;
    if !done("restore", 0, &reply) {
        assert_eq!(guest.inspect().await["state"], "Standby");
        assert_eq!(server.vmms(), vec![]);
        std::fs::remove_file(&filler).unwrap();
        guest.restore().await;
    } else {
        std::fs::remove_file(&filler).unwrap();
    }
    runs_on(&guest, counted).await;
    guest.delete().await;
    snapshot.delete().await;
    server.emptied(&["memory"]).await;
}
