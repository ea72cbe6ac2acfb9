//! How a program ends, and what the instance says about it.

use hypeman_tests::{ImageBuilder, LayerBuilder, Server, have, skip_unless};
use serde_json::json;

#[tokio::test]
async fn exit_codes_and_reasons_are_told() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let layer = LayerBuilder::default().file("etc/plain", 0o644, b"not a program");
    let image = ImageBuilder::busybox().unwrap().layer(layer).build();
    let image = server.push(&image, "stories/exits", "1").await;
    let cases: [(&str, &[&str], i64, &str); 5] = [
        ("zero", &["true"], 0, ""),
        ("seven", &["sh", "-c", "exit 7"], 7, ""),
        ("absent", &["/no/such/program"], 127, "not found"),
        ("plain", &["/etc/plain"], 126, "permission denied"),
        ("signal", &["sh", "-c", "kill -9 $$"], 137, "KILL"),
    ];
    for (name, cmd, code, message) in cases {
        let guest = server.create(&image, json!({"name": name, "cmd": cmd})).await;
        guest.wait_for("Stopped").await;
        let instance = guest.inspect().await;
        assert_eq!(instance["exit_code"], code, "{name}: {instance}");
        let said = instance["exit_message"].as_str().unwrap_or_default();
        assert!(
            said.to_lowercase().contains(&message.to_lowercase()),
            "{name}: {said:?} lacks {message:?}"
        );
        guest.delete().await;
    }
}

#[tokio::test]
async fn a_program_that_eats_all_memory_is_told_apart() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let eater = ["sh", "-c", "exec tail /dev/zero"];
    let guest = server.create(&image, json!({"cmd": eater})).await;
    guest.wait_for("Stopped").await;
    let instance = guest.inspect().await;
    assert_eq!(instance["exit_code"], 137, "{instance}");
    let message = instance["exit_message"]
        .as_str()
        .unwrap_or_default()
        .to_lowercase();
    assert!(message.contains("memory"), "{message}");
}

#[tokio::test]
async fn the_image_decides_user_directory_and_environment() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let program =
        "echo user=$(id -u):$(id -g) dir=$(pwd) image=$FROM_IMAGE both=$BOTH home=$HOME; sleep 1000";
    let image = ImageBuilder::busybox()
        .unwrap()
        .config("User", json!("alice"))
        .config("WorkingDir", json!("/srv/here"))
        .config("Env", json!(["FROM_IMAGE=yes", "BOTH=image", "PATH=/bin"]))
        .config("Entrypoint", json!(["/bin/sh", "-c"]))
        .cmd(&[program])
        .build();
    let name = server.push(&image, "stories/config", "1").await;
    let shown = server
        .client()
        .get(&format!("/images/{}", hypeman_tests::encode(&name)))
        .await
        .json();
    assert_eq!(shown["entrypoint"], json!(["/bin/sh", "-c"]));
    assert_eq!(shown["working_dir"], "/srv/here");
    let guest = server.run(&name, json!({"env": {"BOTH": "request"}})).await;
    let line = guest.logs("follow=true").await.wait_for("user=").await;
    assert!(
        line.contains("user=1000:1000 dir=/srv/here image=yes both=request"),
        "{line}"
    );
}

#[tokio::test]
async fn orphans_are_reaped() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    guest
        .output("for i in 1 2 3 4 5 6 7 8; do (sleep 0 & ) ; done; true")
        .await;
    let zombies = "n=1; for i in 1 2 3 4 5 6 7 8 9 10; do n=$(grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l); \
                   [ $n = 0 ] && break; sleep 1; done; echo $n";
    assert_eq!(guest.output(zombies).await, "0");
}
