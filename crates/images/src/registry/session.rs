//! One operation on one repository: requests with authorization, guarded redirects and patience.
//!
//! ```text
//!  call ── attempt ── check target ── send ─┬─ 401, first time here ── authenticate ──► send again
//!   ▲                     ▲                 ├─ 3xx of GET/HEAD ── check target ──► next origin, no secrets
//!   │                     └─────────────────┘
//!   └── wait, on 408 429 5xx and broken connections, up to the limit of attempts
//! ```

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rand::Rng as _;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode, Url};
use tokio_util::sync::CancellationToken;

use super::answer::{is_passing, retry_after, server_message};
use super::auth::{self, Challenge, Token, TokenKey};
use super::credentials::{self, Credentials};
use super::policy::{Origin, Policy, Reach};
use super::{RegistryClient, helper, read_limited, transport};
use crate::error::{ImageError, Result};
use crate::reference::Reference;

/// Most redirects that one request follows.
const MAX_REDIRECTS: usize = 5;
/// Largest error answer that is read for its message, in bytes.
const MAX_ERROR_BYTES: u64 = 64 << 10;

/// What a session may do, in the words of token services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Pull,
    Push,
}

/// A request that can be sent more than once.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: HeaderMap,
    /// Makes the body for each sending.
    pub(super) body: Option<&'a (dyn Fn() -> reqwest::Body + Send + Sync)>,
    /// Deadline for the answer to begin.
    pub(super) deadline: Duration,
}

pub(super) struct Session {
    pub(super) client: RegistryClient,
    pub(super) policy: Policy,
    pub(super) repository: String,
    pub(super) cancel: CancellationToken,
    scope: String,
    credentials: Option<Credentials>,
    /// Why the credential helper gave none.
    helper_failure: Option<String>,
    /// `Authorization` by origin, for this operation only.
    authorizations: Mutex<HashMap<Origin, HeaderValue>>,
    /// Set when credentials exist but the token service is none of the registry's.
    withheld_from: Mutex<Option<String>>,
    /// How far in others may be, once it is known.
    reach: tokio::sync::OnceCell<Reach>,
}

impl Session {
    pub(super) async fn open(
        client: &RegistryClient,
        reference: &Reference,
        access: Access,
        borrowed: Option<&Credentials>,
        cancel: CancellationToken,
    ) -> Result<Self> {
        let options = &client.shared.options;
        let policy = Policy::new(reference, options)?;
        let mut stored = match (borrowed, &options.docker_config) {
            (None, Some(path)) => {
                let (path, registry) = (path.clone(), reference.registry().to_owned());
                crate::blobs::blocking(move || credentials::stored(&path, &registry)).await?
            }
            _ => credentials::Stored::default(),
        };
        let mut helper_failure = None;
        if let Some(helper) = &stored.helper {
            let asked = helper::ask(helper, options.helper_path.as_deref(), options.helper_timeout);
            let answer = tokio::select! {
                answer = asked => answer,
                () = cancel.cancelled() => return Err(ImageError::Cancelled),
            };
            match answer {
                Ok(credentials) => stored.credentials = credentials,
                // Public images are pulled all the same.
                Err(reason) => {
                    tracing::warn!(
                        registry = reference.registry(),
                        reason,
                        "no credentials from the helper"
                    );
                    helper_failure = Some(reason);
                }
            }
        }
        let repository = reference.repository().to_owned();
        let actions = match access {
            Access::Pull => "pull",
            Access::Push => "pull,push",
        };
        Ok(Self {
            client: client.clone(),
            scope: format!("repository:{repository}:{actions}"),
            policy,
            repository,
            cancel,
            credentials: borrowed.cloned().or(stored.credentials),
            helper_failure,
            authorizations: Mutex::default(),
            withheld_from: Mutex::default(),
            reach: tokio::sync::OnceCell::new(),
        })
    }

    /// A URL below `/v2/<repository>/`.
    pub(super) fn url(&self, path: &str) -> Result<Url> {
        let text = format!("v2/{}/{path}", self.repository);
        self.policy
            .base
            .join(&text)
            .map_err(|error| self.policy.refusal(format!("bad address: {error}")))
    }

    pub(super) fn host(&self) -> &str {
        &self.policy.origin.host
    }

    pub(super) fn get(&self, method: Method, path: &str) -> Result<Call<'static>> {
        let deadline = self.client.shared.options.idle_timeout;
        Ok(Call {
            method,
            url: self.url(path)?,
            headers: HeaderMap::new(),
            body: None,
            deadline,
        })
    }

    /// Sends a call, again and again where that helps. The answer has any status but 401, 408, 429 and 5xx.
    ///
    /// # Errors
    /// [`ImageError::Unauthorized`], [`ImageError::RateLimited`], [`ImageError::UnsafeServer`],
    /// [`ImageError::Network`], [`ImageError::Cancelled`].
    pub(super) async fn call(&self, call: &Call<'_>) -> Result<Response> {
        let retry = &self.client.shared.options.retry;
        let mut attempt = 1;
        loop {
            let outcome = tokio::select! {
                () = self.cancel.cancelled() => return Err(ImageError::Cancelled),
                outcome = self.attempt(call) => outcome,
            };
            let (error, asked) = match outcome {
                Ok(response) if !is_passing(response.status()) => return Ok(response),
                Ok(response) => {
                    let asked = retry_after(response.headers());
                    (self.status_error(response, "the registry").await, asked)
                }
                Err(error @ ImageError::Network { .. }) => (error, None),
                Err(error) => return Err(error),
            };
            if attempt >= retry.attempts || asked.is_some_and(|wait| wait > retry.max_retry_after) {
                return Err(error);
            }
            tracing::debug!(%error, attempt, "request will be repeated");
            self.pause(attempt, asked).await?;
            attempt += 1;
        }
    }

    /// Sends a call once, for bodies whose repetition begins elsewhere. A passing failure is a `Network` error.
    pub(super) async fn once(&self, call: &Call<'_>) -> Result<Response> {
        let response = self.attempt(call).await?;
        match is_passing(response.status()) {
            true => Err(self.status_error(response, "the registry").await),
            false => Ok(response),
        }
    }

    /// Waits before a repetition: as long as asked, else twice as long each time, with some spread.
    pub(super) async fn pause(&self, attempt: u32, asked: Option<Duration>) -> Result<()> {
        let retry = &self.client.shared.options.retry;
        let own = retry
            .base
            .saturating_mul(1 << attempt.saturating_sub(1).min(16))
            .min(retry.cap);
        let wait = asked.unwrap_or_else(|| own.mul_f64(rand::rng().random_range(0.75..1.25)));
        tokio::select! {
            () = self.cancel.cancelled() => Err(ImageError::Cancelled),
            () = tokio::time::sleep(wait) => Ok(()),
        }
    }

    /// Sends a call once: with authorization, over its redirects.
    async fn attempt(&self, call: &Call<'_>) -> Result<Response> {
        let mut url = call.url.clone();
        let mut redirects = 0;
        let mut challenged: Vec<Origin> = Vec::new();
        loop {
            let response = self.send(call, &url).await?;
            let status = response.status();
            let origin = Origin::of(&url);
            if status == StatusCode::UNAUTHORIZED {
                if challenged.contains(&origin) {
                    return Err(self.status_error(response, "the registry").await);
                }
                let offered = auth::challenge(response.headers());
                let denied = self.status_error(response, "the registry").await;
                self.authenticate(&origin, offered, denied).await?;
                challenged.push(origin);
                continue;
            }
            if !status.is_redirection() || status == StatusCode::NOT_MODIFIED {
                return Ok(response);
            }
            if !matches!(call.method, Method::GET | Method::HEAD) {
                return Err(self.policy.refusal("it redirects an upload"));
            }
            redirects += 1;
            if redirects > MAX_REDIRECTS {
                return Err(self.policy.refusal("it redirects too often"));
            }
            url = self.location(&url, response.headers(), "redirect")?;
        }
    }

    /// The `Location` of an answer, resolved against the URL that gave it, and checked.
    pub(super) fn location(&self, from: &Url, headers: &HeaderMap, what: &str) -> Result<Url> {
        let text = headers.get(LOCATION).and_then(|value| value.to_str().ok());
        let text = text.filter(|text| text.len() <= 16 << 10);
        let text = text.ok_or_else(|| self.policy.refusal(format!("its {what} has no usable Location")))?;
        let url = from
            .join(text)
            .map_err(|_| self.policy.refusal(format!("its {what} is not an address")))?;
        let limit = if self.policy.is_own(&url) {
            self.policy.own_reach
        } else {
            Reach::Loopback
        };
        self.policy.check_url(&url, limit, what)?;
        Ok(url)
    }

    /// How far in a URL may lead that the registry sent us to.
    async fn foreign_reach(&self) -> Reach {
        let determine = async {
            if self.policy.is_on_loopback() {
                return Reach::Loopback;
            }
            match super::policy::literal_address(&self.policy.origin.host) {
                Some(address) => super::policy::reach_of(address)
                    .unwrap_or(Reach::Public)
                    .min(Reach::Private),
                None => transport::least_reach(&self.policy.origin.host).await,
            }
        };
        *self.reach.get_or_init(|| determine).await
    }

    async fn transport(&self, url: &Url, what: &str) -> Result<&reqwest::Client> {
        let reach = if self.policy.is_own(url) {
            self.policy.own_reach
        } else {
            self.foreign_reach().await
        };
        self.policy.check_url(url, reach, what)?;
        self.client.shared.transports.client(reach)
    }

    async fn send(&self, call: &Call<'_>, url: &Url) -> Result<Response> {
        let client = self.transport(url, "redirect").await?;
        let mut request = client
            .request(call.method.clone(), url.clone())
            .headers(call.headers.clone());
        if let Some(value) = self.authorization(&Origin::of(url)) {
            request = request.header(AUTHORIZATION, value);
        }
        if let Some(body) = call.body {
            request = request.body(body());
        }
        self.answer(url, request, call.deadline).await
    }

    async fn answer(
        &self,
        url: &Url,
        request: reqwest::RequestBuilder,
        deadline: Duration,
    ) -> Result<Response> {
        let host = url.host_str().unwrap_or_default();
        match tokio::time::timeout(deadline, request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(transport::network(host, error)),
            Err(_) => Err(ImageError::Network {
                host: host.to_owned(),
                reason: "no answer in time".to_owned(),
            }),
        }
    }

    /// The header for an origin. Credentials and cached tokens exist for the registry's own origin; others get one
    /// only after their own challenge, and then an anonymous one.
    fn authorization(&self, origin: &Origin) -> Option<HeaderValue> {
        if let Some(value) = locked(&self.authorizations).get(origin) {
            return Some(value.clone());
        }
        if *origin != self.policy.origin {
            return None;
        }
        if let Some(header) = self.credentials.as_ref().and_then(Credentials::bearer_header) {
            return secret_header(&header);
        }
        let tokens = locked(&self.client.shared.tokens);
        let token = tokens
            .get(&self.token_key(origin))
            .filter(|token| token.expires > Instant::now());
        token.and_then(|token| secret_header(&token.header))
    }

    fn token_key(&self, origin: &Origin) -> TokenKey {
        let own = *origin == self.policy.origin;
        let credentials = self
            .credentials
            .as_ref()
            .filter(|_| own)
            .map(Credentials::fingerprint);
        TokenKey {
            origin: origin.clone(),
            scope: self.scope.clone(),
            credentials,
        }
    }

    /// Answers a challenge. `denied` is the error to give when there is nothing to answer with.
    async fn authenticate(
        &self,
        origin: &Origin,
        offered: Option<Challenge>,
        denied: ImageError,
    ) -> Result<()> {
        let own = *origin == self.policy.origin;
        let credentials = self.credentials.as_ref().filter(|_| own);
        locked(&self.client.shared.tokens).remove(&self.token_key(origin));
        let header = match (offered, credentials) {
            // The registry's own token was refused; asking a token service would not make it better.
            (_, Some(credentials)) if credentials.bearer_header().is_some() => return Err(denied),
            (Some(Challenge::Basic), Some(credentials)) => credentials.basic_header().ok_or(denied)?,
            (Some(Challenge::Bearer { realm, service }), _) => {
                let token = self.token(&realm, service.as_deref(), credentials).await?;
                let header = token.header.clone();
                self.remember(origin, token);
                header
            }
            (Some(Challenge::Basic) | None, _) => return Err(denied),
        };
        let value = secret_header(&header).ok_or_else(|| ImageError::Unauthorized {
            host: origin.host.clone(),
            reason: "the credentials contain characters that no header can carry".to_owned(),
        })?;
        locked(&self.authorizations).insert(origin.clone(), value);
        Ok(())
    }

    fn remember(&self, origin: &Origin, token: Token) {
        let now = Instant::now();
        let mut tokens = locked(&self.client.shared.tokens);
        tokens.retain(|_, token| token.expires > now);
        if tokens.len() < auth::MAX_TOKENS {
            tokens.insert(self.token_key(origin), token);
        }
    }

    /// Fetches a token. The realm is the registry's word, so it is checked like a redirect, never redirected, and
    /// shown credentials only when its host is related to the registry's.
    async fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        credentials: Option<&Credentials>,
    ) -> Result<Token> {
        let realm =
            Url::parse(realm).map_err(|_| self.policy.refusal("its token realm is not an address"))?;
        let client = self.transport(&realm, "token realm").await?;
        let realm_host = realm.host_str().unwrap_or_default().to_owned();
        let trusted = self.policy.is_related_realm(&realm);
        if !trusted && credentials.is_some() {
            tracing::warn!(
                registry = self.host(),
                realm = realm_host,
                "credentials withheld from an unrelated host"
            );
            *locked(&self.withheld_from) = Some(realm_host.clone());
        }
        let wanted = auth::token_request(&realm, service, &self.scope, credentials.filter(|_| trusted));
        let mut request = match &wanted.form {
            Some(form) => client
                .post(wanted.url.clone())
                .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form.clone()),
            None => client.get(wanted.url.clone()),
        };
        if let Some(header) = wanted.authorization.as_deref().and_then(secret_header) {
            request = request.header(AUTHORIZATION, header);
        }
        let idle = self.client.shared.options.idle_timeout;
        let response = self.answer(&wanted.url, request, idle).await?;
        match response.status() {
            StatusCode::OK => {
                let answer = read_limited(response, auth::MAX_TOKEN_BYTES, idle, "token").await?;
                auth::token_of(&answer, &realm_host, Instant::now())
            }
            status if status.is_redirection() => Err(self.policy.refusal("its token service redirects")),
            StatusCode::BAD_REQUEST => Err(ImageError::Unauthorized {
                host: realm_host,
                reason: "the token service refused the request".to_owned(),
            }),
            _ => Err(self.status_error(response, "the token service").await),
        }
    }

    /// Turns an answer that is no success into an error, with the server's own words where they are printable.
    pub(super) async fn status_error(&self, response: Response, what: &str) -> ImageError {
        let status = response.status();
        let host = response.url().host_str().unwrap_or_default().to_owned();
        let retry_after = retry_after(response.headers());
        let idle = self.client.shared.options.idle_timeout;
        let body = read_limited(response, MAX_ERROR_BYTES, idle, "error message")
            .await
            .unwrap_or_default();
        let said = server_message(&body);
        let says = |fallback: &str| match said.is_empty() {
            true => fallback.to_owned(),
            false => said.clone(),
        };
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                let reason = format!("{}{}", says("access denied"), self.access_hint());
                ImageError::Unauthorized { host, reason }
            }
            StatusCode::NOT_FOUND => ImageError::NotFound(format!("{}/{}", host, self.repository)),
            StatusCode::TOO_MANY_REQUESTS => ImageError::RateLimited { host, retry_after },
            status => ImageError::Network {
                host,
                reason: format!("{what} answered {status} {said}").trim_end().to_owned(),
            },
        }
    }

    fn access_hint(&self) -> String {
        if let Some(host) = locked(&self.withheld_from).as_ref() {
            return format!(
                "; credentials were not sent to {host}, which is not known to belong to the registry: if it does, \
                 add {}={host} to images.trusted_realms",
                self.host()
            );
        }
        match (&self.credentials, &self.helper_failure) {
            (Some(_), _) => "; check the credentials".to_owned(),
            (None, Some(failure)) => format!("; {failure}; mend that, or pass credentials with the request"),
            (None, None) => "; the repository may not exist, or may need credentials".to_owned(),
        }
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn secret_header(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
