//! A peer that plays the server's side of a WebSocket, well or badly.

#![allow(dead_code, clippy::expect_used)]

use futures::{SinkExt as _, StreamExt as _};
use tokio::io::DuplexStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

/// One end of a connection.
pub type End = WebSocketStream<DuplexStream>;

/// A connection in memory: the client's end and the peer's.
pub async fn connection() -> (End, End) {
    let (client, peer) = tokio::io::duplex(64 * 1024);
    (
        WebSocketStream::from_raw_socket(client, Role::Client, None).await,
        WebSocketStream::from_raw_socket(peer, Role::Server, None).await,
    )
}

/// Waits for the next text frame and reads it as JSON.
pub async fn next_json(peer: &mut End) -> serde_json::Value {
    loop {
        match peer.next().await {
            Some(Ok(Message::Text(text))) => return serde_json::from_str(text.as_str()).expect("JSON"),
            Some(Ok(_)) => {}
            other => panic!("no text frame: {other:?}"),
        }
    }
}

/// Sends frames; a client that has hung up already is fine.
pub async fn say(peer: &mut End, frames: Vec<Message>) {
    for frame in frames {
        if peer.send(frame).await.is_err() {
            return;
        }
    }
}

/// A text frame.
pub fn text(text: impl Into<String>) -> Message {
    Message::text(text.into())
}

/// A binary frame.
pub fn bytes(bytes: &[u8]) -> Message {
    Message::binary(bytes.to_vec())
}
