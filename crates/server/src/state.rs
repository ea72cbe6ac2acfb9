//! What handlers share.

use std::sync::Arc;

use axum::extract::FromRef;
use hypeman_engine::Engine;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::all_instances::AllInstances;
use crate::auth::Verifier;

/// Handed to every handler; cheap to clone.
#[derive(Clone)]
pub struct AppState {
    /// The engine.
    pub engine: Arc<Engine>,
    /// Who may do what.
    pub verifier: Arc<Verifier>,
    /// Version of the program.
    pub version: Arc<str>,
    /// The OpenAPI document.
    pub spec: Arc<crate::openapi::Rendered>,
    /// The unfiltered list of instances.
    pub all_instances: Arc<AllInstances>,
    /// How far the server is on its way down.
    pub stage: watch::Receiver<Stage>,
    /// Upgraded connections: the HTTP machinery no longer knows them, but they are drained too.
    pub sessions: TaskTracker,
}

/// The stages of a server's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It answers.
    Serving,
    /// It finishes what has an end; endless answers end now.
    Draining,
    /// Time is over: sessions are cut.
    Cutting,
}

/// Cuts the connection that a request came by. It works also while an answer is being written that nobody reads, when
/// the end of its body would not be looked at.
#[derive(Debug, Clone, Default)]
pub struct Cut(CancellationToken);

impl Cut {
    /// Cuts it.
    pub fn now(&self) {
        self.0.cancel();
    }

    /// Returns when it is to be cut.
    pub async fn asked(&self) {
        self.0.cancelled().await;
    }
}

impl AppState {
    /// Returns when the server has reached `stage`.
    pub async fn reached(&self, stage: Stage) {
        reached(self.stage.clone(), stage).await;
    }
}

/// Returns when the server has reached `stage`.
pub async fn reached(mut watched: watch::Receiver<Stage>, stage: Stage) {
    // An error means that the sender is gone, which is the end as well.
    drop(watched.wait_for(|current| *current >= stage).await);
}

impl FromRef<AppState> for Arc<Engine> {
    fn from_ref(state: &AppState) -> Self {
        Arc::clone(&state.engine)
    }
}
