//! The whole contract on each hypervisor that the host offers, told once.
//!
//! On some hosts a command in a guest takes seconds and a boot the better part of a minute, so a life is told with few of
//! both: the program of the image counts by itself, and one look asks for all that a guest should still know.

use futures::future::join_all;
use hypeman_tests::{COUNTS_ON, Guest, LoopDisk, Server, eventually, have, offers, or_skip, skip_unless};
use serde_json::json;

use crate::crash_snapshots as cut;
use crate::full_disk::server_on;
use crate::snapshots_travel::import_bytes;

/// Counts in memory for ever.
const PROGRAM: &str = "echo counting; n=0; while :; do n=$((n+1)); echo $n > /dev/shm/count; sleep 0.1; done";
const KINDS: [&str; 4] = ["qemu", "qemu-microvm", "cloud-hypervisor", "firecracker"];

/// What a guest knows: how far it has counted, what is on its disk, and its name. By the shell alone: some hosts' KVM
/// now and then loses registers of programs where there are more vCPUs than processors.
async fn look(guest: &Guest) -> (u64, String, String) {
    let text = guest
        .output(&format!(
            "{COUNTS_ON}; read note < /root/note; read name < /proc/sys/kernel/hostname; echo $note; echo $name"
        ))
        .await;
    let lines: Vec<&str> = text.lines().collect();
    let [count, note, name] = lines[..] else {
        panic!("three lines instead of {text:?}");
    };
    let count = count
        .parse()
        .unwrap_or_else(|_| panic!("a number instead of {text:?}"));
    (count, note.to_owned(), name.to_owned())
}

/// It goes on where it was, with its disk, under its name.
async fn goes_on(guest: &Guest, after: u64, name: &str) -> u64 {
    let (count, note, hostname) = look(guest).await;
    assert!(count > after, "{count} after {after}");
    assert_eq!((note.as_str(), hostname.as_str()), ("before", name));
    count
}

/// A guest that counts, with a note on its disk.
async fn noted(server: &Server, hypervisor: &str) -> Guest {
    let image = server.busybox().await;
    let guest = server
        .run(
            &image,
            json!({"name": "origin", "hypervisor": hypervisor, "cmd": ["sh", "-c", PROGRAM]}),
        )
        .await;
    guest.copy_in("/root/note", b"before\n", json!({})).await;
    guest
}

async fn the_whole_contract(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let guest = noted(&server, hypervisor).await;

    // Logs, copies both ways, a command.
    guest.logs("follow=true").await.wait_for("counting").await;
    let copied = guest.copy_out("/root/note", false).await.unwrap();
    assert_eq!(copied[0].bytes, b"before\n");
    let first = goes_on(&guest, 0, "origin").await;

    // A snapshot of the running guest, which goes on; then standby, and back.
    let snapshot = guest.capture().await;
    assert_eq!(guest.inspect().await["state"], "Running");
    assert_eq!(snapshot.inspect().await["source_hypervisor"], hypervisor);
    let asleep = guest.standby().await;
    assert_eq!(asleep["state"], "Standby", "{asleep}");
    eventually("its machine ends", || async { server.vmms().is_empty() }).await;
    let awake = guest.restore().await;
    assert_eq!(awake["state"], "Running", "{awake}");
    let later = goes_on(&guest, first, "origin").await;

    // Forks of the snapshot, each under a name of its own.
    let fork = json!({"name": "child", "count": 2, "target_state": "Running"});
    let children = snapshot.forks(fork).await;
    assert_eq!(children.len(), 2);
    let lives = children.iter().map(|(name, child)| async move {
        goes_on(child, first, name).await;
        child.delete().await;
    });
    join_all(lives).await;

    // Stopped, and back to the snapshot.
    guest.stop().await;
    assert_eq!(server.vmms(), vec![]);
    guest.go_back(&snapshot, json!({})).await;
    let back = goes_on(&guest, first, "origin").await;
    eprintln!("{hypervisor}: {first} when captured, {later} after standby, {back} after going back");

    // The snapshot leaves as a file, is forgotten, and comes in again.
    let file = client.get(&snapshot.path("/export")).await.expect(200);
    snapshot.delete().await;
    let imported = import_bytes(client, file.body.to_vec()).await.expect(201).json();
    let imported = server.snapshot(imported["id"].as_str().unwrap());
    let abroad = imported
        .fork(json!({"name": "abroad", "target_state": "Running"}))
        .await;
    goes_on(&abroad, first, "abroad").await;
    abroad.delete().await;
    imported.delete().await;

    // Stopped and started: the disk is what is left.
    guest.stop().await;
    guest.start(json!({})).await;
    goes_on(&guest, 0, "origin").await;
    guest.delete().await;
    server.emptied(&["memory", "snapshots", "instances"]).await;
    assert_eq!(server.vmms(), vec![]);
}

/// What was stopped on one hypervisor goes on on each other one.
async fn a_stopped_snapshot_goes_anywhere(from: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let guest = noted(&server, from).await;
    guest.stop().await;
    let snapshot = guest.take(json!({"kind": "Stopped"})).await;
    guest.delete().await;
    for to in KINDS.into_iter().filter(|kind| *kind != from && offers(kind)) {
        let body = json!({"name": format!("on-{to}"), "target_state": "Running", "target_hypervisor": to});
        let child = snapshot.fork(body).await;
        assert_eq!(child.inspect().await["hypervisor"], to);
        child.wait_for("Running").await;
        let note = child.copy_out("/root/note", false).await.unwrap();
        assert_eq!(note[0].bytes, b"before\n", "from {from} to {to}");
        child.delete().await;
    }
    assert_eq!(server.vmms(), vec![]);
}

/// What cannot be kept for want of space is refused, and costs the guest nothing; with space it is kept.
async fn a_full_disk_costs_no_guest_anything(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let disk = or_skip!(LoopDisk::mount(512), "needs root and a loop device");
    let server = server_on(&disk).await;
    let guest = noted(&server, hypervisor).await;
    let mut count = goes_on(&guest, 0, "origin").await;
    let bodies = [
        ("snapshots", json!({"kind": "Standby", "name": "cramped"})),
        ("fork", json!({"name": "child", "from_running": true})),
        ("standby", json!({})),
    ];
    for (what, body) in &bodies {
        let filler = disk.fill(3 << 20);
        let reply = guest.post(&format!("/{what}"), body).await;
        let message = reply.refused(409, "insufficient_resources");
        assert!(message.contains("space"), "{what}: {message}");
        count = goes_on(&guest, count, "origin").await;
        std::fs::remove_file(filler).unwrap();
    }
    assert_eq!(server.listed("/snapshots").await, Vec::<String>::new());
    assert_eq!(server.listed("/instances").await.len(), 1);
    assert_eq!(server.vmms().len(), 1);

    let snapshot = guest.capture().await;
    let asleep = guest.standby().await;
    assert_eq!(asleep["state"], "Standby", "{asleep}");
    guest.restore().await;
    goes_on(&guest, count, "origin").await;
    guest.delete().await;
    snapshot.delete().await;
    server.emptied(&["memory", "snapshots", "instances"]).await;
    assert_eq!(server.vmms(), vec![]);
}

macro_rules! on {
    ($hypervisor:literal, $module:ident) => {
        mod $module {
            use super::{
                a_full_disk_costs_no_guest_anything, a_stopped_snapshot_goes_anywhere, the_whole_contract,
            };

            #[tokio::test]
            async fn the_whole_contract_holds() {
                if hypeman_tests::told_on($hypervisor) {
                    the_whole_contract($hypervisor).await;
                }
            }

            #[tokio::test]
            async fn a_stopped_snapshot_goes_on_on_each_other_hypervisor() {
                if hypeman_tests::told_on($hypervisor) {
                    a_stopped_snapshot_goes_anywhere($hypervisor).await;
                }
            }

            #[tokio::test]
            async fn a_guest_on_a_full_disk_runs_on_and_is_kept_when_there_is_space() {
                if hypeman_tests::told_on($hypervisor) {
                    a_full_disk_costs_no_guest_anything($hypervisor).await;
                }
            }
        }
    };
}

on!("qemu", on_qemu);
on!("qemu-microvm", on_qemu_microvm);
on!("cloud-hypervisor", on_cloud_hypervisor);
on!("firecracker", on_firecracker);

/// The server dies at each step of what is done with memory. On QEMU the stories of [`cut`] tell it.
macro_rules! cut_on {
    ($hypervisor:literal, $module:ident) => {
        mod $module {
            use super::cut;

            #[tokio::test]
            async fn standby_is_cut_at_each_step() {
                if hypeman_tests::told_on($hypervisor) {
                    cut::standby_is_cut($hypervisor).await;
                }
            }

            #[tokio::test]
            async fn restore_is_cut_at_each_step() {
                if hypeman_tests::told_on($hypervisor) {
                    cut::restore_is_cut($hypervisor).await;
                }
            }

            #[tokio::test]
            async fn capture_is_cut_at_each_step() {
                if hypeman_tests::told_on($hypervisor) {
                    cut::capture_is_cut($hypervisor).await;
                }
            }

            #[tokio::test]
            async fn restoring_a_snapshot_is_cut_at_each_step() {
                if hypeman_tests::told_on($hypervisor) {
                    cut::restoring_a_snapshot_is_cut($hypervisor).await;
                }
            }

            #[tokio::test]
            async fn fork_is_cut_at_each_step() {
                if hypeman_tests::told_on($hypervisor) {
                    cut::fork_is_cut($hypervisor).await;
                }
            }

            #[tokio::test]
            async fn a_fork_of_a_running_guest_is_cut_at_each_step() {
                if hypeman_tests::told_on($hypervisor) {
                    cut::a_fork_of_a_running_guest_is_cut($hypervisor).await;
                }
            }
        }
    };
}

cut_on!("cloud-hypervisor", cut_on_cloud_hypervisor);
cut_on!("firecracker", cut_on_firecracker);
