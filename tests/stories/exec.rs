//! Commands inside a running instance.

use futures::future::join_all;
use hypeman_tests::{ExecSession, Guest, Server, ServerOptions, eventually, have, makes, skip_unless};
use serde_json::json;

#[tokio::test]
async fn commands_stream_take_input_and_report_their_exit() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;

    for code in [0, 1, 42, 255] {
        assert_eq!(guest.shell(&format!("exit {code}")).await.exit_code, code);
    }
    assert_eq!(guest.shell("kill -9 $$").await.exit_code, 137);
    let merged = guest.shell("echo out; echo err >&2").await;
    assert!(merged.text().contains("out") && merged.text().contains("err"));

    let missing = guest.exec(&["/no/such/program"]).await;
    assert_eq!(missing.exit_code, 127);
    assert!(!missing.output.is_empty(), "the reason is told");

    let request =
        json!({"command": ["sh", "-c", "echo $COLOUR $PWD"], "env": {"COLOUR": "red"}, "cwd": "/tmp"});
    assert_eq!(
        guest.exec_session(request).await.finish().await.text(),
        "red /tmp"
    );

    // No terminal: bytes pass as they are, in both directions.
    let bytes: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    let mut session = guest
        .exec_session(json!({"command": ["head", "-c", "100000"]}))
        .await;
    for chunk in bytes.chunks(32 * 1024) {
        session.input(chunk).await;
    }
    let echoed = session.finish().await;
    assert_eq!((echoed.output == bytes, echoed.exit_code), (true, 0));

    // Output streams: the first line comes while the command waits for its answer.
    let mut session = guest
        .exec_session(json!({"command": ["sh", "-c", "echo asked; read answer; echo got $answer"]}))
        .await;
    session.read_until("asked").await;
    session.input(b"it\n").await;
    assert_eq!(session.finish().await.text(), "asked\ngot it");

    // An empty command is a shell.
    let mut shell = guest.exec_session(json!({"command": []})).await;
    shell.input(b"echo from the shell; exit 5\n").await;
    assert_eq!(shell.finish().await.exit_code, 5);
}

#[tokio::test]
async fn a_terminal_has_a_size_that_follows_its_window() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    let mut session = guest
        .exec_session(json!({"command": ["sh"], "tty": true, "rows": 33, "cols": 101}))
        .await;
    session.input(b"stty size\n").await;
    session.read_until("33 101").await;
    session.resize(44, 122).await;
    session.input(b"stty size; tty\n").await;
    session.read_until("44 122").await;
    session.read_until("/dev/pts/").await;
    // Control-C reaches the foreground program, not the shell.
    session
        .input(b"sh -c 'trap \"echo program; exit\" INT; echo begun; while :; do sleep 1; done'\n")
        .await;
    session.read_until("begun\r\n").await;
    session.input(&[3]).await;
    session.read_until("program\r\n").await;
    session.input(b"echo still here\n").await;
    session.read_until("still here\r\n").await;
    session.input(b"exit 9\n").await;
    assert_eq!(session.finish().await.exit_code, 9);
}

#[tokio::test]
async fn a_command_is_ended_by_its_timeout_and_by_a_client_that_leaves() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    let timed = guest
        .exec_session(json!({"command": ["sleep", "4321"], "timeout": 1}))
        .await
        .finish()
        .await;
    assert_eq!(timed.exit_code, 124);
    let count = "ps | grep 'sleep 432[1]' | wc -l";
    assert_eq!(guest.output(count).await, "0");

    let mut session = guest
        .exec_session(json!({"command": ["sh", "-c", "echo on; exec sleep 4322"]}))
        .await;
    session.read_until("on").await;
    drop(session);
    let gone = "n=1; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do n=$(ps | grep 'sleep 432[2]' | wc -l); [ $n = 0 ] && break; sleep 1; done; echo $n";
    assert_eq!(guest.output(gone).await, "0");
}

#[tokio::test]
async fn twenty_sessions_stream_at_once() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    let sessions = (0..20).map(|number| {
        let guest = guest.clone();
        async move {
            let line = format!("i=0; while [ $i -lt 200 ]; do echo {number}:$i; i=$((i+1)); done");
            (number, guest.shell(&line).await)
        }
    });
    for (number, executed) in join_all(sessions).await {
        let expected: Vec<String> = (0..200).map(|i| format!("{number}:{i}")).collect();
        assert_eq!(executed.text(), expected.join("\n"));
    }
}

#[tokio::test]
async fn a_flood_of_output_neither_grows_the_server_nor_blocks_others() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    // Three sessions whose output nobody reads.
    let mut idle = Vec::new();
    for _ in 0..3 {
        idle.push(
            guest
                .exec_session(json!({"command": ["sh", "-c", "exec cat /dev/zero"]}))
                .await,
        );
    }
    let before = resident(server.pid());
    for _ in 0..5 {
        assert_eq!(guest.output("echo alive").await, "alive");
    }
    let grown = resident(server.pid()).saturating_sub(before);
    assert!(grown < 64 << 20, "the server grew by {grown} bytes");
    drop(idle);
    assert_eq!(guest.output("echo alive").await, "alive");
}

fn resident(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    statm.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[tokio::test]
async fn exec_on_a_stopped_instance_is_refused_before_the_upgrade() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.create(&image, json!({"cmd": ["true"]})).await;
    guest.wait_for("Stopped").await;
    let request = json!({"command": ["true"]});
    let (status, body) = ExecSession::start(server.client(), &guest.id, &request)
        .await
        .unwrap_err();
    assert_eq!((status, &body["code"]), (409, &json!("invalid_state")), "{body}");
    assert!(body["message"].as_str().unwrap().contains("Stopped"), "{body}");
    let (status, _) = ExecSession::start(server.client(), "nobody", &request)
        .await
        .unwrap_err();
    assert_eq!(status, 404);
    let stranger = server.client().with_token(None);
    let (status, _) = ExecSession::start(&stranger, &guest.id, &request)
        .await
        .unwrap_err();
    assert_eq!(status, 401);
}

/// Starts a command that waits for a word, on the wire and on the command line; takes a snapshot meanwhile.
async fn snapshot_under_sessions(server: &Server, guest: &Guest, keeps: bool) {
    let waits = "echo asked; read answer; echo got $answer";
    let mut session = guest.exec_session(json!({"command": ["sh", "-c", waits]})).await;
    session.read_until("asked").await;
    let command_line = server.command_line();
    let lasts = "touch /tmp/begun; until test -e /tmp/over; do sleep 0.2; done; exit 3";
    let words = ["exec", &guest.id, "--", "sh", "-c", lasts];
    let told = command_line.run(&words);
    let snapshot = async {
        eventually("the command has begun", || async {
            guest.shell("test -e /tmp/begun").await.exit_code == 0
        })
        .await;
        let snapshot = guest.capture().await;
        assert_eq!(guest.inspect().await["state"], "Running");
        guest.output("touch /tmp/over").await;
        snapshot
    };
    let (told, snapshot) = tokio::join!(told, snapshot);
    if keeps {
        session.input(b"it\n").await;
        let (ended, close) = session.finish_and_close().await;
        assert_eq!((ended.text().as_str(), ended.exit_code), ("asked\ngot it", 0));
        assert_eq!(close, (1000, String::new()));
        assert_eq!(told.code, 3, "{}", told.stderr);
    } else {
        let (ended, close) = session.finish_and_close().await;
        assert!(
            ended.text().contains("Error: ended by a snapshot"),
            "{}",
            ended.text()
        );
        assert_eq!(ended.exit_code, 127);
        assert_eq!(close, (4001, "ended_by_snapshot".to_owned()));
        assert_eq!(told.code, 254, "{}", told.stderr);
        assert!(told.stderr.contains("ended by a snapshot"), "{}", told.stderr);
        assert!(told.stderr.contains("run it again"), "{}", told.stderr);
    }
    // Whoever runs it again is served.
    assert_eq!(guest.output("echo fine").await, "fine");
    snapshot.delete().await;
}

#[tokio::test]
async fn a_snapshot_ends_the_sessions_in_its_guest_only_where_capabilities_say_so() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let capabilities = server.client().get("/capabilities").await.expect(200).json();
    for hypervisor in makes() {
        let runtimes = capabilities["runtimes"].as_array().unwrap();
        let runtime = runtimes.iter().find(|runtime| runtime["name"] == hypervisor);
        let features = runtime.unwrap()["features"].as_array().unwrap();
        let keeps = features.contains(&json!("snapshot-keeps-connections"));
        assert_eq!(keeps, hypervisor != "firecracker", "{hypervisor}: {features:?}");
        let guest = server.run(&image, json!({"hypervisor": hypervisor})).await;
        snapshot_under_sessions(&server, &guest, keeps).await;
        guest.delete().await;
    }
}

#[tokio::test]
async fn a_guest_whose_connections_end_with_a_snapshot_is_reached_anew_and_its_workload_goes_on() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let options = ServerOptions {
        environment: vec![("HYPEMAN_CUT_CONNECTIONS".to_owned(), "1".to_owned())],
        ..ServerOptions::default()
    };
    let server = Server::start_with(options).await;
    let image = server.busybox().await;
    for hypervisor in makes() {
        let guest = server.counting(&image, json!({"hypervisor": hypervisor})).await;
        let counted = guest.count().await;
        snapshot_under_sessions(&server, &guest, false).await;
        guest.goes_on(counted).await;
        guest.delete().await;
    }
}
