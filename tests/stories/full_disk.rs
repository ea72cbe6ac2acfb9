//! A disk that fills up: a clear error, nothing corrupt, and on it goes once there is space.

use hypeman_tests::{
    Image, ImageBuilder, LayerBuilder, LoopDisk, Server, ServerOptions, Upstream, have, or_skip, sha256,
    skip_unless,
};
use serde_json::json;

pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(bytes)
    .collect()
}

pub(crate) async fn server_on(disk: &LoopDisk) -> Server {
    let data_directory = Some(disk.path().join("d"));
    let settings = vec![
        ("limits.min_free_disk", json!("1MB")),
        ("limits.max_image_storage", json!(1.0)),
    ];
    Server::start_with(ServerOptions {
        settings,
        data_directory,
        ..ServerOptions::default()
    })
    .await
}

#[tokio::test]
async fn a_push_into_a_full_disk_fails_clearly_and_works_later() {
    let disk = or_skip!(LoopDisk::mount(192), "needs root and a loop device");
    let server = server_on(&disk).await;
    let client = server.client();
    let image = ImageBuilder::empty()
        .layer(LayerBuilder::default().file("noise", 0o644, &noise(16 << 20)))
        .build();
    let filler = disk.fill(4 << 20);

    let bytes = noise(24 << 20);
    let refused = Image::push_blob(client, "full", &sha256(&bytes), &bytes).await;
    assert!(refused.status >= 400, "{}", refused.text());
    assert!(
        refused.text().to_lowercase().contains("space"),
        "the reason is told: {}",
        refused.text()
    );
    assert_eq!(client.get("/images").await.status, 200);

    std::fs::remove_file(&filler).unwrap();
    let name = server.push(&image, "full", "1").await;

    // Conversion runs out of space: the image fails, and a second push succeeds.
    let image = ImageBuilder::empty()
        .layer(LayerBuilder::default().file("noise", 0o644, &noise(17 << 20)))
        .build();
    for (digest, bytes) in &image.blobs {
        Image::push_blob(client, "full", digest, bytes).await.expect(201);
    }
    let filler = disk.fill(2 << 20);
    let pushed = image.push_manifest(client, "full", "2").await;
    let second = format!("{}/full:2", server.host());
    if pushed.status == 201 {
        let settled = server.image_settled(&second).await;
        assert_eq!(settled["status"], "failed", "{settled}");
        assert!(
            settled["error"]
                .as_str()
                .unwrap()
                .to_lowercase()
                .contains("space"),
            "{settled}"
        );
    } else {
        assert!(
            pushed.text().to_lowercase().contains("space"),
            "{}",
            pushed.text()
        );
    }
    std::fs::remove_file(&filler).unwrap();
    server.push(&image, "full", "2").await;
    assert_eq!(
        server.image_settled(&name).await["status"],
        "ready",
        "the first one is untouched"
    );
}

#[tokio::test]
async fn a_pull_whose_disk_fills_up_in_the_middle_fails_clearly_and_works_later() {
    let disk = or_skip!(LoopDisk::mount(192), "needs root and a loop device");
    let server = server_on(&disk).await;
    let client = server.client();
    let upstream = Upstream::start().await;
    let image = ImageBuilder::empty()
        .layer(LayerBuilder::default().file("noise", 0o644, &noise(32 << 20)))
        .build();
    let name = upstream.offer(&image, "full", "1");
    let request = json!({"name": name});

    upstream.hold();
    client.post("/images", &request).await.expect(202);
    upstream.stopped().await;
    let filler = disk.fill(2 << 20);
    upstream.release();
    let settled = server.image_settled(&name).await;
    assert_eq!(settled["status"], "failed", "{settled}");
    assert!(
        settled["error"]
            .as_str()
            .unwrap()
            .to_lowercase()
            .contains("space"),
        "the reason is told: {settled}"
    );
    let partial = std::fs::read_dir(server.data_directory().join("blobs/partial")).unwrap();
    assert_eq!(partial.count(), 0, "what came is given back");

    std::fs::remove_file(&filler).unwrap();
    client.post("/images", &request).await.expect(202);
    assert_eq!(server.image_settled(&name).await["status"], "ready");
}

#[tokio::test]
async fn instances_on_a_full_disk_fail_clearly_and_work_later() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let disk = or_skip!(LoopDisk::mount(256), "needs root and a loop device");
    let mut server = server_on(&disk).await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({"overlay_size": "512MB"})).await;
    assert_eq!(guest.inspect().await["state_error"], json!(null));

    let filler = disk.fill(3 << 20);
    // Forty megabytes go into three: the guest stands still in the middle of its write, and the reason is shown.
    let line = "head -c 41943040 /dev/urandom | tee /big | md5sum > /tmp/sum && sync \
        && echo 3 > /proc/sys/vm/drop_caches && md5sum < /big | cmp - /tmp/sum && echo whole";
    let session = guest.exec_session(json!({"command": ["sh", "-c", line]})).await;
    let stalled = guest
        .wait_until("the reason is shown", |instance| {
            instance["state_error"]
                .as_str()
                .is_some_and(|reason| reason.contains("no space on the host"))
        })
        .await;
    assert_eq!(stalled["state"], "Running", "{stalled}");
    let request = json!({"name": "refused", "image": image, "size": "64MB", "network": {"enabled": false}});
    let refused = server.client().post("/instances", &request).await;
    assert!(
        refused.status < 500 || refused.text().to_lowercase().contains("space"),
        "{}",
        refused.text()
    );
    assert_eq!(server.client().get("/instances").await.status, 200);

    std::fs::remove_file(&filler).unwrap();
    // The same guest goes on by itself, and nothing of what it wrote is lost.
    let written = session.finish().await;
    assert_eq!((written.text().as_str(), written.exit_code), ("whole", 0));
    guest
        .wait_until("the reason is gone", |instance| instance["state_error"].is_null())
        .await;
    assert_eq!(guest.output("echo still here").await, "still here");
    guest.delete().await;
    let _ = server
        .client()
        .delete("/instances/refused?graceful_shutdown=false")
        .await;
    assert_eq!(server.vmms(), vec![]);
    server.kill();
    server.start_again().await;
    let guest = server.run(&image, json!({"name": "later"})).await;
    assert_eq!(guest.output("echo fine").await, "fine");
    guest.delete().await;
    assert_eq!(server.client().get("/instances").await.json(), json!([]));
}
