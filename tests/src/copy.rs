//! Copying over WebSocket, frame by frame as the contract has it.

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

use crate::{Client, exec};

/// One entry that came out of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The header frame.
    pub header: Value,
    /// Bytes of a regular file.
    pub bytes: Vec<u8>,
}

impl Entry {
    /// Path as the header has it.
    #[must_use]
    pub fn path(&self) -> &str {
        self.header["path"].as_str().unwrap_or_default()
    }
}

fn control(text: &str) -> Value {
    serde_json::from_str(text).expect("control frame is JSON")
}

async fn next(socket: &mut exec::Socket) -> Option<Message> {
    loop {
        let frame = tokio::time::timeout(crate::PATIENCE, socket.next())
            .await
            .expect("gave up waiting for a cp frame");
        match frame {
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
            Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
            Some(Ok(message)) => return Some(message),
        }
    }
}

/// Sends one file (`bytes`) or directory (`None`) and returns the server's last frame.
pub(crate) async fn send(client: &Client, instance: &str, mut request: Value, bytes: Option<&[u8]>) -> Value {
    let mut socket = exec::connect(client, &format!("/instances/{instance}/cp"))
        .await
        .expect("cp accepted");
    request["direction"] = json!("to");
    request["is_dir"] = json!(bytes.is_none());
    socket
        .send(Message::text(request.to_string()))
        .await
        .expect("request frame");
    for chunk in bytes.unwrap_or_default().chunks(32 * 1024) {
        if socket.send(Message::binary(chunk.to_vec())).await.is_err() {
            break; // The server has refused already; its reason is the next frame.
        }
    }
    let _ = socket.send(Message::text(r#"{"type":"end"}"#)).await;
    match next(&mut socket).await {
        Some(Message::Text(text)) => control(&text),
        other => panic!("cp upload without a result: {other:?}"),
    }
}

/// Starts to send a file and breaks off before the end.
pub(crate) async fn send_and_break_off(client: &Client, instance: &str, guest_path: &str, bytes: &[u8]) {
    let mut socket = exec::connect(client, &format!("/instances/{instance}/cp"))
        .await
        .expect("cp accepted");
    let request = json!({"direction": "to", "guest_path": guest_path, "is_dir": false});
    socket
        .send(Message::text(request.to_string()))
        .await
        .expect("request frame");
    socket.send(Message::binary(bytes.to_vec())).await.expect("chunk");
    socket.close(None).await.expect("close");
}

/// Fetches a file or tree. `Err` is the message of an error frame.
pub(crate) async fn fetch(
    client: &Client,
    instance: &str,
    guest_path: &str,
    follow_links: bool,
) -> Result<Vec<Entry>, String> {
    let mut socket = exec::connect(client, &format!("/instances/{instance}/cp"))
        .await
        .expect("cp accepted");
    let request = json!({"direction": "from", "guest_path": guest_path, "follow_links": follow_links});
    socket
        .send(Message::text(request.to_string()))
        .await
        .expect("request frame");
    let mut entries: Vec<Entry> = Vec::new();
    let mut open = false;
    loop {
        match next(&mut socket).await {
            Some(Message::Binary(bytes)) => {
                assert!(open, "data without a header");
                entries
                    .last_mut()
                    .expect("open entry")
                    .bytes
                    .extend_from_slice(&bytes);
            }
            Some(Message::Text(text)) => {
                let frame = control(&text);
                match frame["type"].as_str() {
                    Some("header") => {
                        assert!(!open, "header before the end of the last entry");
                        open = true;
                        entries.push(Entry {
                            header: frame,
                            bytes: Vec::new(),
                        });
                    }
                    Some("end") => {
                        assert!(open, "end without a header");
                        open = false;
                        let entry = entries.last().expect("open entry");
                        let is_file = entry.header["is_dir"] == false && entry.header["is_symlink"] != true;
                        let size = entry.header["size"].as_u64().expect("size");
                        assert!(
                            !is_file || size == entry.bytes.len() as u64,
                            "size is what came: {entry:?}"
                        );
                        if frame["final"].as_bool().expect("final is a boolean") {
                            return Ok(entries);
                        }
                    }
                    Some("error") => return Err(frame["message"].as_str().unwrap_or_default().to_owned()),
                    _ => panic!("unexpected frame {frame}"),
                }
            }
            other => panic!("cp download without a final frame: {other:?}"),
        }
    }
}
