//! The registry client: resolve, pull and push, on untrusted networks and against untrusted registries.
//!
//! ```text
//!  resolve / pull / push        what to transfer            resolve.rs pull.rs push.rs
//!        │
//!     Session                   one operation on one repository: authorization by origin, retries
//!        │                                                   session.rs auth.rs
//!     Policy                    where a request may go, and with which secrets
//!        │                                                   policy.rs
//!     reqwest                   redirects off, addresses filtered after name resolution
//! ```
//!
//! Invariants:
//! * A secret leaves this process only towards the registry that it belongs to, or that registry's own token service.
//! * No request follows a server's word (redirect, realm, upload location) without the policy having agreed.
//! * Every wait has a deadline and every answer a size limit.
//! * No program is started but the credential helpers that Docker's configuration names (helper.rs).

mod answer;
mod auth;
mod credentials;
mod helper;
mod meter;
mod policy;
mod progress;
mod pull;
mod push;
mod resolve;
mod session;
mod transport;

use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;

pub use credentials::Credentials;
pub use progress::{TransferEvent, TransferObserver};
pub use pull::{PulledImage, PulledLayer, layer_sources};
pub use push::{ContentSource, Extent, PushOptions, Pushed};
pub use resolve::Resolved;

use crate::error::Result;

/// How often and how patiently failed requests are repeated.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Attempts in all, the first included.
    pub attempts: u32,
    /// Wait before the first repetition; doubles each time.
    pub base: Duration,
    /// Longest wait of our own choosing.
    pub cap: Duration,
    /// Longest `Retry-After` that is waited for; beyond it the request fails as rate limited at once.
    pub max_retry_after: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 5,
            base: Duration::from_millis(250),
            cap: Duration::from_secs(8),
            max_retry_after: Duration::from_secs(30),
        }
    }
}

/// Settings of a [`RegistryClient`].
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Registries (`host` or `host:port`) that are spoken to in plain HTTP. Loopback registries always are.
    pub insecure: Vec<String>,
    /// Docker's `config.json` with stored credentials; read again for each operation, absent files are no error.
    pub docker_config: Option<PathBuf>,
    /// Where the credential helpers that the file names are looked for, as `PATH`; where this process looks for
    /// programs when absent.
    pub helper_path: Option<OsString>,
    /// How long a credential helper may take.
    pub helper_timeout: Duration,
    /// The `User-Agent` header.
    pub user_agent: String,
    /// Extra certificate authorities, PEM, besides the system's.
    pub extra_roots: Vec<Vec<u8>>,
    /// Pairs of a registry and the host of a token service that may get its credentials, besides hosts of the same
    /// domain line and the well-known pairs.
    pub trusted_realms: Vec<(String, String)>,
    /// Proxy for HTTPS requests, as `http://host:port`. The environment is not consulted.
    pub proxy: Option<String>,
    /// Repetition of failed requests.
    pub retry: RetryPolicy,
    /// Deadline of connecting, of the start of an answer, and of silence in the middle of one.
    pub idle_timeout: Duration,
    /// Transfers of one pull or push at the same time.
    pub parallel: usize,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            insecure: Vec::new(),
            docker_config: None,
            helper_path: None,
            helper_timeout: Duration::from_secs(30),
            user_agent: concat!("hypeman/", env!("CARGO_PKG_VERSION")).to_owned(),
            extra_roots: Vec::new(),
            trusted_realms: Vec::new(),
            proxy: None,
            retry: RetryPolicy::default(),
            idle_timeout: Duration::from_secs(30),
            parallel: 4,
        }
    }
}

/// A client of any number of registries. Cheap to clone; clones share connections and tokens.
#[derive(Clone)]
pub struct RegistryClient {
    shared: Arc<Shared>,
}

struct Shared {
    options: ClientOptions,
    transports: transport::Transports,
    tokens: Mutex<HashMap<auth::TokenKey, auth::Token>>,
}

impl RegistryClient {
    /// Makes a client. No connection is opened yet.
    ///
    /// # Errors
    /// [`ImageError::InvalidDocument`](crate::ImageError::InvalidDocument) for unusable certificates or proxy.
    pub fn new(options: ClientOptions) -> Result<Self> {
        let transports = transport::Transports::new(&options)?;
        Ok(Self {
            shared: Arc::new(Shared {
                options,
                transports,
                tokens: Mutex::default(),
            }),
        })
    }
}

/// Reads an answer that must be small.
async fn read_limited(
    mut response: reqwest::Response,
    limit: u64,
    idle: Duration,
    what: &str,
) -> Result<Bytes> {
    use crate::error::ImageError;
    let host = response.url().host_str().unwrap_or_default().to_owned();
    let too_large = || ImageError::TooLarge {
        what: what.to_owned(),
        limit,
    };
    if response.content_length().is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let read = async {
        while let Some(chunk) = response
            .chunk()
            .await
            .map_err(|error| transport::network(&host, error))?
        {
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(too_large());
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(())
    };
    match tokio::time::timeout(idle * 2, read).await {
        Ok(outcome) => outcome.map(|()| bytes.into()),
        Err(_) => Err(ImageError::Network {
            host: host.clone(),
            reason: format!("{what} arrives too slowly"),
        }),
    }
}
