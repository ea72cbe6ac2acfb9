//! Commands in a guest.

use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use super::{Streams, finish, send, text};

fn sh(script: &str) -> Value {
    json!({"command": ["sh", "-c", script], "tty": false})
}

#[tokio::test(flavor = "multi_thread")]
async fn output_is_merged_and_the_exit_code_comes_alone() {
    let streams = Streams::start().await;
    let (output, control) = streams.run(sh("echo out; echo err >&2; exit 7")).await;
    let mut lines: Vec<&str> = std::str::from_utf8(&output).unwrap().lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["err", "out"]);
    assert_eq!(control, json!({"exitCode": 7}));
}

#[tokio::test(flavor = "multi_thread")]
async fn environment_and_directory() {
    let streams = Streams::start().await;
    let mut request = sh("echo $WORD; pwd");
    request["env"] = json!({"WORD": "hello"});
    request["cwd"] = json!("/usr");
    assert_eq!(
        streams.run(request).await,
        (b"hello\n/usr\n".to_vec(), json!({"exitCode": 0}))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_run_says_so_and_exits_127() {
    let streams = Streams::start().await;
    let (output, control) = streams.run(json!({"command": ["/no/such/program"]})).await;
    assert!(
        output.starts_with(b"Error: ") && output.ends_with(b"\r\n"),
        "{:?}",
        String::from_utf8_lossy(&output)
    );
    assert_eq!(control, json!({"exitCode": 127}));
}

#[tokio::test(flavor = "multi_thread")]
async fn input_reaches_the_command_and_can_end() {
    let streams = Streams::start().await;
    let mut socket = streams.exec(sh("cat; echo done")).await;
    socket
        .send(Message::binary(&b"binary \xff\0 input\n"[..]))
        .await
        .unwrap();
    socket.send(Message::text("typed text\n")).await.unwrap();
    send(&mut socket, &json!({"stdin": "eof"})).await;
    let (output, control) = finish(&mut socket).await;
    assert_eq!(output, b"binary \xff\0 input\ntyped text\ndone\n");
    assert_eq!(control, json!({"exitCode": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn much_data_both_ways_at_once() {
    let streams = Streams::start().await;
    let mut socket = streams.exec(sh("cat")).await;
    let input: Vec<u8> = (0..3u32 << 20)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let expected = input.clone();
    let (mut sink, mut stream) = socket.split();
    let sender = tokio::spawn(async move {
        // One message of several megabytes, as the SDK sends its input.
        sink.send(Message::binary(input)).await.unwrap();
        sink.send(Message::text(r#"{"stdin":"eof"}"#)).await.unwrap();
        sink
    });
    let mut output = Vec::new();
    loop {
        match stream.next().await.unwrap().unwrap() {
            Message::Binary(data) => output.extend_from_slice(&data),
            Message::Text(text) => {
                assert_eq!(text, r#"{"exitCode":0}"#);
                break;
            }
            _ => {}
        }
    }
    assert!(output == expected);
    socket = sender.await.unwrap().reunite(stream).unwrap();
    let _ = socket.close(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_a_size_that_changes() {
    let streams = Streams::start().await;
    let request =
        json!({"command": ["sh", "-c", "stty size; read x; stty size"], "tty": true, "rows": 30, "cols": 90});
    let mut socket = streams.exec(request).await;
    let mut output = Vec::new();
    while !output.ends_with(b"30 90\r\n") {
        if let Message::Binary(data) = socket.next().await.unwrap().unwrap() {
            output.extend_from_slice(&data);
        }
    }
    send(&mut socket, &json!({"resize": {"rows": 40, "cols": 120}})).await;
    socket.send(Message::binary(&b"\n"[..])).await.unwrap();
    let (rest, control) = finish(&mut socket).await;
    assert!(String::from_utf8_lossy(&rest).contains("40 120"), "{rest:?}");
    assert_eq!(control, json!({"exitCode": 0}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_timeout_ends_the_command() {
    let streams = Streams::start().await;
    let mut request = sh("sleep 1000");
    request["timeout"] = json!(1);
    assert_eq!(streams.run(request).await.1, json!({"exitCode": 124}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_connection_breaks_is_a_failure_and_a_snapshot_is_told_as_the_reason() {
    for captured in [false, true] {
        let streams = Streams::start().await;
        let mut socket = streams.exec(sh("echo ready; exec sleep 1000")).await;
        assert_eq!(socket.next().await.unwrap().unwrap().into_data(), "ready\n");
        if captured {
            streams.guest.note_captured();
        }
        streams.guest.close();
        let reason = socket.next().await.unwrap().unwrap().into_data();
        let reason = String::from_utf8_lossy(&reason);
        assert!(
            reason.starts_with("Error: ") && reason.ends_with("\r\n"),
            "{reason:?}"
        );
        assert_eq!(reason.contains("ended by a snapshot"), captured, "{reason:?}");
        // As it was before the close frame told anything.
        assert_eq!(text(&mut socket).await, json!({"exitCode": 127}));
        let Some(Ok(Message::Close(Some(close)))) = socket.next().await else {
            panic!("no close frame");
        };
        let told = (u16::from(close.code), close.reason.as_str());
        let expected = match captured {
            true => (4001, "ended_by_snapshot"),
            false => (1000, ""),
        };
        assert_eq!(told, expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_takes_its_command_along() {
    let streams = Streams::start().await;
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("held");
    std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    // The reader sees the end of the pipe when the command that holds it open is gone.
    let mut socket = streams
        .exec(sh(&format!(
            "exec 3>{}; echo ready; exec sleep 1000",
            pipe.display()
        )))
        .await;
    let reader = tokio::spawn({
        let pipe = pipe.clone();
        async move { tokio::fs::read(pipe).await.unwrap() }
    });
    assert_eq!(socket.next().await.unwrap().unwrap().into_data(), "ready\n");
    drop(socket);
    assert!(reader.await.unwrap().is_empty());
}
