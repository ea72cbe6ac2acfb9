//! What a program prints, kept and streamed.

use hypeman_tests::{Server, ServerOptions, have, skip_unless};
use serde_json::json;

#[tokio::test]
async fn logs_tail_and_follow() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let program = "i=1; while [ $i -le 300 ]; do echo line $i; i=$((i+1)); done; \
                   until test -e /tmp/go; do sleep 1; done; echo the end; sleep 1000";
    let guest = server.run(&image, json!({"cmd": ["sh", "-c", program]})).await;
    guest.logs("follow=true").await.wait_for("line 300").await;

    let last = guest.logs("tail=5").await.all().await;
    assert_eq!(last, (296..=300).map(|i| format!("line {i}")).collect::<Vec<_>>());
    assert_eq!(
        guest.logs("").await.all().await.len(),
        100,
        "a hundred unless told otherwise"
    );
    let mut follower = guest.logs("tail=1&follow=true").await;
    assert_eq!(follower.next().await.unwrap(), "line 300");
    guest.output("touch /tmp/go").await;
    follower.wait_for("the end").await;

    assert!(
        !guest.logs("source=vmm").await.all().await.is_empty(),
        "the console is there"
    );
    assert!(
        !guest.logs("source=hypeman").await.all().await.is_empty(),
        "so is what the server did"
    );
    let status = client
        .get(&format!("/instances/{}/logs?source=nonsense", guest.id))
        .await
        .status;
    assert_eq!(status, 400);
    assert_eq!(
        client
            .get(&format!("/instances/{}/logs?tail=-1", guest.id))
            .await
            .status,
        400
    );
    client
        .get("/instances/nobody/logs")
        .await
        .refused(404, "not_found");
}

#[tokio::test]
async fn a_line_of_a_megabyte_survives() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let program = "head -c 1048576 /dev/zero | tr '\\0' x; echo; echo after; sleep 1000";
    let guest = server.run(&image, json!({"cmd": ["sh", "-c", program]})).await;
    guest.logs("follow=true").await.wait_for("after").await;
    let lines = guest.logs("tail=10").await.all().await;
    let long = &lines[lines.len() - 2];
    assert_eq!(long.len(), 1 << 20);
    assert!(long.bytes().all(|byte| byte == b'x'));
}

#[tokio::test]
async fn rotation_loses_and_repeats_no_line() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let settings = vec![
        ("logging.max_size", json!("64KB")),
        ("logging.max_files", json!(100)),
        ("logging.rotate_interval", json!("200ms")),
    ];
    let server = Server::start_with(ServerOptions {
        settings,
        ..ServerOptions::default()
    })
    .await;
    let image = server.busybox().await;
    let program = "i=1; while [ $i -le 12000 ]; do echo number $i of a log that goes on and on; i=$((i+1)); done; echo done; sleep 1000";
    let guest = server.create(&image, json!({"cmd": ["sh", "-c", program]})).await;
    guest.wait_for("Running").await;
    let mut follower = guest.logs("tail=100000&follow=true").await;
    let mut expected = 1;
    while let Some(line) = follower.next().await {
        if line == "done" {
            break;
        }
        if line.starts_with("number ") {
            assert_eq!(line, format!("number {expected} of a log that goes on and on"));
            expected += 1;
        }
    }
    assert_eq!(expected, 12_001);
}

#[tokio::test]
async fn a_log_that_floods_is_rotated_before_its_turn() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let settings = vec![
        ("logging.max_size", json!("64KB")),
        ("logging.max_files", json!(1)),
        ("logging.rotate_interval", json!("24h")),
    ];
    let server = Server::start_with(ServerOptions {
        settings,
        ..ServerOptions::default()
    })
    .await;
    let image = server.busybox().await;
    let program = "i=1; while :; do echo line $i of a flood that does not end; i=$((i+1)); done";
    let guest = server.run(&image, json!({"cmd": ["sh", "-c", program]})).await;
    hypeman_tests::eventually("the first line is rotated away", || async {
        let lines = guest.logs("tail=10000000").await.all().await;
        !lines.is_empty() && !lines.contains(&"line 1 of a flood that does not end".to_owned())
    })
    .await;
}

#[tokio::test]
async fn two_hundred_logs_are_followed_at_once() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let program = "until test -e /tmp/go; do sleep 1; done; echo the end; sleep 1000";
    let guest = server.run(&image, json!({"cmd": ["sh", "-c", program]})).await;
    let mut followers = Vec::new();
    for _ in 0..200 {
        followers.push(guest.logs("follow=true").await);
    }
    guest.output("touch /tmp/go").await;
    for follower in &mut followers {
        follower.wait_for("the end").await;
    }
    guest.delete().await;
    for mut follower in followers {
        while follower.next().await.is_some() {}
    }
}

#[tokio::test]
async fn the_log_goes_on_while_the_server_is_down() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let program = "i=1; while :; do echo tick $i; i=$((i+1)); sleep 1; done";
    let guest = server.run(&image, json!({"cmd": ["sh", "-c", program]})).await;
    guest.logs("follow=true").await.wait_for("tick 2").await;
    server.kill();
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    server.start_again().await;
    guest
        .logs("follow=true&tail=10000")
        .await
        .wait_for("tick 6")
        .await;
    let ticks: Vec<String> = guest
        .logs("tail=10000")
        .await
        .all()
        .await
        .into_iter()
        .filter(|line| line.starts_with("tick"))
        .collect();
    let expected: Vec<String> = (1..=ticks.len()).map(|i| format!("tick {i}")).collect();
    assert_eq!(ticks, expected);
}
