//! A registry that asks nobody for credentials, and can be made to stop in the middle of a layer.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::{Image, PATIENCE, sha256};

/// Only what is larger than this stops: layers, but neither manifests nor configurations.
const LARGE: usize = 64 << 10;

/// The registry. It ends when it is dropped.
#[derive(Debug)]
pub struct Upstream {
    host: String,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    /// Media type and bytes by tag or digest.
    content: Mutex<HashMap<String, (&'static str, Vec<u8>)>>,
    holding: watch::Sender<bool>,
    /// Answers that stopped in their middle so far.
    stopped: watch::Sender<u32>,
}

impl Upstream {
    /// Starts one on a free port.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listener");
        let host = listener.local_addr().expect("address").to_string();
        let shared = Arc::new(Shared {
            content: Mutex::default(),
            holding: watch::Sender::new(false),
            stopped: watch::Sender::new(0),
        });
        let serving = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, Arc::clone(&serving)));
            }
        });
        Self { host, shared, task }
    }

    /// Offers an image; its full name. The tag must be of no other image.
    pub fn offer(&self, image: &Image, repository: &str, tag: &str) -> String {
        let mut content = self.shared.content.lock().unwrap();
        for (digest, bytes) in &image.blobs {
            content.insert(digest.clone(), ("application/octet-stream", bytes.clone()));
        }
        for key in [tag.to_owned(), image.digest()] {
            content.insert(key, (image.media_type, image.manifest.clone()));
        }
        format!("{}/{repository}:{tag}", self.host)
    }

    /// Layers stop in their middle from now on.
    pub fn hold(&self) {
        self.shared.holding.send_replace(true);
    }

    /// What stands still goes on, and nothing stops any more.
    pub fn release(&self) {
        self.shared.holding.send_replace(false);
    }

    /// Waits until a layer has stopped.
    pub async fn stopped(&self) {
        let mut stopped = self.shared.stopped.subscribe();
        let waited = tokio::time::timeout(PATIENCE, stopped.wait_for(|count| *count > 0)).await;
        assert!(waited.is_ok(), "gave up waiting: nobody fetches the layer");
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Answers the one request of a connection.
async fn answer(mut stream: TcpStream, shared: Arc<Shared>) -> io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let mut words = head.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let key = path.rsplit('/').next().unwrap_or_default();
    let found = shared.content.lock().unwrap().get(key).cloned();
    let Some((kind, bytes)) = found else {
        let absent = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        return stream.write_all(absent.as_bytes()).await;
    };
    let (size, start) = (bytes.len(), start_of(&head).unwrap_or(0));
    let status = match start {
        0 => "200 OK".to_owned(),
        _ => format!(
            "206 Partial Content\r\ncontent-range: bytes {start}-{}/{size}",
            size - 1
        ),
    };
    let (length, digest) = (size - start, sha256(&bytes));
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\
         docker-content-digest: {digest}\r\nconnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    if method == "HEAD" {
        return stream.shutdown().await;
    }
    let mut holding = shared.holding.subscribe();
    let stops = size > LARGE && *holding.borrow();
    let middle = if stops { start.max(size / 2) } else { size };
    stream.write_all(&bytes[start..middle]).await?;
    if stops {
        stream.flush().await?;
        shared.stopped.send_modify(|count| *count += 1);
        let _ = holding.wait_for(|holding| !*holding).await;
        stream.write_all(&bytes[middle..]).await?;
    }
    stream.shutdown().await
}

/// Where a `Range` header wants the answer to begin.
fn start_of(head: &str) -> Option<usize> {
    let lowered = head.to_ascii_lowercase();
    let (_, rest) = lowered.split_once("\r\nrange: bytes=")?;
    rest.split_once('-')?.0.parse().ok()
}
