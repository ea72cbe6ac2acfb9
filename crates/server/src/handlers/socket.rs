//! What the two WebSocket endpoints share: the upgrade, limits, and the end of a connection.

use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::http::StatusCode;
use futures::{Sink, SinkExt as _, Stream, StreamExt as _};

use crate::error::ApiError;

/// Largest message of a client. SDKs send their input as one message, so it is far above what the server sends.
pub const MAX_MESSAGE: usize = 16 << 20;

/// How long a client may take with its first frame.
pub const FIRST_FRAME: Duration = Duration::from_secs(30);

/// Pause between two pings: a vanished client is noticed by them.
pub const PING: Duration = Duration::from_secs(30);

/// How long a client may take to read what is sent.
pub const SEND_STALL: Duration = Duration::from_secs(120);

/// Accepts the upgrade, from any origin, with our limits.
///
/// # Errors
/// 400 for a request that is no WebSocket handshake.
pub fn accept(
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<WebSocketUpgrade, ApiError> {
    upgrade
        .map(|upgrade| upgrade.max_message_size(MAX_MESSAGE).max_frame_size(MAX_MESSAGE))
        .map_err(|_| {
            ApiError::layer(
                StatusCode::BAD_REQUEST,
                "this endpoint needs a WebSocket handshake",
            )
        })
}

/// The first text frame, or `None` when the client sent anything else or nothing in time.
pub async fn first_text<S>(socket: &mut S) -> Option<String>
where
    S: Stream<Item = Result<Message, axum::Error>> + Unpin,
{
    let first = async {
        loop {
            match socket.next().await {
                Some(Ok(Message::Text(text))) => return Some(text.as_str().to_owned()),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                _ => return None,
            }
        }
    };
    tokio::time::timeout(FIRST_FRAME, first).await.ok().flatten()
}

/// Sends a frame; `false` when the client is gone or does not read.
pub async fn send<S>(socket: &mut S, message: Message) -> bool
where
    S: Sink<Message, Error = axum::Error> + Unpin,
{
    matches!(
        tokio::time::timeout(SEND_STALL, socket.send(message)).await,
        Ok(Ok(()))
    )
}

/// Sends a value as a text frame; `false` when the client is gone.
pub async fn send_json<S, T>(socket: &mut S, value: &T) -> bool
where
    S: Sink<Message, Error = axum::Error> + Unpin,
    T: serde::Serialize,
{
    match serde_json::to_string(value) {
        Ok(text) => send(socket, Message::Text(text.into())).await,
        Err(_) => false,
    }
}

/// The frame that ends a session which went well.
pub fn goodbye() -> Message {
    goodbye_because(close_code::NORMAL, "")
}

/// The frame that ends a session for a reason that its endpoint defines.
pub fn goodbye_because(code: u16, reason: &'static str) -> Message {
    Message::Close(Some(CloseFrame {
        code,
        reason: reason.into(),
    }))
}

/// How long a client may take to close a connection after the last frame.
const CLIENT_CLOSES: Duration = Duration::from_secs(10);

/// Lets the client close first, then closes in order. For answers after which a client still has work to do and takes
/// an early end of the connection for a failure.
pub async fn close_after_client(mut socket: WebSocket) {
    let silence = async { while let Some(Ok(_)) = socket.next().await {} };
    if tokio::time::timeout(CLIENT_CLOSES, silence).await.is_err() {
        close(socket).await;
    }
}

/// Closes in order: says so, then waits shortly for the client's answer, so that no last frame is lost to a
/// connection that is reset.
pub async fn close(mut socket: WebSocket) {
    if !send(&mut socket, goodbye()).await {
        return;
    }
    let drain = async { while let Some(Ok(_)) = socket.next().await {} };
    let _ = tokio::time::timeout(Duration::from_secs(5), drain).await;
}
