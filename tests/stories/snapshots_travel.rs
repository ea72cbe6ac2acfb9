//! A snapshot leaves a server as one file and goes on wherever that file is imported, or is refused as a whole.

use std::path::{Path, PathBuf};

use hypeman_tests::{
    Client, Guest, LoopDisk, Reply, Server, ServerOptions, Snapshot, eventually, have, mint, or_skip,
    skip_unless,
};
use reqwest::Method;
use serde_json::{Value, json};

/// A guest with something in its memory and something on its disk.
async fn counting(server: &Server) -> Guest {
    let image = server.busybox().await;
    server.counting(&image, json!({"name": "origin"})).await
}

async fn delete_busybox(server: &Server) {
    let name = format!("{}/stories/busybox:1", server.host());
    server.delete_image(&name).await;
}

pub(crate) async fn export(server: &Server, snapshot: &Snapshot) -> PathBuf {
    let file = server.scratch().join(format!("{}.file", snapshot.id));
    let words = ["snapshot", "export", &snapshot.id, file.to_str().unwrap()];
    server.command_line().run(&words).await.ok();
    file
}

async fn import(server: &Server, file: &Path, name: &str) -> Snapshot {
    let words = ["snapshot", "import", file.to_str().unwrap(), "--name", name, "-q"];
    server.snapshot(&server.command_line().run(&words).await.ok())
}

pub(crate) async fn import_bytes(client: &Client, bytes: Vec<u8>) -> Reply {
    let request = client.request(Method::POST, "/snapshots/import").body(bytes);
    client.send(request).await
}

async fn fork(server: &Server, snapshot: &Snapshot, name: &str) -> Guest {
    let words = [
        "snapshot",
        "fork",
        snapshot.id.as_str(),
        name,
        "--target-state",
        "Running",
        "-q",
    ];
    let id = server.command_line().run(&words).await.ok();
    let guest = server.guest(&id);
    guest.wait_for("Running").await;
    guest
}

fn entries(server: &Server, directory: &str) -> Vec<String> {
    let read = std::fs::read_dir(server.data_directory().join(directory)).unwrap();
    let names = read.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with('.')).collect()
}

async fn nothing_stored(server: &Server) {
    let listed = server.client().get("/snapshots").await.expect(200).json();
    assert_eq!(listed, json!([]));
    eventually("no file is left", || async {
        entries(server, "memory").is_empty() && entries(server, "snapshots").is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_snapshot_goes_on_where_neither_it_nor_its_image_has_ever_been() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let other = Server::start().await;
    let guest = counting(&server).await;
    let counted = guest.count().await;
    let raw = guest.take(json!({"kind": "Standby", "name": "raw"})).await;
    let framed = json!({"kind": "Standby", "name": "framed", "compression": {"enabled": true}});
    let framed = guest.take(framed).await;
    framed.compressed().await;
    guest.stop().await;
    let body = json!({"kind": "Stopped", "name": "cold", "tags": {"team": "stories"}});
    let stopped = guest.take(body).await;
    let mut files = Vec::new();
    for snapshot in [&raw, &framed, &stopped] {
        files.push(export(&server, snapshot).await);
        snapshot.delete().await;
    }
    guest.delete().await;
    delete_busybox(&server).await;
    nothing_stored(&server).await;
    eventually("the root disk is gone", || async {
        entries(&server, "images").is_empty()
    })
    .await;

    for place in [&server, &other] {
        for (file, name) in files.iter().zip(["raw", "framed", "cold"]) {
            let snapshot = import(place, file, name).await;
            let shown = snapshot.inspect().await;
            assert_eq!(
                (&shown["name"], &shown["source_instance_name"]),
                (&json!(name), &json!("origin")),
                "{shown}"
            );
            snapshot.is_intact().await;
            let child = fork(place, &snapshot, "child").await;
            assert_eq!(child.output("cat /root/note; hostname").await, "before\nchild");
            if name == "cold" {
                assert_eq!(shown["tags"], json!({"team": "stories"}));
                assert_eq!(child.shell("test -e /dev/shm/count").await.exit_code, 1);
            } else {
                child.goes_on(counted).await;
            }
            child.stop().await;
            child.start(json!({})).await;
            assert_eq!(child.output("cat /root/note").await, "before");
            child.delete().await;
            snapshot.delete().await;
        }
        nothing_stored(place).await;
        assert_eq!(
            place.client().get("/images").await.json(),
            json!([]),
            "a root disk that came along is nobody's image"
        );
        eventually("nor is its file left", || async {
            entries(place, "images").is_empty()
        })
        .await;
    }
}

#[tokio::test]
async fn a_root_disk_that_is_here_is_not_stored_twice_and_another_one_is_never_taken_for_it() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let guest = counting(&server).await;
    let file = export(&server, &guest.capture().await).await;
    let before = entries(&server, "images");
    let again = import(&server, &file, "again").await;
    assert_eq!(entries(&server, "images"), before);
    fork(&server, &again, "child").await.delete().await;

    // The same image, made into another root disk.
    let other = Server::start_with(ServerOptions {
        settings: vec![("images.compress", json!(true))],
        ..ServerOptions::default()
    })
    .await;
    other.busybox().await;
    let foreign = import(&other, &file, "foreign").await;
    assert_eq!(entries(&other, "images").len(), 2);
    let child = fork(&other, &foreign, "child").await;
    child.goes_on(1).await;
    assert_eq!(child.output("md5sum < /bin/busybox | wc -c").await, "36");

    // What came along travels on.
    let onwards = child.capture().await;
    let file = export(&other, &onwards).await;
    onwards.delete().await;
    child.delete().await;
    foreign.delete().await;
    eventually("only the image's own root disk is left", || async {
        entries(&other, "images").len() == 1
    })
    .await;
    let back = import(&server, &file, "back").await;
    fork(&server, &back, "back").await.delete().await;
    guest.delete().await;
}

/// The file with another description, linked as an exporter would: only what it says is wrong.
pub(crate) fn forged(file: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    const HEAD: usize = 24;
    const DESCRIPTION: u32 = 1;
    let number = |head: &[u8], at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
    let (mut made, mut rest, mut change) = (file[..16].to_vec(), &file[16..], Some(change));
    let mut last = blake3::hash(&made);
    while !rest.is_empty() {
        let mut head = rest[..HEAD].to_vec();
        let length = number(&head, 8) as usize;
        let mut stored = rest[HEAD + 32..HEAD + 32 + length].to_vec();
        rest = &rest[HEAD + 32 + length..];
        if number(&head, 0) == DESCRIPTION
            && let Some(change) = change.take()
        {
            let mut papers = serde_json::from_slice(&stored).unwrap();
            change(&mut papers);
            stored = serde_json::to_vec(&papers).unwrap();
            let length = u32::try_from(stored.len()).unwrap().to_le_bytes();
            head[8..12].copy_from_slice(&length);
            head[12..16].copy_from_slice(&length);
        }
        let mut hasher = blake3::Hasher::new();
        last = hasher
            .update(last.as_bytes())
            .update(&head)
            .update(&stored)
            .finalize();
        made.extend_from_slice(&head);
        made.extend_from_slice(last.as_bytes());
        made.extend_from_slice(&stored);
    }
    made
}

#[tokio::test]
async fn a_file_that_is_not_whole_or_lies_is_refused_and_leaves_nothing() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let guest = counting(&server).await;
    let snapshot = guest.capture().await;
    let whole = std::fs::read(export(&server, &snapshot).await).unwrap();
    snapshot.delete().await;
    nothing_stored(&server).await;
    let images = entries(&server, "images");
    let length = whole.len();
    let flipped = |place: usize| {
        let mut bytes = whole.clone();
        bytes[place] ^= 1;
        bytes
    };
    let bad = [
        flipped(3),
        flipped(100),
        flipped(length / 2),
        flipped(length - 1),
        whole[..length / 2].to_vec(),
        whole[..length - 1].to_vec(),
        [whole.as_slice(), b"x"].concat(),
        Vec::new(),
    ];
    for (number, bytes) in bad.into_iter().enumerate() {
        let reply = import_bytes(server.client(), bytes).await;
        let message = reply.refused(400, "snapshot_damaged");
        assert!(message.contains("nothing of it was kept"), "{number}: {message}");
        nothing_stored(&server).await;
    }

    for (place, value) in [
        ("/name", json!("../../etc/passwd")),
        ("/kind", json!("Stopped")),
        ("/source/id", json!("../../../../etc/passwd00")),
        ("/source/memory_bytes", json!(64 << 20)),
        ("/source/overlay_bytes", json!(512 << 20)),
        ("/source/vcpus", json!(2)),
        ("/source/boot_artifacts", json!("0".repeat(64))),
        ("/source/network", json!({"download": null, "upload": null})),
        ("/source/image_digest", json!("sha256:../../x")),
        ("/source/environment", json!({"A=": "b"})),
        // Of an instance that is here, with another root disk.
        (
            "/source/image_digest",
            json!(format!("sha256:{}", "0".repeat(64))),
        ),
    ] {
        let bytes = forged(&whole, |papers| *papers.pointer_mut(place).unwrap() = value);
        let reply = import_bytes(server.client(), bytes).await;
        assert_eq!(reply.status, 400, "{place}: {}", reply.text());
        nothing_stored(&server).await;
        assert_eq!(entries(&server, "images"), images, "{place}");
    }
    let newer = forged(&whole, |papers| papers["format"] = json!(2));
    let reply = import_bytes(server.client(), newer).await;
    let message = reply.refused(409, "incompatible");
    assert!(message.contains("format 2"), "{message}");

    let limited = |scopes: &[&str]| {
        let token = mint(server.secret(), Some(scopes));
        server.client().with_token(Some(&token))
    };
    let reader = limited(&["snapshot:read", "snapshot:delete"]);
    import_bytes(&reader, Vec::new()).await.expect(403);
    reader.get(&snapshot.path("/export")).await.expect(403);
    let writer = limited(&["snapshot:write"]);
    writer.get(&snapshot.path("/export")).await.expect(404);

    // The same bytes, unforged, by standard input.
    let again = server
        .command_line()
        .run_with_input(&["snapshot", "import", "-", "-q"], &whole)
        .await
        .ok();
    server.snapshot(&again).is_intact().await;
    guest.delete().await;
}

#[tokio::test]
async fn an_export_is_whole_though_its_snapshot_is_compressed_and_deleted_meanwhile() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let guest = counting(&server).await;
    // More than waits between the server and a client that does not read.
    guest
        .output("head -c 48000000 /dev/urandom > /dev/shm/noise")
        .await;
    let counted = guest.count().await;
    let body = json!({"kind": "Standby", "compression": {"enabled": true}});
    let snapshot = guest.take(body).await;
    let client = server.client();
    let request = client.request(Method::GET, &snapshot.path("/export"));
    let mut response = request.send().await.unwrap();
    assert_eq!(response.status(), 200);
    let mut file = response.chunk().await.unwrap().unwrap().to_vec();
    snapshot.delete().await;
    guest.delete().await;
    delete_busybox(&server).await;
    assert_eq!(client.get("/snapshots").await.json(), json!([]));
    while let Some(piece) = response.chunk().await.unwrap() {
        file.extend_from_slice(&piece);
    }
    nothing_stored(&server).await;
    eventually("nor is a root disk kept", || async {
        entries(&server, "images").is_empty()
    })
    .await;
    let imported = import_bytes(client, file).await.expect(201).json();
    let imported = server.snapshot(imported["id"].as_str().unwrap());
    let child = fork(&server, &imported, "child").await;
    child.goes_on(counted).await;
    child.delete().await;

    // Somebody who leaves in the middle keeps nothing alive.
    let request = client.request(Method::GET, &imported.path("/export"));
    let mut response = request.send().await.unwrap();
    response.chunk().await.unwrap().unwrap();
    drop(response);
    imported.delete().await;
    nothing_stored(&server).await;
}

#[tokio::test]
async fn an_import_into_a_full_disk_fails_clearly_and_works_later() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let disk = or_skip!(LoopDisk::mount(256), "needs root and a loop device");
    let server = Server::start().await;
    let guest = counting(&server).await;
    guest
        .output("head -c 30000000 /dev/urandom > /dev/shm/noise")
        .await;
    let file = export(&server, &guest.capture().await).await;
    let small = Server::start_with(ServerOptions {
        settings: vec![
            ("limits.min_free_disk", json!("1MB")),
            ("limits.max_image_storage", json!(1.0)),
        ],
        data_directory: Some(disk.path().join("d")),
        ..ServerOptions::default()
    })
    .await;
    // The server writes its kernel by itself.
    eventually("it could start guests", || async {
        small.log().contains("boot files are ready")
    })
    .await;
    for leave in [2 << 20, 12 << 20, 30 << 20] {
        let filler = disk.fill(leave);
        let reply = import_bytes(small.client(), std::fs::read(&file).unwrap()).await;
        let message = reply.refused(409, "insufficient_resources");
        assert!(message.to_lowercase().contains("space"), "{leave}: {message}");
        nothing_stored(&small).await;
        std::fs::remove_file(&filler).unwrap();
    }
    let snapshot = import(&small, &file, "later").await;
    snapshot.is_intact().await;
    let child = fork(&small, &snapshot, "child").await;
    child.goes_on(1).await;
    child.delete().await;
    guest.delete().await;
}
