//! Exec and copy frames, with the real agent running as a part of this process instead of in a VM.

use std::sync::Arc;

use axum::extract::ws::WebSocketUpgrade;
use axum::routing::get;
use futures::{SinkExt as _, StreamExt as _};
use hypeman_guest_api::host::GuestClient;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use crate::handlers;
use crate::state::Stage;

mod copy;
mod exec;
mod guest;

/// A server with the two endpoints in front of one guest.
struct Streams {
    base: String,
    guest: GuestClient,
    /// Dropping it would end all sessions.
    _stage: Arc<watch::Sender<Stage>>,
}

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

impl Streams {
    async fn start() -> Self {
        let client = guest::start().await;
        let (stage, watched) = watch::channel(Stage::Serving);
        let (for_exec, guest) = (client.clone(), client.clone());
        let router = axum::Router::new()
            .route(
                "/exec",
                get(move |upgrade: WebSocketUpgrade| async move {
                    upgrade.on_upgrade(move |socket| {
                        let guest = move || Ok(for_exec.clone());
                        handlers::exec::session(guest, watched, "id".into(), "tester".into(), socket)
                    })
                }),
            )
            .route(
                "/cp",
                get(move |upgrade: WebSocketUpgrade| async move {
                    upgrade.on_upgrade(move |socket| handlers::copy::transfer(client, socket))
                }),
            );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("ws://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            base,
            guest,
            _stage: Arc::new(stage),
        }
    }

    async fn open(&self, path: &str) -> Socket {
        tokio_tungstenite::connect_async(format!("{}{path}", self.base))
            .await
            .unwrap()
            .0
    }

    async fn exec(&self, request: Value) -> Socket {
        let mut socket = self.open("/exec").await;
        send(&mut socket, &request).await;
        socket
    }

    async fn run(&self, request: Value) -> (Vec<u8>, Value) {
        let mut socket = self.exec(request).await;
        finish(&mut socket).await
    }

    async fn upload(&self, request: Value, content: &[u8]) -> Value {
        let mut socket = self.open("/cp").await;
        send(&mut socket, &request).await;
        for chunk in content.chunks(32 * 1024) {
            socket.send(Message::binary(chunk.to_vec())).await.unwrap();
        }
        send(&mut socket, &json!({"type": "end"})).await;
        text(&mut socket).await
    }

    /// All frames of a download; content as strings.
    async fn download(&self, request: Value) -> Vec<Value> {
        let mut socket = self.open("/cp").await;
        send(&mut socket, &request).await;
        let mut frames = Vec::new();
        while let Some(Ok(message)) = socket.next().await {
            match message {
                Message::Text(text) => {
                    let frame: Value = serde_json::from_str(&text).unwrap();
                    if frame["final"] == true {
                        // The server leaves the first word to the client, as SDKs need it.
                        socket.close(None).await.unwrap();
                    }
                    frames.push(frame);
                }
                Message::Binary(data) => {
                    assert!(data.len() <= 32 * 1024);
                    frames.push(Value::from(String::from_utf8(data.to_vec()).unwrap()));
                }
                _ => {}
            }
        }
        frames
    }
}

async fn send(socket: &mut Socket, frame: &Value) {
    socket.send(Message::text(frame.to_string())).await.unwrap();
}

async fn text(socket: &mut Socket) -> Value {
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Text(text) => return serde_json::from_str(&text).unwrap(),
            Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("unexpected {other:?}"),
        }
    }
}

/// Output until the control frame, which must be the last frame.
async fn finish(socket: &mut Socket) -> (Vec<u8>, Value) {
    let mut output = Vec::new();
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Binary(data) => {
                assert!(data.len() <= 32 * 1024, "{}", data.len());
                output.extend_from_slice(&data);
            }
            Message::Text(text) => {
                let control = serde_json::from_str(&text).unwrap();
                assert!(matches!(socket.next().await, Some(Ok(Message::Close(_)))));
                return (output, control);
            }
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn first_frames_that_are_no_request() {
    let streams = Streams::start().await;
    for first in [
        Message::binary(&b"x"[..]),
        Message::text("x"),
        Message::text("[]"),
        Message::text(r#"{"command":"ls"}"#),
    ] {
        let mut socket = streams.open("/exec").await;
        socket.send(first).await.unwrap();
        assert!(text(&mut socket).await["error"].is_string());
    }
    for first in [
        Message::binary(&b"x"[..]),
        Message::text("x"),
        Message::text(r#"{"direction":"up","guest_path":"/x"}"#),
        Message::text(r#"{"direction":"to","guest_path":""}"#),
    ] {
        let mut socket = streams.open("/cp").await;
        socket.send(first).await.unwrap();
        assert_eq!(text(&mut socket).await["type"], "error");
    }
}
