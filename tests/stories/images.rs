//! Images: pushed, tagged, shared, deleted, and the hostile ones.

use base64::Engine as _;
use hypeman_tests::{
    Image, ImageBuilder, LayerBuilder, MediaFamily, Server, ServerOptions, Upstream, encode, eventually,
    have, sha256, skip_unless,
};
use serde_json::{Value, json};

use crate::crash::{left_nothing, paths};
use crate::full_disk::noise;

fn small(content: &[u8]) -> ImageBuilder {
    ImageBuilder::empty()
        .layer(LayerBuilder::default().file("content", 0o644, content))
        .cmd(&["/content"])
}

#[tokio::test]
async fn an_image_is_pushed_shown_tagged_and_deleted_with_its_last_tag() {
    let server = Server::start().await;
    let client = server.client();
    let image = small(b"one").config("Env", json!(["A=B"])).build();
    let name = server.push(&image, "deep/er/and/deeper/app", "v1").await;
    let shown = client
        .get(&format!("/images/{}", encode(&name)))
        .await
        .expect(200)
        .json();
    assert_eq!(shown["name"], name);
    assert_eq!(shown["digest"], image.digest());
    assert_eq!(shown["cmd"], json!(["/content"]));
    assert!(shown["size_bytes"].as_u64().unwrap() > 0);
    assert!(shown["error"].is_null() && shown["queue_position"].is_null());

    let target = format!("{}/other/name:v2", server.host());
    let tagged = client
        .post(
            &format!("/images/{}/tag", encode(&name)),
            &json!({"target": target}),
        )
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&tagged["name"], &tagged["digest"], &tagged["status"]),
        (&json!(target), &shown["digest"], &json!("ready"))
    );
    assert_eq!(client.get("/images").await.json().as_array().unwrap().len(), 2);

    let disk = |reply: Value| {
        reply["disk_breakdown"]["images_bytes"]
            .as_u64()
            .unwrap_or_default()
    };
    let both = disk(client.get("/resources").await.json());
    server.delete_image(&name).await;
    assert_eq!(
        disk(client.get("/resources").await.json()),
        both,
        "content is shared by digest"
    );
    client
        .get(&format!("/images/{}", encode(&name)))
        .await
        .refused(404, "not_found");
    client
        .get(&format!("/images/{}", encode(&target)))
        .await
        .expect(200);
    server.delete_image(&target).await;
    assert_eq!(
        disk(client.get("/resources").await.json()),
        0,
        "the last tag takes the content along"
    );
    client
        .delete(&format!("/images/{}", encode(&target)))
        .await
        .refused(404, "not_found");
    client
        .get(&format!("/images/{}", encode("UPPER//:bad")))
        .await
        .refused(400, "invalid_name");
}

#[tokio::test]
async fn both_media_families_and_a_moved_tag_work() {
    let server = Server::start().await;
    let client = server.client();
    for (number, family) in [MediaFamily::Oci, MediaFamily::Docker].into_iter().enumerate() {
        let image = small(format!("content {number}").as_bytes())
            .family(family)
            .build();
        let name = server.push(&image, "moving", "latest").await;
        let shown = client.get(&format!("/images/{}", encode(&name))).await.json();
        assert_eq!(
            shown["digest"],
            image.digest(),
            "the tag points at what was pushed last"
        );
    }
}

#[tokio::test]
async fn whiteouts_links_and_modes_are_as_the_layers_say() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let lower = LayerBuilder::default()
        .directory("data", 0o755)
        .file("data/gone", 0o644, b"x")
        .file("data/stays", 0o4711, b"stays")
        .directory("opaque", 0o755)
        .file("opaque/old", 0o644, b"x")
        .symlink("turned", "/bin/busybox");
    let upper = LayerBuilder::default()
        .file("data/.wh.gone", 0o644, b"")
        .file("opaque/.wh..wh..opq", 0o644, b"")
        .file("opaque/new", 0o644, b"new")
        .directory("turned", 0o755)
        .file("turned/inside", 0o600, b"x")
        .hard_link("data/twin", "data/stays");
    let image = ImageBuilder::busybox().unwrap().layer(lower).layer(upper).build();
    let name = server.push(&image, "stories/layers", "1").await;
    let guest = server.run(&name, json!({})).await;
    assert_eq!(
        guest.output("ls -A /data /opaque").await,
        "/data:\nstays\ntwin\n\n/opaque:\nnew"
    );
    assert_eq!(
        guest.output("stat -c %a /data/stays; cat /data/twin").await,
        "4711\nstays"
    );
    assert_eq!(guest.output("ls /turned").await, "inside");
}

#[tokio::test]
async fn hostile_layers_fail_with_a_reason_and_touch_nothing() {
    let server = Server::start().await;
    let client = server.client();
    let victim = server.scratch().join("victim");
    std::fs::write(&victim, b"untouched").unwrap();
    let before = paths(server.data_directory());
    let outside = victim.to_string_lossy().into_owned();
    let file = tar::EntryType::Regular;
    let whole = LayerBuilder::default()
        .file("a", 0o644, &vec![7; 200_000])
        .finish();
    let mut bad_checksum = whole.clone();
    bad_checksum[0] ^= 1;
    let hostile: Vec<(&str, Vec<u8>)> = vec![
        (
            "dot-dot",
            LayerBuilder::default()
                .raw(file, "../../../../../../escape", "", b"x")
                .finish(),
        ),
        (
            "inner-dot-dot",
            LayerBuilder::default()
                .raw(file, "a/../../escape", "", b"x")
                .finish(),
        ),
        (
            "hard-link-out",
            LayerBuilder::default()
                .raw(tar::EntryType::Link, "link", "../../../etc/passwd", b"")
                .finish(),
        ),
        (
            "hard-link-absent",
            LayerBuilder::default()
                .raw(tar::EntryType::Link, "link", "nothing/here", b"")
                .finish(),
        ),
        ("truncated", whole[..100_000].to_vec()),
        ("bad-checksum", bad_checksum),
    ];
    for (name, tar) in hostile {
        let image = ImageBuilder::empty().tar_layer(&tar).build();
        let reply = image.push(client, &format!("hostile/{name}"), "1").await;
        assert_eq!(reply.status, 201);
        let settled = server
            .image_settled(&format!("{}/hostile/{name}:1", server.host()))
            .await;
        assert_eq!(settled["status"], "failed", "{name}: {settled}");
        assert!(
            settled["error"].as_str().is_some_and(|reason| !reason.is_empty()),
            "{name}: {settled}"
        );
        let request = json!({"name": "x", "image": settled["name"], "network": {"enabled": false}});
        assert!(client.post("/instances", &request).await.status >= 400, "{name}");
    }
    // These name places outside too, but have a harmless meaning within the image: it is theirs to hold them.
    let through_links = LayerBuilder::default()
        .symlink("door", &outside)
        .raw(file, "door/escape", "", b"x")
        .raw(file, &outside, "", b"changed")
        .finish();
    let image = ImageBuilder::empty().tar_layer(&through_links).build();
    let _ = image.push(client, "hostile/links", "1").await;
    server
        .image_settled(&format!("{}/hostile/links:1", server.host()))
        .await;
    assert_eq!(std::fs::read(&victim).unwrap(), b"untouched");

    let lying = ImageBuilder::empty()
        .blob_layer(gzip(&whole), &sha256(b"another stream"))
        .build();
    let _ = lying.push(client, "hostile/diff-id", "1").await;
    let settled = server
        .image_settled(&format!("{}/hostile/diff-id:1", server.host()))
        .await;
    assert_eq!(settled["status"], "failed", "a diff id that lies: {settled}");
    let corrupt = ImageBuilder::empty()
        .blob_layer(vec![0x1f, 0x8b, 8, 0, 1, 2, 3], &sha256(b"x"))
        .build();
    let _ = corrupt.push(client, "hostile/gzip", "1").await;
    assert_eq!(
        server
            .image_settled(&format!("{}/hostile/gzip:1", server.host()))
            .await["status"],
        "failed"
    );

    // Of those that failed there is no root disk, finished or not; the rest goes with their names.
    let disks = std::fs::read_dir(server.data_directory().join("images")).unwrap();
    let disks: Vec<String> = disks
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name != ".work")
        .collect();
    let harmless = image.digest().replace("sha256:", "");
    assert!(disks.iter().all(|disk| *disk == harmless), "{disks:?}");
    let work = std::fs::read_dir(server.data_directory().join("images/.work")).unwrap();
    assert_eq!(work.count(), 0, "no conversion is left in the middle");
    for shown in client.get("/images").await.expect(200).json().as_array().unwrap() {
        let path = format!("/images/{}", encode(shown["name"].as_str().unwrap()));
        client.delete(&path).await.expect(204);
    }
    left_nothing(&server, &before, "hostile layers");
}

#[tokio::test]
async fn how_far_a_pull_is_is_told() {
    let upstream = Upstream::start().await;
    let server = Server::start().await;
    let layer = LayerBuilder::default().file("noise", 0o644, &noise(4 << 20));
    let name = upstream.offer(&ImageBuilder::empty().layer(layer).build(), "library/large", "1");
    upstream.hold();
    server
        .client()
        .post("/images", &json!({"name": name}))
        .await
        .expect(202);
    let path = format!("/images/{}", encode(&name));
    eventually("the half that came is told", || async {
        let shown = server.client().get(&path).await.expect(200).json();
        let share = shown["progress"].as_f64();
        shown["status"] == "pulling" && share.is_some_and(|share| (0.3..0.7).contains(&share))
    })
    .await;
    upstream.release();
    let ready = server.image_settled(&name).await;
    assert_eq!(
        (&ready["status"], &ready["progress"]),
        (&json!("ready"), &Value::Null)
    );
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[tokio::test]
async fn a_bomb_is_stopped() {
    let server = Server::start().await;
    // Three gigabytes of nothing in three megabytes.
    let mut header = tar::Header::new_gnu();
    header.set_path("zeros").unwrap();
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(3 << 30);
    header.set_cksum();
    let zeros = gzip(&vec![0; 64 << 20]);
    let bomb = [gzip(header.as_bytes()), zeros.repeat(48)].concat();
    let image = ImageBuilder::empty()
        .blob_layer(bomb, &sha256(b"nobody reads this far"))
        .build();
    let _ = image.push(server.client(), "hostile/bomb", "1").await;
    let settled = server
        .image_settled(&format!("{}/hostile/bomb:1", server.host()))
        .await;
    assert_eq!(settled["status"], "failed", "{settled}");
    let reason = settled["error"].as_str().unwrap();
    assert!(
        reason.contains("the layers expand more than 200 times"),
        "the reason is told: {reason}"
    );
    let peak = std::fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let peak = peak
        .lines()
        .find(|line| line.starts_with("VmHWM"))
        .unwrap()
        .to_owned();
    let kilobytes: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(
        kilobytes < 200 << 10,
        "conversion held the layer in memory: {peak}"
    );
}

#[tokio::test]
async fn an_image_is_pulled_from_another_registry() {
    skip_unless!(have("busybox"), "needs busybox-static");
    // Another server's registry is a registry as good as any.
    let upstream = Server::start().await;
    let server = Server::start().await;
    let image = small(b"pulled").build();
    let name = upstream.push(&image, "library/thing", "1").await;

    let refused = server.client().post("/images", &json!({"name": name})).await;
    assert!(
        refused.status >= 400,
        "the upstream wants credentials: {}",
        refused.text()
    );
    let credentials = json!({"username": upstream.client().token().unwrap(), "password": "x"});
    let pulled = server
        .client()
        .post("/images", &json!({"name": name, "credentials": credentials}))
        .await
        .expect(202)
        .json();
    assert_eq!(
        pulled["digest"],
        image.digest(),
        "the digest is known before the answer"
    );
    assert_eq!(server.image_settled(&name).await["status"], "ready");
    let absent = format!("{}/library/absent:1", upstream.host());
    let reply = server
        .client()
        .post("/images", &json!({"name": absent, "credentials": credentials}))
        .await;
    reply.refused(404, "not_found");
    server
        .client()
        .post("/images", &json!({"name": name, "platform": "beos/ppc"}))
        .await
        .refused(400, "invalid_platform");
    let grep = std::process::Command::new("grep")
        .args(["-rlF", upstream.client().token().unwrap()])
        .arg(server.data_directory())
        .output()
        .unwrap();
    assert!(grep.stdout.is_empty(), "borrowed credentials stay in memory");
    let _: Image = image;
}

#[tokio::test]
async fn a_registry_that_docker_knows_is_pulled_from_with_dockers_credentials() {
    let upstream = Server::start().await;
    let name = upstream
        .push(&small(b"known").build(), "library/known", "1")
        .await;
    let home = tempfile::tempdir().unwrap();
    let server = Server::start_with(ServerOptions {
        environment: vec![("HOME".to_owned(), home.path().to_string_lossy().into_owned())],
        ..ServerOptions::default()
    })
    .await;
    let pull = async || server.client().post("/images", &json!({"name": name})).await;
    assert!(pull().await.status >= 400, "nobody has logged in");

    // `docker login`, while the server runs.
    let token = upstream.client().token().unwrap();
    let auth = base64::engine::general_purpose::STANDARD.encode(format!("{token}:x"));
    let config = json!({"auths": {upstream.host(): {"auth": auth}}});
    std::fs::create_dir(home.path().join(".docker")).unwrap();
    std::fs::write(home.path().join(".docker/config.json"), config.to_string()).unwrap();
    pull().await.expect(202);
    assert_eq!(server.image_settled(&name).await["status"], "ready");
}
