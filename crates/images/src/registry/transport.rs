//! HTTP clients that follow nothing on their own and connect only where they may.
//!
//! There is one client for each [`Reach`]: its resolver drops addresses further inside, so a name cannot be checked
//! as one address and connected to as another.

use std::error::Error as _;
use std::net::SocketAddr;
use std::sync::OnceLock;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::ClientOptions;
use super::policy::{Reach, reach_of};
use crate::error::{ImageError, Result};

pub(super) struct Transports {
    options: ClientOptions,
    clients: [OnceLock<reqwest::Client>; 3],
}

impl Transports {
    pub(super) fn new(options: &ClientOptions) -> Result<Self> {
        let transports = Self {
            options: options.clone(),
            clients: Default::default(),
        };
        // Built at once to report unusable settings here; the others are the same but for the limit.
        transports.client(Reach::Public)?;
        Ok(transports)
    }

    pub(super) fn client(&self, reach: Reach) -> Result<&reqwest::Client> {
        let slot = &self.clients[reach as usize];
        if let Some(client) = slot.get() {
            return Ok(client);
        }
        let client = build(&self.options, reach)?;
        Ok(slot.get_or_init(|| client))
    }
}

fn build(options: &ClientOptions, reach: Reach) -> Result<reqwest::Client> {
    let invalid = |what: &'static str, error: reqwest::Error| ImageError::document(what, explain(&error));
    // The first provider installed in a process wins; all of ours are this one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let proxy = options.proxy.as_deref().map(reqwest::Url::parse).transpose();
    let proxy = proxy.map_err(|error| ImageError::document("proxy setting", error.to_string()))?;
    let proxy_host = proxy.as_ref().and_then(|url| url.host_str()).map(str::to_owned);
    let mut builder = reqwest::Client::builder()
        .user_agent(&options.user_agent)
        .redirect(reqwest::redirect::Policy::none())
        .no_proxy()
        .connect_timeout(options.idle_timeout)
        .pool_idle_timeout(std::time::Duration::from_secs(60))
        .dns_resolver(Guarded { reach, proxy_host });
    for pem in &options.extra_roots {
        let roots = reqwest::Certificate::from_pem_bundle(pem);
        builder = builder.tls_certs_merge(roots.map_err(|error| invalid("certificate authority", error))?);
    }
    if let Some(proxy) = proxy {
        builder =
            builder.proxy(reqwest::Proxy::https(proxy).map_err(|error| invalid("proxy setting", error))?);
    }
    builder
        .build()
        .map_err(|error| invalid("HTTP client settings", error))
}

/// Resolves names and drops addresses further inside than `reach`.
struct Guarded {
    reach: Reach,
    /// Our own proxy, which may be anywhere.
    proxy_host: Option<String>,
}

#[derive(Debug, thiserror::Error)]
#[error("{0} resolves only to addresses that may not be contacted")]
struct Forbidden(String);

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let (name, limit) = (name.as_str().to_owned(), self.reach);
        let is_proxy = self.proxy_host.as_deref() == Some(name.as_str());
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let allowed: Vec<SocketAddr> = found
                .into_iter()
                .filter(|address| is_proxy || reach_of(address.ip()).is_some_and(|reach| reach <= limit))
                .collect();
            if allowed.is_empty() {
                return Err(Forbidden(name).into());
            }
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// The least reach among a name's addresses: a name that is also public cannot claim to be inside.
pub(super) async fn least_reach(host: &str) -> Reach {
    let resolved = tokio::net::lookup_host((host, 0)).await;
    let reach = resolved
        .ok()
        .and_then(|found| found.filter_map(|address| reach_of(address.ip())).min());
    // Loopback is granted only to names that say so themselves, not on a name server's word.
    reach.unwrap_or(Reach::Public).min(Reach::Private)
}

/// A request failure without its URL, whose query may hold a signature.
pub(super) fn network(host: &str, error: reqwest::Error) -> ImageError {
    let mut cause = error.source();
    while let Some(error) = cause {
        if let Some(Forbidden(name)) = error.downcast_ref() {
            let reason = format!("{name} resolves only to addresses that may not be contacted");
            return ImageError::UnsafeServer {
                host: host.to_owned(),
                reason,
            };
        }
        cause = error.source();
    }
    ImageError::Network {
        host: host.to_owned(),
        reason: explain(&error.without_url()),
    }
}

/// An error and its causes in one line.
fn explain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let part = error.to_string();
        if !text.contains(&part) {
            text.push_str(": ");
            text.push_str(&part);
        }
        cause = error.source();
    }
    text
}
