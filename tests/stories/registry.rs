//! The registry, as container tools use it.

use hypeman_tests::{Image, ImageBuilder, LayerBuilder, Server, have, sha256, skip_unless};
use reqwest::Method;

#[tokio::test]
async fn blobs_are_uploaded_in_chunks_or_at_once_and_checked() {
    let server = Server::start().await;
    let client = server.client();
    client.get("/v2/").await.expect(200);
    assert_eq!(client.with_token(None).get("/v2/").await.status, 401);

    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let digest = sha256(&bytes);
    let start = client.post_empty("/v2/a/b/c/blobs/uploads/").await.expect(202);
    let mut location = path_of(start.header("location"));
    for (index, chunk) in bytes.chunks(100_000).enumerate() {
        let first = index * 100_000;
        let request = client
            .request(Method::PATCH, &location)
            .header("content-range", format!("{first}-{}", first + chunk.len() - 1))
            .header("content-type", "application/octet-stream")
            .body(chunk.to_vec());
        let reply = client.send(request).await.expect(202);
        assert_eq!(reply.header("range"), format!("0-{}", first + chunk.len() - 1));
        location = path_of(reply.header("location"));
    }
    let joint = if location.contains('?') { '&' } else { '?' };
    let done = client
        .send(client.request(Method::PUT, &format!("{location}{joint}digest={digest}")))
        .await
        .expect(201);
    assert_eq!(done.header("docker-content-digest"), digest);
    assert_eq!(
        client
            .get(&format!("/v2/a/b/c/blobs/{digest}"))
            .await
            .expect(200)
            .body,
        bytes
    );
    let head = client
        .send(client.request(Method::HEAD, &format!("/v2/a/b/c/blobs/{digest}")))
        .await
        .expect(200);
    assert_eq!(head.header("content-length"), "300000");

    let wrong = Image::push_blob(client, "a/b", &sha256(b"other"), b"bytes").await;
    assert_eq!(wrong.status, 400, "{}", wrong.text());
    assert_eq!(
        client
            .get(&format!("/v2/a/b/blobs/{}", sha256(b"other")))
            .await
            .status,
        404
    );
    assert_eq!(
        client.get("/v2/a/b/blobs/sha256:../../etc/passwd").await.status / 100,
        4
    );
    assert_eq!(
        client.get("/v2/..%2f..%2fx/manifests/latest").await.status / 100,
        4
    );
}

fn path_of(location: &str) -> String {
    location
        .find("/v2/")
        .map(|at| location[at..].to_owned())
        .expect("a location in the registry")
}

#[tokio::test]
async fn a_manifest_needs_its_blobs_and_comes_back_as_it_was() {
    let server = Server::start().await;
    let client = server.client();
    let image = ImageBuilder::empty()
        .layer(LayerBuilder::default().file("a", 0o644, b"a"))
        .build();
    let early = image.push_manifest(client, "early", "1").await;
    assert_eq!(early.status / 100, 4, "blobs are missing: {}", early.text());
    let pushed = image.push(client, "early", "1").await;
    assert_eq!(pushed.header("docker-content-digest"), image.digest());
    for reference in ["1", &image.digest()] {
        let got = client
            .get(&format!("/v2/early/manifests/{reference}"))
            .await
            .expect(200);
        assert_eq!(got.body, image.manifest);
        assert_eq!(got.header("content-type"), image.media_type);
        assert_eq!(got.header("docker-content-digest"), image.digest());
    }
    assert_eq!(client.get("/v2/early/manifests/absent").await.status, 404);
}

#[tokio::test]
async fn skopeo_pushes_and_pulls() {
    skip_unless!(have("skopeo"), "needs skopeo");
    let server = Server::start().await;
    let scratch = server.scratch();
    let image = ImageBuilder::empty()
        .layer(LayerBuilder::default().file("a", 0o644, b"skopeo was here"))
        .build();
    image.write_layout(&scratch.join("layout"), "v1");
    let credentials = format!("{}:x", server.client().token().unwrap());
    let skopeo = async |from: String, to: String, side: &str| {
        let output = tokio::process::Command::new("skopeo")
            .args([
                "--insecure-policy",
                "copy",
                "-q",
                &format!("--{side}-tls-verify=false"),
                &format!("--{side}-creds"),
                &credentials,
            ])
            .args([&from, &to])
            .output()
            .await
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    let layout = format!("oci:{}:v1", scratch.join("layout").display());
    let remote = format!("docker://{}/tools/skopeo:v1", server.host());
    skopeo(layout, remote.clone(), "dest").await;
    assert_eq!(
        server
            .image_settled(&format!("{}/tools/skopeo:v1", server.host()))
            .await["status"],
        "ready"
    );
    let back = format!("oci:{}:v1", scratch.join("back").display());
    skopeo(remote, back, "src").await;
    let blob = image.digest().replace("sha256:", "back/blobs/sha256/");
    assert_eq!(std::fs::read(scratch.join(blob)).unwrap(), image.manifest);
}
