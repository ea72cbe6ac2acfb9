//! Who goes back to a snapshot gives up what is there, and only for something that is whole and goes on here.

use std::path::PathBuf;

use hypeman_tests::{Guest, Server, Snapshot, any_hypervisor, flip, have, hypervisors, skip_unless};
use serde_json::json;

use crate::snapshots_damage::parts;
use crate::snapshots_travel::{export, forged, import_bytes};

/// Tries to go back to a snapshot with one damaged part after the other.
async fn refused_with_each_flipped(server: &Server, guest: &Guest, snapshot: &Snapshot, parts: &[PathBuf]) {
    let state = guest.inspect().await["state"].clone();
    for part in parts {
        flip(part);
        let reply = guest.try_go_back(snapshot, &json!({})).await;
        assert_eq!(reply.status, 409, "{}: {}", part.display(), reply.text());
        reply.refused(409, "snapshot_damaged");
        assert_eq!(server.vmms(), vec![], "{}", part.display());
        assert_eq!(guest.inspect().await["state"], state, "{}", part.display());
        flip(part);
    }
}

#[tokio::test]
async fn what_is_there_is_not_given_up_for_a_damaged_snapshot() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    for (hypervisor, compressed) in hypervisors()
        .into_iter()
        .flat_map(|kind| [(kind, false), (kind, true)])
    {
        let guest = server.counting(&image, json!({"hypervisor": hypervisor})).await;
        let body = json!({"kind": "Standby", "compression": {"enabled": compressed}});
        let snapshot = guest.take(body).await;
        if compressed {
            snapshot.compressed().await;
        }
        let parts = parts(&server, &snapshot);
        guest.output("echo after > /root/note && sync").await;
        let counted = guest.count().await;

        guest.standby().await;
        refused_with_each_flipped(&server, &guest, &snapshot, &parts).await;
        guest.restore().await;
        guest.goes_on(counted).await;
        assert_eq!(guest.output("cat /root/note").await, "after");

        guest.stop().await;
        refused_with_each_flipped(&server, &guest, &snapshot, &parts).await;
        guest.start(json!({})).await;
        assert_eq!(guest.output("cat /root/note").await, "after");

        // Nothing of it was damaged for good.
        guest.stop().await;
        guest.go_back(&snapshot, json!({})).await;
        guest.goes_on(0).await;
        assert_eq!(guest.output("cat /root/note").await, "before");
        guest.delete().await;
        snapshot.delete().await;
        server.emptied(&["memory"]).await;
    }
}

#[tokio::test]
async fn what_does_not_fit_this_host_is_refused_by_name_and_nothing_is_given_up_for_it() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = server.counting(&image, json!({"name": "origin"})).await;
    let snapshot = guest.capture().await;
    let file = std::fs::read(export(&server, &snapshot).await).unwrap();
    guest.output("echo after > /root/note && sync").await;
    let counted = guest.count().await;
    guest.standby().await;
    let version_advice = match any_hypervisor().starts_with("qemu") {
        true => "hypervisor.qemu_binary_path",
        false => "install that version",
    };
    for (part, value, named, advice) in [
        ("version", "0.0.1", "version 0.0.1", version_advice),
        ("machine", "pc-0.1", "machine type pc-0.1", "install a build"),
        ("cpu", "Z80", "processor Z80", "on a host with that one"),
    ] {
        // As captured by another version, on another board or processor: what a server elsewhere exports.
        let place = format!("/memory/identity/{part}");
        let bytes = forged(&file, |papers| {
            *papers.pointer_mut(&place).unwrap() = json!(value)
        });
        let imported = import_bytes(client, bytes).await.expect(201).json();
        let imported = server.snapshot(imported["id"].as_str().unwrap());
        let restore = guest.path(&format!("/snapshots/{}/restore", imported.id));
        let fork = imported.path("/fork");
        for (call, body) in [
            (&restore, json!({})),
            (&restore, json!({"target_state": "Standby"})),
            (&fork, json!({"name": "never"})),
            (&fork, json!({"name": "never", "target_state": "Standby"})),
        ] {
            let message = client.post(call, &body).await.refused(409, "incompatible");
            assert!(message.contains(named) && message.contains(advice), "{message}");
            assert_eq!(server.vmms(), vec![], "{call} {body}");
        }
        assert_eq!(guest.inspect().await["state"], "Standby");
        assert_eq!(server.guests().await.len(), 1);
        // Its disk can be used anywhere.
        let cold = json!({"name": "cold", "target_state": "Stopped"});
        imported.fork(cold).await.delete().await;
        imported.delete().await;
    }
    guest.restore().await;
    guest.goes_on(counted).await;
    assert_eq!(guest.output("cat /root/note").await, "after");
}
