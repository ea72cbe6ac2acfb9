//! What handlers share.

use std::sync::{Arc, Mutex};

use axum::extract::FromRef;
use bytes::Bytes;
use hypeman_engine::Engine;
use tokio::sync::watch;

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
    /// The last unfiltered list of instances, see [`crate::handlers::instances`].
    pub list_cache: Arc<Mutex<Option<CachedList>>>,
    /// Becomes true when the server goes down: endless answers end then.
    pub closing: watch::Receiver<bool>,
}

/// A serialised list.
#[derive(Debug, Clone)]
pub struct CachedList {
    /// Version of the instances that it shows.
    pub version: u64,
    /// When it was made.
    pub made: std::time::Instant,
    /// JSON.
    pub body: Bytes,
}

impl AppState {
    /// Returns when the server goes down.
    pub async fn closed(&self) {
        let mut closing = self.closing.clone();
        // An error means that the sender is gone, which is the end as well.
        let _ = closing.wait_for(|closing| *closing).await;
    }
}

impl FromRef<AppState> for Arc<Engine> {
    fn from_ref(state: &AppState) -> Self {
        Arc::clone(&state.engine)
    }
}
