//! Credentials: borrowed for one operation, or found in Docker's `config.json`, or kept by the helper that it names.
//!
//! They are held in memory only; `Debug` shows no secret.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use base64::Engine as _;
use serde::Deserialize;
use sha2::Digest as _;

use super::helper::Helper;
use crate::error::{ImageError, Result};
use crate::reference::DEFAULT_REGISTRY;

/// Largest `config.json` that is read, in bytes.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// What proves to a registry who we are.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials(Kind);

#[derive(Clone, PartialEq, Eq)]
enum Kind {
    Basic { username: String, password: String },
    RegistryToken(String),
    IdentityToken(String),
}

impl Credentials {
    /// User name and password.
    pub fn basic(username: impl Into<String>, password: impl Into<String>) -> Self {
        Self(Kind::Basic {
            username: username.into(),
            password: password.into(),
        })
    }

    /// A token that the registry itself accepts as `Authorization: Bearer`.
    pub fn registry_token(token: impl Into<String>) -> Self {
        Self(Kind::RegistryToken(token.into()))
    }

    /// A refresh token that the registry's token service exchanges.
    pub fn identity_token(token: impl Into<String>) -> Self {
        Self(Kind::IdentityToken(token.into()))
    }

    /// Makes credentials of the three fields of an API request; `None` when all are empty.
    pub fn from_fields(username: &str, password: &str, registry_token: &str) -> Option<Self> {
        match (registry_token, username, password) {
            ("", "", "") => None,
            ("", username, password) => Some(Self::basic(username, password)),
            (token, _, _) => Some(Self::registry_token(token)),
        }
    }

    /// The value for `Authorization: Basic`, where there is one.
    pub(super) fn basic_header(&self) -> Option<String> {
        match &self.0 {
            Kind::Basic { username, password } => {
                let pair = format!("{username}:{password}");
                Some(format!(
                    "Basic {}",
                    base64::engine::general_purpose::STANDARD.encode(pair)
                ))
            }
            _ => None,
        }
    }

    /// The value for `Authorization: Bearer` that needs no token service.
    pub(super) fn bearer_header(&self) -> Option<String> {
        match &self.0 {
            Kind::RegistryToken(token) => Some(format!("Bearer {token}")),
            _ => None,
        }
    }

    pub(super) fn refresh_token(&self) -> Option<&str> {
        match &self.0 {
            Kind::IdentityToken(token) => Some(token),
            _ => None,
        }
    }

    /// Tells credentials apart without holding them: tokens are cached under it.
    pub(super) fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = sha2::Sha256::new();
        let parts: [&str; 3] = match &self.0 {
            Kind::Basic { username, password } => ["basic", username, password],
            Kind::RegistryToken(token) => ["registry", token, ""],
            Kind::IdentityToken(token) => ["identity", token, ""],
        };
        for part in parts {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        hasher.finalize().into()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match &self.0 {
            Kind::Basic { .. } => "Credentials(basic, redacted)",
            Kind::RegistryToken(_) => "Credentials(registry token, redacted)",
            Kind::IdentityToken(_) => "Credentials(identity token, redacted)",
        })
    }
}

/// What `config.json` has for a registry.
#[derive(Debug, Default)]
pub(super) struct Stored {
    pub(super) credentials: Option<Credentials>,
    /// The credential helper that has to be asked, where the file itself has nothing.
    pub(super) helper: Option<Helper>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct Wire {
    auths: BTreeMap<String, WireAuth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct WireAuth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// Looks a registry up in Docker's config file. A missing file has nothing, and one that is closed to us is not meant
/// for us: public images are pulled without it.
///
/// # Errors
/// [`ImageError::InvalidDocument`] for a file that is not what Docker writes, [`ImageError::Io`].
pub(super) fn stored(path: &Path, registry: &str) -> Result<Stored> {
    use std::io::Read as _;
    const WHAT: &str = "Docker config file";
    let failed = |error| ImageError::io(format!("read {}", path.display()), error);
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) => {
            return match error.kind() {
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => Ok(Stored::default()),
                std::io::ErrorKind::PermissionDenied => {
                    tracing::warn!(path = %path.display(), %error, "stored credentials are not used");
                    Ok(Stored::default())
                }
                _ => Err(failed(error)),
            };
        }
    };
    let mut bytes = Vec::new();
    file.take(MAX_CONFIG_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(ImageError::TooLarge {
            what: WHAT.to_owned(),
            limit: MAX_CONFIG_BYTES,
        });
    }
    // The parser's message could quote a secret, so only the position is told.
    let wire: Wire = serde_json::from_slice(&bytes).map_err(|error| {
        ImageError::document(WHAT, format!("line {}, column {}", error.line(), error.column()))
    })?;
    let matches = |key: &str| registry_of_key(key) == registry;
    let entry = wire.auths.iter().find(|(key, _)| matches(key));
    let credentials = match entry {
        Some((_, auth)) => credentials_of(auth).ok_or_else(|| {
            ImageError::document(
                WHAT,
                format!("the entry for {registry} is not base64 of user:password"),
            )
        })?,
        None => None,
    };
    if credentials.is_some() {
        return Ok(Stored {
            credentials,
            helper: None,
        });
    }
    let own = wire.cred_helpers.into_iter().find(|(key, _)| matches(key));
    let name = own.map(|(_, name)| name).or(wire.creds_store);
    // Under the key that a login has left in the file it has put them into the helper too.
    let key = entry.map_or_else(|| server_of(registry), |(key, _)| key.clone());
    let helper = name
        .filter(|name| !name.is_empty())
        .map(|name| Helper { name, registry: key });
    Ok(Stored { credentials, helper })
}

/// What Docker calls a registry towards helpers.
fn server_of(registry: &str) -> String {
    match registry {
        DEFAULT_REGISTRY => "https://index.docker.io/v1/".to_owned(),
        other => other.to_owned(),
    }
}

/// The registry that a key of `auths` means: keys may be URLs, and Docker Hub has a name of its own.
fn registry_of_key(key: &str) -> String {
    let bare = key
        .strip_prefix("https://")
        .or_else(|| key.strip_prefix("http://"))
        .unwrap_or(key);
    let host = bare.split('/').next().unwrap_or_default().to_ascii_lowercase();
    match host.as_str() {
        "index.docker.io" | "registry-1.docker.io" | "docker.io" => DEFAULT_REGISTRY.to_owned(),
        _ => host,
    }
}

/// `None` for an entry that cannot be decoded, `Some(None)` for an empty one.
fn credentials_of(auth: &WireAuth) -> Option<Option<Credentials>> {
    let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    if let Some(token) = filled(&auth.registrytoken) {
        return Some(Some(Credentials::registry_token(token)));
    }
    if let Some(token) = filled(&auth.identitytoken) {
        return Some(Some(Credentials::identity_token(token)));
    }
    if let Some(encoded) = filled(&auth.auth) {
        let decoded = base64::engine::general_purpose::STANDARD
            .decode(encoded.trim())
            .ok()?;
        let text = String::from_utf8(decoded).ok()?;
        let (username, password) = text.split_once(':')?;
        return Some(Some(Credentials::basic(
            username,
            password.trim_end_matches('\0'),
        )));
    }
    Some(match (filled(&auth.username), filled(&auth.password)) {
        (Some(username), password) => Some(Credentials::basic(username, password.unwrap_or_default())),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The helper that a file leads to, and what it is asked for.
    fn helper(config: &str, registry: &str) -> Option<(String, String)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config).unwrap();
        let helper = stored(file.path(), registry).unwrap().helper?;
        Some((helper.name, helper.registry))
    }

    fn pair(name: &str, registry: &str) -> Option<(String, String)> {
        Some((name.to_owned(), registry.to_owned()))
    }

    #[test]
    fn a_registrys_own_helper_goes_before_the_one_of_all() {
        let config = r#"{"auths": {"https://index.docker.io/v1/": {}, "here.test": {"auth": "YTpi"}},
                         "credsStore": "pass", "credHelpers": {"aws.test:443": "ecr-login", "off.test": ""}}"#;
        assert_eq!(helper(config, "aws.test:443"), pair("ecr-login", "aws.test:443"));
        assert_eq!(helper(config, "other.test"), pair("pass", "other.test"));
        assert_eq!(
            helper(config, DEFAULT_REGISTRY),
            pair("pass", "https://index.docker.io/v1/")
        );
        assert_eq!(helper(config, "here.test"), None, "the file has them itself");
        assert_eq!(helper(config, "off.test"), None);
        assert_eq!(helper("{}", "other.test"), None);
    }

    #[test]
    fn a_helper_is_asked_for_what_docker_has_put_into_it() {
        let config = r#"{"auths": {"https://reg.test/v1/": {}}, "credsStore": "pass"}"#;
        assert_eq!(helper(config, "reg.test"), pair("pass", "https://reg.test/v1/"));
        let config = r#"{"credsStore": "pass"}"#;
        assert_eq!(
            helper(config, DEFAULT_REGISTRY),
            pair("pass", "https://index.docker.io/v1/")
        );
    }
}
