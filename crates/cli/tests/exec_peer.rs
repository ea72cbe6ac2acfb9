//! Exec sessions against a peer that behaves, and against peers that do not.

// Helpers of tests may panic like the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{bytes, connection, next_json, say, text};
use futures::StreamExt as _;
use hypeman_api::exec::ExecRequest;
use hypeman_cli::error::CliError;
use hypeman_cli::exec::{Input, session};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

fn request(tty: bool) -> ExecRequest {
    ExecRequest {
        command: vec!["cat".to_owned()],
        tty,
        ..ExecRequest::default()
    }
}

/// Runs a session against frames that the peer sends whatever the client says.
async fn against(frames: Vec<Message>) -> (Result<u8, CliError>, Vec<u8>) {
    let (client, mut peer) = connection().await;
    let playing = tokio::spawn(async move {
        next_json(&mut peer).await;
        say(&mut peer, frames).await;
    });
    let (_sender, input) = mpsc::channel(1);
    let mut output = Vec::new();
    let outcome = session(client, &request(false), input, |bytes| {
        output.extend_from_slice(bytes);
        Ok(())
    })
    .await;
    playing.await.unwrap();
    (outcome, output)
}

#[tokio::test]
async fn output_is_binary_safe_and_the_exit_code_is_the_commands_own() {
    let all: Vec<u8> = (0..=255).collect();
    let (outcome, output) = against(vec![
        bytes(&all),
        bytes(b""),
        bytes(&all),
        text(r#"{"exitCode":42}"#),
    ])
    .await;
    assert_eq!(outcome.unwrap(), 42);
    assert_eq!(output, [all.clone(), all].concat());
}

#[tokio::test]
async fn input_resizes_and_its_end_reach_the_guest_in_order() {
    let (client, mut peer) = connection().await;
    let guest = tokio::spawn(async move {
        let first = next_json(&mut peer).await;
        assert_eq!(first, json!({"command": ["cat"], "tty": false}));
        let mut heard = Vec::new();
        while let Some(Ok(frame)) = peer.next().await {
            match frame {
                Message::Binary(bytes) => heard.extend_from_slice(&bytes),
                Message::Text(frame) => {
                    assert_eq!(frame.as_str(), r#"{"stdin":"eof"}"#);
                    break;
                }
                _ => {}
            }
        }
        say(&mut peer, vec![bytes(&heard), text(r#"{"exitCode":0}"#)]).await;
    });
    let (sender, input) = mpsc::channel(4);
    sender.send(Input::Bytes(b"one ".to_vec())).await.unwrap();
    // Without a terminal there is no size to change.
    sender.send(Input::Resize { rows: 1, columns: 1 }).await.unwrap();
    sender.send(Input::Bytes(b"two".to_vec())).await.unwrap();
    sender.send(Input::End).await.unwrap();
    let mut output = Vec::new();
    let request = request(false);
    let code = session(client, &request, input, |bytes| {
        output.extend_from_slice(bytes);
        Ok(())
    });
    assert_eq!(code.await.unwrap(), 0);
    assert_eq!(output, b"one two");
    guest.await.unwrap();
}

#[tokio::test]
async fn a_terminal_sends_its_size_and_ends_input_with_a_character() {
    let (client, mut peer) = connection().await;
    let guest = tokio::spawn(async move {
        next_json(&mut peer).await;
        assert_eq!(
            next_json(&mut peer).await,
            json!({"resize": {"rows": 40, "cols": 120}})
        );
        assert_eq!(peer.next().await.unwrap().unwrap(), bytes(&[4]));
        say(&mut peer, vec![text(r#"{"exitCode":0}"#)]).await;
    });
    let (sender, input) = mpsc::channel(4);
    sender
        .send(Input::Resize {
            rows: 40,
            columns: 120,
        })
        .await
        .unwrap();
    sender.send(Input::End).await.unwrap();
    assert_eq!(
        session(client, &request(true), input, |_| Ok(())).await.unwrap(),
        0
    );
    guest.await.unwrap();
}

#[tokio::test]
async fn much_input_and_much_output_at_once_do_not_block_each_other() {
    let (client, peer) = connection().await;
    let echo = tokio::spawn(async move {
        let (mut out, mut heard) = peer.split();
        let mut first = true;
        while let Some(Ok(frame)) = heard.next().await {
            use futures::SinkExt as _;
            match frame {
                Message::Text(_) if first => first = false,
                Message::Text(_) => break,
                frame => out.send(frame).await.unwrap(),
            }
        }
        use futures::SinkExt as _;
        out.send(text(r#"{"exitCode":3}"#)).await.unwrap();
    });
    let (sender, input) = mpsc::channel(2);
    let feeding = tokio::spawn(async move {
        for _ in 0..256 {
            sender.send(Input::Bytes(vec![7; 32 * 1024])).await.unwrap();
        }
        sender.send(Input::End).await.unwrap();
    });
    let mut count = 0;
    let request = request(false);
    let code = session(client, &request, input, |bytes| {
        count += bytes.len();
        Ok(())
    });
    assert_eq!(code.await.unwrap(), 3);
    assert_eq!(count, 256 * 32 * 1024);
    feeding.await.unwrap();
    echo.await.unwrap();
}

#[tokio::test]
async fn peers_that_misbehave_are_failures_and_never_success() {
    let cases: Vec<(Vec<Message>, &str)> = vec![
        (vec![], "closed before the command ended"),
        (
            vec![bytes(b"half"), Message::Close(None)],
            "closed before the command ended",
        ),
        (vec![text("nonsense")], "not a message"),
        (vec![text(r#"{"exitCode":"0"}"#)], "not a message"),
        (vec![text(r#"{"exitCode":null}"#)], "not a message"),
        (vec![text("[]")], "not a message"),
        (vec![text(r#"{"error":"no agent"}"#)], "no agent"),
    ];
    for (frames, expected) in cases {
        let (outcome, _) = against(frames).await;
        let failure = outcome.expect_err(expected);
        assert!(failure.to_string().contains(expected), "{failure}");
    }
}

#[tokio::test]
async fn a_close_frame_tells_that_a_snapshot_ended_the_session() {
    let close = |code: u16, reason: &'static str| {
        Message::Close(Some(CloseFrame {
            code: code.into(),
            reason: reason.into(),
        }))
    };
    let cut = vec![
        bytes(b"Error: ended by a snapshot\r\n"),
        text(r#"{"exitCode":127}"#),
        close(4001, "ended_by_snapshot"),
    ];
    let (outcome, _) = against(cut).await;
    let failure = CliError::Exec(Box::new(outcome.unwrap_err()));
    assert_eq!((failure.code(), failure.exit_code()), ("ended_by_snapshot", 254));
    assert!(failure.to_string().contains("ended by a snapshot"), "{failure}");
    assert!(failure.hint().unwrap().contains("run it again"));

    // A command of which 127 is the own code, and one that ended before a snapshot.
    for (frames, expected) in [
        (vec![text(r#"{"exitCode":127}"#), close(1000, "")], 127),
        (vec![text(r#"{"exitCode":127}"#)], 127),
        (
            vec![text(r#"{"exitCode":3}"#), close(4001, "ended_by_snapshot")],
            3,
        ),
    ] {
        assert_eq!(against(frames).await.0.unwrap(), expected);
    }
}

#[tokio::test]
async fn output_that_cannot_be_written_ends_the_session() {
    let (client, mut peer) = connection().await;
    tokio::spawn(async move {
        next_json(&mut peer).await;
        say(&mut peer, vec![bytes(b"x"), text(r#"{"exitCode":0}"#)]).await;
    });
    let (_sender, input) = mpsc::channel(1);
    let outcome = session(client, &request(false), input, |_| {
        Err(std::io::ErrorKind::BrokenPipe.into())
    })
    .await;
    assert!(matches!(outcome, Err(CliError::Io { .. })), "{outcome:?}");
}
