//! Who goes back to a snapshot gives up what is there, and only for something that is whole and goes on here.

use std::path::PathBuf;

use hypeman_tests::{Guest, Server, eventually, have, hypervisors, skip_unless};
use serde_json::{Value, json};

use crate::snapshots::{counter, counting, files, flip, goes_on};
use crate::snapshots_travel::{export, forged, import_bytes};

async fn take(server: &Server, guest: &Guest, body: Value) -> String {
    let path = format!("/instances/{}/snapshots", guest.id);
    let snapshot = server.client().post(&path, &body).await.expect(201).json();
    snapshot["id"].as_str().unwrap().to_owned()
}

/// Every file that a snapshot consists of, while there is no memory but its own.
fn parts(server: &Server, snapshot: &str) -> Vec<PathBuf> {
    let mut parts = files(&server.data_directory().join("snapshots").join(snapshot));
    parts.extend(files(&server.data_directory().join("memory")));
    parts.retain(|part| !part.ends_with("verified"));
    assert!(parts.len() >= 5, "{parts:?}");
    parts
}

/// Tries to go back to a snapshot with one damaged part after the other.
async fn refused_with_each_flipped(server: &Server, guest: &Guest, restore: &str, parts: &[PathBuf]) {
    let state = guest.inspect().await["state"].clone();
    for part in parts {
        flip(part);
        let reply = server.client().post(restore, &json!({})).await;
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
    let client = server.client();
    let image = server.busybox().await;
    for (hypervisor, compressed) in hypervisors()
        .into_iter()
        .flat_map(|kind| [(kind, false), (kind, true)])
    {
        let guest = counting(&server, &image, json!({"hypervisor": hypervisor})).await;
        let path = format!("/instances/{}", guest.id);
        let body = json!({"kind": "Standby", "compression": {"enabled": compressed}});
        let id = take(&server, &guest, body).await;
        let shown = format!("/snapshots/{id}");
        if compressed {
            eventually("it is compressed", || async {
                client.get(&shown).await.expect(200).json()["compression_state"] == "compressed"
            })
            .await;
        }
        let parts = parts(&server, &id);
        guest.output("echo after > /root/note && sync").await;
        let counted = counter(&guest).await;
        let restore = format!("{path}/snapshots/{id}/restore");

        client.post_empty(&format!("{path}/standby")).await.expect(200);
        refused_with_each_flipped(&server, &guest, &restore, &parts).await;
        client.post_empty(&format!("{path}/restore")).await.expect(200);
        goes_on(&guest, counted).await;
        assert_eq!(guest.output("cat /root/note").await, "after");

        guest.stop().await;
        refused_with_each_flipped(&server, &guest, &restore, &parts).await;
        guest.start(json!({})).await;
        assert_eq!(guest.output("cat /root/note").await, "after");

        // Nothing of it was damaged for good.
        guest.stop().await;
        client.post(&restore, &json!({})).await.expect(200);
        goes_on(&guest, 0).await;
        assert_eq!(guest.output("cat /root/note").await, "before");
        guest.delete().await;
        client.delete(&shown).await.expect(204);
        eventually("the memory of nobody is gone", || async {
            files(&server.data_directory().join("memory")).is_empty()
        })
        .await;
    }
}

#[tokio::test]
async fn what_does_not_fit_this_host_is_refused_by_name_and_nothing_is_given_up_for_it() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = counting(&server, &image, json!({"name": "origin"})).await;
    let path = format!("/instances/{}", guest.id);
    let id = take(&server, &guest, json!({"kind": "Standby"})).await;
    let file = std::fs::read(export(&server, &id).await).unwrap();
    guest.output("echo after > /root/note && sync").await;
    let counted = counter(&guest).await;
    client.post_empty(&format!("{path}/standby")).await.expect(200);
    for (part, value, named, advice) in [
        ("version", "0.0.1", "version 0.0.1", "install that version"),
        ("machine", "pc-0.1", "machine type pc-0.1", "install a build"),
        ("cpu", "Z80", "processor Z80", "on a host with that one"),
    ] {
        // As captured by another version, on another board or processor: what a server elsewhere exports.
        let place = format!("/memory/identity/{part}");
        let bytes = forged(&file, |papers| {
            *papers.pointer_mut(&place).unwrap() = json!(value)
        });
        let imported = import_bytes(client, bytes).await.expect(201).json();
        let imported = imported["id"].as_str().unwrap().to_owned();
        let restore = format!("{path}/snapshots/{imported}/restore");
        let fork = format!("/snapshots/{imported}/fork");
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
        let listed = client.get("/instances").await.expect(200).json();
        assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
        // Its disk can be used anywhere.
        let cold = json!({"name": "cold", "target_state": "Stopped"});
        let cold = client.post(&fork, &cold).await.expect(201).json();
        server.guest(cold["id"].as_str().unwrap()).delete().await;
        client.delete(&format!("/snapshots/{imported}")).await.expect(204);
    }
    client.post_empty(&format!("{path}/restore")).await.expect(200);
    goes_on(&guest, counted).await;
    assert_eq!(guest.output("cat /root/note").await, "after");
}
