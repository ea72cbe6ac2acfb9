//! A registry that behaves, until a test tells it not to.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use hypeman_images::manifest::media_type;
use hypeman_images::registry::RetryPolicy;
use hypeman_images::{
    BlobStore, BlobStoreOptions, ClientOptions, Descriptor, Digest, Manifest, Platform, Reference,
    RegistryClient, TransferEvent, TransferObserver,
};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Keeps what a transfer reports.
#[derive(Default)]
pub struct Recorder {
    pub events: Mutex<Vec<TransferEvent>>,
    pub cancel: CancellationToken,
    pub cancel_at: Option<u64>,
}

impl TransferObserver for Recorder {
    fn event(&self, event: &TransferEvent) {
        if let (TransferEvent::Progress { total_done, .. }, Some(limit)) = (event, self.cancel_at)
            && *total_done >= limit
        {
            self.cancel.cancel();
        }
        self.events.lock().unwrap().push(event.clone());
    }

    fn cancellation(&self) -> CancellationToken {
        self.cancel.clone()
    }
}

/// One request as the registry saw it.
#[derive(Debug, Clone)]
pub struct Seen {
    pub method: Method,
    pub path: String,
    pub query: String,
    pub headers: HeaderMap,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    pub fn authorization(&self) -> Option<&str> {
        self.header("authorization")
    }

    pub fn is_get_of(&self, part: &str) -> bool {
        self.method == Method::GET && self.path.contains(part)
    }
}

type Hook = Box<dyn Fn(&Seen) -> Option<Response> + Send + Sync>;

#[derive(Default)]
pub struct Content {
    pub manifests: HashMap<String, (String, Bytes)>,
    pub blobs: HashMap<String, Bytes>,
    uploads: HashMap<String, Vec<u8>>,
}

struct Shared {
    content: Mutex<Content>,
    hooks: Mutex<Vec<Hook>>,
    seen: Mutex<Vec<Seen>>,
}

pub struct Registry {
    pub address: SocketAddr,
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Registry {
    pub async fn start() -> Self {
        Self::start_on("127.0.0.1").await
    }

    /// Addresses of the loopback network stand in for different hosts.
    pub async fn start_on(host: &str) -> Self {
        let listener = tokio::net::TcpListener::bind((host, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            content: Mutex::default(),
            hooks: Mutex::default(),
            seen: Mutex::default(),
        });
        let router = Router::new().fallback(handle).with_state(shared.clone());
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            address,
            shared,
            server,
        }
    }

    pub fn reference(&self, name: &str) -> Reference {
        Reference::parse(&format!("{}/{name}", self.address)).unwrap()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// Answers instead of the registry where the hook gives an answer. Later hooks are asked first.
    pub fn hook(&self, hook: impl Fn(&Seen) -> Option<Response> + Send + Sync + 'static) {
        self.shared.hooks.lock().unwrap().push(Box::new(hook));
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    pub fn count(&self, matches: impl Fn(&Seen) -> bool) -> usize {
        self.seen().iter().filter(|seen| matches(seen)).count()
    }

    pub fn content<T>(&self, look: impl FnOnce(&mut Content) -> T) -> T {
        look(&mut self.shared.content.lock().unwrap())
    }

    pub fn add_blob(&self, bytes: impl Into<Bytes>) -> (Digest, u64) {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        let size = bytes.len() as u64;
        self.content(|content| content.blobs.insert(digest.to_string(), bytes));
        (digest, size)
    }

    pub fn add_manifest(&self, selectors: &[&str], kind: &str, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.content(|content| {
            content
                .manifests
                .insert(digest.to_string(), (kind.to_owned(), bytes.clone()));
            for selector in selectors {
                content
                    .manifests
                    .insert((*selector).to_owned(), (kind.to_owned(), bytes.clone()));
            }
        });
        digest
    }

    /// Adds an image for an architecture with these layers.
    pub fn add_image(&self, selectors: &[&str], architecture: &str, layers: &[Bytes]) -> Manifest {
        let config = config_for(architecture, layers);
        let (digest, size) = self.add_blob(config);
        let layers: Vec<Descriptor> = layers
            .iter()
            .map(|layer| {
                let (digest, size) = self.add_blob(layer.clone());
                Descriptor::new(media_type::OCI_LAYER, digest, size)
            })
            .collect();
        let config = Descriptor::new(media_type::OCI_CONFIG, digest, size);
        let manifest = Manifest::assemble(media_type::OCI_MANIFEST, config, layers).unwrap();
        self.add_manifest(selectors, media_type::OCI_MANIFEST, manifest.raw.clone());
        manifest
    }
}

pub fn config_for(architecture: &str, layers: &[Bytes]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::of(layer).to_string()).collect();
    serde_json::to_vec(&serde_json::json!({
        "os": "linux",
        "architecture": architecture,
        "config": {"Cmd": ["/bin/true"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }))
    .unwrap()
}

/// Bytes that look random and are always the same.
pub fn noise(seed: u64, size: usize) -> Bytes {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes.into()
}

pub fn client() -> RegistryClient {
    client_with(|_| {})
}

/// A client that repeats quickly and sees no stored credentials.
pub fn client_with(change: impl FnOnce(&mut ClientOptions)) -> RegistryClient {
    let retry = RetryPolicy {
        attempts: 4,
        base: Duration::from_millis(2),
        cap: Duration::from_millis(10),
        max_retry_after: Duration::from_secs(2),
    };
    let mut options = ClientOptions {
        retry,
        idle_timeout: Duration::from_secs(10),
        ..ClientOptions::default()
    };
    change(&mut options);
    RegistryClient::new(options).unwrap()
}

pub async fn store() -> (tempfile::TempDir, BlobStore) {
    let dir = tempfile::tempdir().unwrap();
    let store = BlobStore::open(dir.path(), BlobStoreOptions::default())
        .await
        .unwrap();
    (dir, store)
}

pub fn amd64() -> Platform {
    Platform::linux("amd64")
}

pub fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response {
    let mut response = Response::builder().status(status);
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(body.into()).unwrap()
}

/// A body that announces more than it brings: the connection breaks in the middle.
pub fn broken_body(bytes: Bytes) -> Body {
    let pieces = [Ok(bytes), Err(std::io::Error::other("cable cut"))];
    // A pause lets the first piece reach the client before the connection dies.
    let stream = futures::StreamExt::then(futures::stream::iter(pieces), |piece| async {
        if piece.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        piece
    });
    Body::from_stream(stream)
}

async fn handle(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let seen = Seen {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers,
    };
    shared.seen.lock().unwrap().push(seen.clone());
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let hooked = shared
        .hooks
        .lock()
        .unwrap()
        .iter()
        .rev()
        .find_map(|hook| hook(&seen));
    hooked.unwrap_or_else(|| serve(&mut shared.content.lock().unwrap(), &seen, body))
}

fn serve(content: &mut Content, seen: &Seen, body: Bytes) -> Response {
    let not_found = || {
        answer(
            404,
            &[],
            r#"{"errors":[{"code":"NOT_FOUND","message":"not here"}]}"#,
        )
    };
    if let Some((_, selector)) = seen.path.split_once("/manifests/") {
        if seen.method == Method::PUT {
            let kind = seen.header("content-type").unwrap_or_default().to_owned();
            let digest = Digest::of(&body).to_string();
            content
                .manifests
                .insert(selector.to_owned(), (kind.clone(), body.clone()));
            content.manifests.insert(digest.clone(), (kind, body));
            return answer(201, &[("docker-content-digest", &digest)], "");
        }
        let Some((kind, bytes)) = content.manifests.get(selector) else {
            return not_found();
        };
        let digest = Digest::of(bytes).to_string();
        return answer(
            200,
            &[("content-type", kind), ("docker-content-digest", &digest)],
            bytes.clone(),
        );
    }
    if let Some((_, id)) = seen.path.split_once("/blobs/uploads/") {
        return match seen.method {
            Method::POST => {
                static SESSIONS: AtomicUsize = AtomicUsize::new(0);
                let id = format!("session-{}", SESSIONS.fetch_add(1, Ordering::Relaxed));
                content.uploads.insert(id.clone(), Vec::new());
                answer(
                    202,
                    &[("location", &format!("{}{id}?state=a%2Fb", seen.path))],
                    "",
                )
            }
            Method::PUT if seen.query.starts_with("state=a%2Fb&digest=sha256%3A") => {
                let Some(mut bytes) = content.uploads.remove(id) else {
                    return not_found();
                };
                bytes.extend_from_slice(&body);
                let digest = Digest::of(&bytes).to_string();
                if !seen.query.ends_with(&digest.replace(':', "%3A")) {
                    return answer(
                        400,
                        &[],
                        r#"{"errors":[{"code":"DIGEST_INVALID","message":"digest differs"}]}"#,
                    );
                }
                content.blobs.insert(digest, bytes.into());
                answer(201, &[], "")
            }
            _ => not_found(),
        };
    }
    if let Some((_, digest)) = seen.path.split_once("/blobs/") {
        let Some(bytes) = content.blobs.get(digest) else {
            return not_found();
        };
        let size = bytes.len();
        let range = seen
            .header(header::RANGE.as_str())
            .and_then(|text| text.strip_prefix("bytes="));
        return match range
            .and_then(|text| text.strip_suffix('-'))
            .and_then(|text| text.parse::<usize>().ok())
        {
            Some(start) if start < size => {
                let range = format!("bytes {start}-{}/{size}", size - 1);
                answer(206, &[("content-range", &range)], bytes.slice(start..))
            }
            Some(_) => answer(416, &[], ""),
            None => answer(200, &[], bytes.clone()),
        };
    }
    Response::builder()
        .status(StatusCode::NOT_FOUND)
        .body(Body::empty())
        .unwrap()
}
