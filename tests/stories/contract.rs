//! The contract, proven by the clients that people use: the official SDKs, and one that tries everything.
//!
//! Their programs stand in `tests/contract`; `scripts/test` installs the SDKs under `target/contract`.

use std::path::{Path, PathBuf};

use hypeman_tests::{ImageBuilder, LayerBuilder, Server, have, repository, skip_unless};
use serde_json::json;
use tokio::process::Command;

fn installed(name: &str) -> PathBuf {
    let directory = std::env::var_os("HYPEMAN_CONTRACT")
        .map_or_else(|| repository().join("target/contract"), PathBuf::from);
    directory.join(name)
}

async fn drive(program: &Path, arguments: &[&str], directory: &Path, server: &Server, image: &str) {
    let layout = server.scratch().join("layout");
    ImageBuilder::busybox()
        .unwrap()
        .config("Env", json!(["FROM=sdk"]))
        .build()
        .write_layout(&layout, "1");
    // Another server's registry, to pull from with credentials.
    let upstream = Server::start().await;
    let pulled = ImageBuilder::empty()
        .layer(LayerBuilder::default().file("pulled", 0o644, b"by an SDK"))
        .cmd(&["/pulled"])
        .build();
    let pulled = upstream.push(&pulled, "library/pulled", "1").await;
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .env("HYPEMAN_BASE_URL", server.client().base())
        .env("HYPEMAN_API_KEY", server.client().token().unwrap())
        .env("STORY_IMAGE", image)
        .env("STORY_LAYOUT", &layout)
        .env("STORY_UPSTREAM", &pulled)
        .env("STORY_UPSTREAM_USER", upstream.client().token().unwrap())
        .env("STORY_SCRATCH", server.scratch())
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    println!("{said}");
    assert!(
        output.status.success(),
        "{} failed ({}):\n{said}",
        program.display(),
        output.status
    );
}

/// The client deleted what it made, and so did the server.
async fn left_nothing(server: &Server) {
    assert_eq!(server.vmms(), vec![]);
    server.emptied(&["instances", "snapshots", "memory"]).await;
}

#[tokio::test]
async fn the_official_python_sdk_works_unchanged() {
    let python = installed("venv/bin/python");
    skip_unless!(
        python.exists() && have("busybox"),
        "needs scripts/prepare --tests (Python SDK) and busybox-static"
    );
    let server = Server::start().await;
    let image = server.busybox().await;
    drive(
        &python,
        &["contract.py"],
        &repository().join("tests/contract/python"),
        &server,
        &image,
    )
    .await;
    left_nothing(&server).await;
}

#[tokio::test]
async fn the_official_typescript_sdk_works_unchanged() {
    let modules = installed("typescript/node_modules/@onkernel/hypeman");
    skip_unless!(
        modules.exists() && have("busybox"),
        "needs scripts/prepare --tests (TypeScript SDK) and busybox-static"
    );
    let server = Server::start().await;
    let image = server.busybox().await;
    drive(
        Path::new("node"),
        &["contract.mjs"],
        &installed("typescript"),
        &server,
        &image,
    )
    .await;
    left_nothing(&server).await;
}

#[tokio::test]
async fn whatever_a_client_tries_the_answers_are_documented() {
    let schemathesis = installed("venv/bin/schemathesis");
    skip_unless!(
        schemathesis.exists() && have("busybox"),
        "needs scripts/prepare --tests (schemathesis) and busybox-static"
    );
    let server = Server::start().await;
    let image = server.busybox().await;
    let spec = format!("{}/spec.json", server.client().base());
    let token = format!("Authorization: Bearer {}", server.client().token().unwrap());
    let everything = async |before: &[&str], paths: [&str; 2], checks: &str| {
        let mut arguments = before.to_vec();
        arguments.extend(["run", &spec, "--header", &token]);
        arguments.extend(paths);
        arguments.extend(["--checks", checks]);
        arguments.extend(["--phases", "examples,coverage,fuzzing"]);
        arguments.extend(["--max-examples", "40", "--seed", "1"]);
        arguments.extend(["--request-timeout", "60", "--generation-deterministic"]);
        arguments.push("--no-color");
        drive(&schemathesis, &arguments, &server.scratch(), &server, &image).await;
    };
    let answers = "not_a_server_error,status_code_conformance,content_type_conformance";
    let and_bodies = format!("{answers},response_schema_conformance");
    // A stream of events has no end.
    let rest = ["--exclude-path-regex", "/(logs|wait|events)$"];
    everything(&[], rest, &and_bodies).await;

    // What is stopped stays so: whoever waits is answered at once. A log that is followed has no end either.
    let guest = server
        .create(&image, json!({"name": "settled", "cmd": ["true"]}))
        .await;
    guest.wait_for("Stopped").await;
    let settled = server.scratch().join("settled.toml");
    std::fs::write(&settled, "[parameters]\nid = \"settled\"\nfollow = \"false\"\n").unwrap();
    let before = ["--config-file", settled.to_str().unwrap()];
    everything(&before, ["--include-path-regex", "/wait$"], &and_bodies).await;
    // The document describes the stream, and the client would compare each event with that.
    everything(&before, ["--include-path-regex", "/logs$"], answers).await;
    guest.delete().await;
    assert_eq!(server.client().get("/health").await.status, 200);
}
