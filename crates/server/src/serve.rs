//! Listening, and the orderly end: new connections are refused, running requests get a time to finish, endless
//! answers are ended, VMs stay.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hypeman_engine::Engine;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_util::task::TaskTracker;

use crate::auth::Verifier;
use crate::openapi;
use crate::routes::router;
use crate::state::{AppState, Cut, Stage, reached};

/// How long a client may take to send the head of a request.
///
/// It also ends idle connections, so it is longer than clients keep theirs (Go: 90 seconds).
const HEAD_DEADLINE: Duration = Duration::from_secs(120);

/// How long sessions may take to notice that they were cut off.
const CUT_DEADLINE: Duration = Duration::from_secs(2);

/// How the server listens.
#[derive(Clone)]
pub struct ServerConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Secret of the tokens. Empty: every token is refused.
    pub jwt_secret: String,
    /// Version of the program, as `/capabilities` tells it.
    pub version: String,
    /// How long running requests may take after the server was told to stop.
    pub drain: Duration,
    /// Connections at once.
    pub max_connections: usize,
}

impl ServerConfig {
    /// A configuration with the defaults: 30 seconds to drain, 8192 connections.
    pub fn new(listen: SocketAddr, jwt_secret: impl Into<String>, version: impl Into<String>) -> Self {
        Self {
            listen,
            jwt_secret: jwt_secret.into(),
            version: version.into(),
            drain: Duration::from_secs(30),
            max_connections: 8192,
        }
    }
}

impl std::fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerConfig")
            .field("listen", &self.listen)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}; choose another port or stop what uses it")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The cause.
        source: std::io::Error,
    },
    /// The OpenAPI document cannot be made.
    #[error("the API document cannot be made: {0}")]
    Document(#[from] serde_json::Error),
}

/// A server that listens and does not answer yet.
pub struct BoundServer {
    listener: TcpListener,
    address: SocketAddr,
    state: AppState,
    stage: watch::Sender<Stage>,
    drain: Duration,
    connections: Arc<Semaphore>,
}

/// Listens without answering yet: the caller learns the port first.
///
/// # Errors
/// When the address is taken.
pub async fn bind(config: ServerConfig, engine: Arc<Engine>) -> Result<BoundServer, ServeError> {
    let failed = |source| ServeError::Listen {
        address: config.listen,
        source,
    };
    let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    if config.jwt_secret.is_empty() {
        tracing::warn!("jwt_secret is empty: every request that needs a token will be refused");
    }
    let (stage, watched) = watch::channel(Stage::Serving);
    let state = AppState {
        engine,
        verifier: Arc::new(Verifier::new(&config.jwt_secret)),
        version: config.version.as_str().into(),
        spec: Arc::new(openapi::render()?),
        all_instances: Arc::default(),
        stage: watched,
        sessions: TaskTracker::new(),
    };
    let connections = Arc::new(Semaphore::new(
        config.max_connections.clamp(1, Semaphore::MAX_PERMITS),
    ));
    Ok(BoundServer {
        listener,
        address,
        state,
        stage,
        drain: config.drain,
        connections,
    })
}

/// Listens and answers until `shutdown`, then drains.
///
/// # Errors
/// When the address is taken.
pub async fn serve(
    config: ServerConfig,
    engine: Arc<Engine>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    bind(config, engine).await?.run(shutdown).await;
    Ok(())
}

impl BoundServer {
    /// The address that it listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers until `shutdown`, then drains.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let router = router(&self.state);
        let mut running = JoinSet::new();
        tokio::pin!(shutdown);
        tracing::info!(address = %self.address, "listening");
        loop {
            // The permit is taken first: at the limit, new clients wait in the kernel's queue.
            let accepted = async {
                let permit = Arc::clone(&self.connections).acquire_owned().await;
                (permit, self.listener.accept().await)
            };
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(_) = running.join_next(), if !running.is_empty() => {}
                (permit, accepted) = accepted => match accepted {
                    Ok((stream, _)) => {
                        let connection = connection(stream, router.clone(), self.state.stage.clone());
                        running.spawn(async move {
                            connection.await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        // Out of descriptors: trying again at once would only burn the processor.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                },
            }
        }
        drop(self.listener);
        self.stage.send_replace(Stage::Draining);
        let sessions = self.state.sessions;
        sessions.close();
        tracing::info!(connections = running.len(), sessions = sessions.len(), "draining");
        let drained = async {
            while running.join_next().await.is_some() {}
            sessions.wait().await;
        };
        if tokio::time::timeout(self.drain, drained).await.is_err() {
            tracing::warn!("some requests did not end in time and are cut off");
            self.stage.send_replace(Stage::Cutting);
            running.shutdown().await;
            let _ = tokio::time::timeout(CUT_DEADLINE, sessions.wait()).await;
        }
    }
}

async fn connection(stream: TcpStream, router: axum::Router, stage: watch::Receiver<Stage>) {
    // Output of commands and log lines are small and must not wait for more.
    let _ = stream.set_nodelay(true);
    let (cut, answers) = (Cut::default(), TowerToHyperService::new(router));
    let lent = cut.clone();
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(lent.clone());
        answers.call(request)
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_DEADLINE)
        .max_buf_size(64 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(served);
    let ended = async {
        tokio::select! {
            outcome = &mut served => outcome,
            () = reached(stage, Stage::Draining) => {
                served.as_mut().graceful_shutdown();
                served.await
            }
        }
    };
    tokio::select! {
        outcome = ended => {
            if let Err(error) = outcome {
                tracing::debug!(%error, "a connection ended with an error");
            }
        }
        () = cut.asked() => tracing::debug!("a connection was cut"),
    }
}
