//! Commands in a guest over the API's WebSocket, without the start of a CLI before each.

use futures::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::http::{HeaderValue, header};

use crate::error::{BenchError, Result};
use crate::server::Server;

/// How much the contract puts into one binary message.
const CHUNK: usize = 32 * 1024;

/// Runs `command` in the guest of `instance` with `input`, and returns what it printed.
///
/// # Errors
/// The server refuses, or the command ends with another code than 0.
pub fn run(server: &Server, instance: &str, command: &[&str], input: &[u8]) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| BenchError::io("start a runtime", error))?;
    runtime.block_on(session(server, instance, command, input))
}

async fn session(server: &Server, instance: &str, command: &[&str], input: &[u8]) -> Result<String> {
    let broken = |error: &dyn std::fmt::Display| BenchError::Answer(format!("exec {command:?}: {error}"));
    let mut request = format!("ws://{}/instances/{instance}/exec", server.address)
        .into_client_request()
        .map_err(|error| broken(&error))?;
    let token = HeaderValue::from_str(&format!("Bearer {}", server.token)).map_err(|error| broken(&error))?;
    request.headers_mut().insert(header::AUTHORIZATION, token);
    let stream = tokio::net::TcpStream::connect(server.address)
        .await
        .map_err(|error| broken(&error))?;
    stream.set_nodelay(true).map_err(|error| broken(&error))?;
    let (mut socket, _) = client_async(request, stream)
        .await
        .map_err(|error| broken(&error))?;
    let first = json!({ "command": command }).to_string();
    let last = json!({ "stdin": "eof" }).to_string();
    let frames = std::iter::once(Message::text(first))
        .chain(input.chunks(CHUNK).map(|chunk| Message::binary(chunk.to_vec())))
        .chain(std::iter::once(Message::text(last)));
    for frame in frames {
        socket.send(frame).await.map_err(|error| broken(&error))?;
    }
    let mut output = Vec::new();
    while let Some(message) = socket.next().await {
        match message.map_err(|error| broken(&error))? {
            Message::Binary(bytes) => output.extend_from_slice(&bytes),
            Message::Text(text) => {
                let end: Value = serde_json::from_str(&text)?;
                let output = String::from_utf8_lossy(&output).into_owned();
                if end["exitCode"] == 0 {
                    return Ok(output);
                }
                return Err(broken(&format!("{end}: {output}")));
            }
            _ => {}
        }
    }
    Err(broken(&"no end was told"))
}
