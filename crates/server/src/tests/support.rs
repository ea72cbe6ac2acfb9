//! A server of its own for each test, and a client of few lines.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::http::{HeaderMap, Method, Request, StatusCode};
use bytes::Bytes;
use hypeman_engine::{Engine, EngineOptions, ImageOptions, Limits, LogOptions, SnapshotOptions};
use hypeman_vmm::VmmKind;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::auth::{Scope, mint};
use crate::{ServerConfig, bind};

pub const SECRET: &str = "the secret of a test server";

/// A running server; everything of it goes with the directory.
pub struct Server {
    pub address: SocketAddr,
    pub engine: Arc<Engine>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
    _directory: tempfile::TempDir,
}

/// An answer, read whole.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Answer {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("not JSON ({error}): {}", String::from_utf8_lossy(&self.body)))
    }

    pub fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }

    pub fn message(&self) -> String {
        self.json()["message"].as_str().unwrap_or_default().to_owned()
    }

    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl Server {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = EngineOptions {
            data_directory: directory.path().join("data"),
            guest_program: Cow::Borrowed(b"no guest is started here"),
            default_hypervisor: VmmKind::QemuMicrovm,
            limits: Limits {
                min_free_disk: 0,
                max_image_storage: 1.0,
                ..Limits::default()
            },
            vmm: hypeman_vmm::VmmOptions::default(),
            kernel: hypeman_kernel_options(),
            network: hypeman_network::NetworkOptions::default(),
            images: ImageOptions::default(),
            logs: LogOptions::default(),
            snapshots: SnapshotOptions::default(),
            paging: hypeman_engine::PagingOptions::default(),
        };
        let engine = Engine::open(options).await.unwrap();
        let mut config = ServerConfig::new("127.0.0.1:0".parse().unwrap(), SECRET, "test");
        config.drain = Duration::from_secs(5);
        change(&mut config);
        let bound = bind(config, Arc::clone(&engine)).await.unwrap();
        let address = bound.address();
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(bound.run(async {
            let _ = stopped.await;
        }));
        Self {
            address,
            engine,
            stop: Some(stop),
            task,
            _directory: directory,
        }
    }

    pub async fn stop(mut self) {
        let _ = self.stop.take().unwrap().send(());
        (&mut self.task).await.unwrap();
        self.engine.close().await;
    }

    /// A request with full rights.
    pub async fn ask(&self, method: Method, path: &str, body: &str) -> Answer {
        let token = token(None);
        let mut headers = vec![("authorization", format!("Bearer {token}"))];
        if !body.is_empty() {
            headers.push(("content-type", "application/json".to_owned()));
        }
        self.send(method, path, &headers, Bytes::copy_from_slice(body.as_bytes()))
            .await
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.ask(Method::GET, path, "").await
    }

    pub async fn send(&self, method: Method, path: &str, headers: &[(&str, String)], body: Bytes) -> Answer {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .unwrap();
        let connection = tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path);
        if headers.iter().all(|(name, _)| *name != "host") {
            request = request.header("host", self.address.to_string());
        }
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let request = request.body(axum::body::Body::from(body)).unwrap();
        let (parts, body) = sender.send_request(request).await.unwrap().into_parts();
        let body = axum::body::to_bytes(axum::body::Body::new(body), usize::MAX)
            .await
            .unwrap();
        drop(sender);
        let _ = connection.await;
        Answer {
            status: parts.status,
            headers: parts.headers,
            body,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub fn token(scopes: Option<&[Scope]>) -> String {
    mint(SECRET, "tester", Duration::from_secs(600), scopes).unwrap()
}

/// A kernel that is not there: these tests start no VM, and looking for one would only cost time.
fn hypeman_kernel_options() -> hypeman_kernel::KernelOptions {
    hypeman_kernel::KernelOptions {
        kernel: Some("/nonexistent".into()),
        ..Default::default()
    }
}
