//! Tokens are verified on every request.

use std::collections::BTreeSet;

use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde::{Deserialize, Serialize};

use super::{Identity, Permissions, RegistryGrant, hs256};

/// Longest token that is looked at, bytes.
const MAX_TOKEN: usize = 16 * 1024;

/// Prefix of the subjects of build VMs.
pub(super) const BUILDER_SUBJECT: &str = "builder-";

/// What a valid token says. Unknown claims are ignored.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Claims {
    #[serde(default)]
    pub(super) sub: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) iat: Option<i64>,
    pub(super) exp: i64,
    // A double option keeps `null` apart from absence: only absence means full access.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) permissions: Option<Vec<String>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) repos: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) scope: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) build_id: Option<serde_json::Value>,
}

/// Why a token was refused. Displays as the contract's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// No `Authorization` header.
    #[error("authorization header required")]
    Missing,
    /// A header that is not `Bearer <token>`.
    #[error("invalid authorization header format")]
    Format,
    /// Signature, algorithm, expiry or claims are wrong.
    #[error("invalid token")]
    Invalid,
    /// A token that was made for something else.
    #[error("invalid token type")]
    Type,
}

/// Verifies tokens against one secret.
#[derive(Clone)]
pub struct Verifier {
    key: Option<DecodingKey>,
    validation: Validation,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier(..)")
    }
}

impl Verifier {
    /// A verifier for tokens signed with `secret`. An empty secret refuses every token.
    #[must_use]
    pub fn new(secret: &str) -> Self {
        hs256::install();
        let mut validation = Validation::new(Algorithm::HS256);
        validation.algorithms = vec![Algorithm::HS256];
        validation.leeway = 0;
        validation.validate_exp = true;
        validation.validate_nbf = true;
        validation.validate_aud = false;
        validation.set_required_spec_claims(&["exp"]);
        let key = (!secret.is_empty()).then(|| DecodingKey::from_secret(secret.as_bytes()));
        Self { key, validation }
    }

    /// The identity behind an `Authorization` header of the API.
    ///
    /// # Errors
    /// The reason for a 401.
    pub fn verify(&self, header: Option<&[u8]>) -> Result<Identity, TokenError> {
        let claims = self.claims(bearer(header)?)?;
        if is_registry_token(&claims) {
            return Err(TokenError::Type);
        }
        Ok(identity(claims))
    }

    /// What an `Authorization` header of the registry allows: `Bearer <token>`, or `Basic` with the token as
    /// the user name.
    ///
    /// # Errors
    /// The reason for a 401.
    pub fn verify_registry(&self, header: Option<&[u8]>) -> Result<RegistryGrant, TokenError> {
        let header_text = header.ok_or(TokenError::Missing)?;
        let claims = match basic_user(header_text) {
            Some(token) => self.claims(&token)?,
            None => self.claims(bearer(Some(header_text))?)?,
        };
        if !is_registry_token(&claims) {
            return Ok(RegistryGrant::User(identity(claims)));
        }
        let repositories: BTreeSet<String> = claims
            .repos
            .and_then(|repos| serde_json::from_value(repos).ok())
            .ok_or(TokenError::Invalid)?;
        let push = match claims.scope.as_ref().and_then(serde_json::Value::as_str) {
            Some("push") => true,
            Some("pull") => false,
            _ => return Err(TokenError::Invalid),
        };
        Ok(RegistryGrant::Builder { repositories, push })
    }

    fn claims(&self, token: &str) -> Result<Claims, TokenError> {
        let key = self.key.as_ref().ok_or(TokenError::Invalid)?;
        if token.len() > MAX_TOKEN {
            return Err(TokenError::Invalid);
        }
        // Absent and null permissions differ, which the typed claims cannot tell.
        let raw = jsonwebtoken::decode::<serde_json::Value>(token, key, &self.validation)
            .map_err(|_| TokenError::Invalid)?
            .claims;
        if raw.get("permissions").is_some_and(serde_json::Value::is_null) {
            return Err(TokenError::Invalid);
        }
        serde_json::from_value(raw).map_err(|_| TokenError::Invalid)
    }
}

fn identity(claims: Claims) -> Identity {
    let permissions = match claims.permissions {
        None => Permissions::Full,
        Some(list) if list.iter().any(|scope| scope == "*") => Permissions::Full,
        Some(list) => Permissions::Limited(list.into_iter().collect()),
    };
    Identity {
        subject: claims.sub,
        permissions,
    }
}

fn is_registry_token(claims: &Claims) -> bool {
    claims.repos.is_some()
        || claims.scope.is_some()
        || claims.build_id.is_some()
        || claims.sub.starts_with(BUILDER_SUBJECT)
}

fn bearer(header: Option<&[u8]>) -> Result<&str, TokenError> {
    let header = std::str::from_utf8(header.ok_or(TokenError::Missing)?).map_err(|_| TokenError::Format)?;
    let (scheme, token) = header.split_once(' ').ok_or(TokenError::Format)?;
    let token = token.trim();
    if scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && !token.contains(' ') {
        Ok(token)
    } else {
        Err(TokenError::Format)
    }
}

/// User name of a `Basic` header. Clients that insist on a password may send any.
fn basic_user(header: &[u8]) -> Option<String> {
    use base64::Engine as _;
    let text = std::str::from_utf8(header).ok()?;
    let (scheme, credentials) = text.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") || credentials.len() > 2 * MAX_TOKEN {
        return None;
    }
    let decoded = base64::engine::general_purpose::STANDARD
        .decode(credentials.trim())
        .ok()?;
    let decoded = String::from_utf8(decoded).ok()?;
    decoded.split_once(':').map(|(user, _)| user.to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use base64::Engine as _;
    use serde_json::json;

    use super::super::{RegistryAccess, Scope, mint};
    use super::*;

    const SECRET: &str = "a secret of tests";

    /// Signed by other code than the product's, with any length of hash.
    fn sign(algorithm: Algorithm, secret: &str, claims: &serde_json::Value) -> String {
        use hmac::{Hmac, Mac};
        fn mac<M: Mac + hmac::digest::KeyInit>(secret: &str, text: &str) -> Vec<u8> {
            let mac = <M as Mac>::new_from_slice(secret.as_bytes()).unwrap();
            mac.chain_update(text).finalize().into_bytes().to_vec()
        }
        let text = unsigned(&json!({"alg": algorithm, "typ": "JWT"}), claims);
        let text = text.trim_end_matches('.');
        let signature = match algorithm {
            Algorithm::HS256 => mac::<Hmac<sha2::Sha256>>(secret, text),
            Algorithm::HS384 => mac::<Hmac<sha2::Sha384>>(secret, text),
            _ => mac::<Hmac<sha2::Sha512>>(secret, text),
        };
        let signature = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(signature);
        format!("{text}.{signature}")
    }

    fn later() -> i64 {
        jiff::Timestamp::now().as_second() + 3600
    }

    fn verify(header: &str) -> Result<Identity, TokenError> {
        Verifier::new(SECRET).verify(Some(header.as_bytes()))
    }

    fn unsigned(header: &serde_json::Value, claims: &serde_json::Value) -> String {
        let encode = |value: &serde_json::Value| {
            base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string())
        };
        format!("{}.{}.", encode(header), encode(claims))
    }

    #[test]
    fn minted_tokens_are_accepted() {
        let token = mint(SECRET, "ann", Duration::from_secs(60), None).unwrap();
        for scheme in ["Bearer", "bearer", "BEARER"] {
            let identity = verify(&format!("{scheme} {token}")).unwrap();
            assert_eq!(
                identity,
                Identity {
                    subject: "ann".into(),
                    permissions: Permissions::Full
                }
            );
        }
        let limited = mint(
            SECRET,
            "ann",
            Duration::from_secs(60),
            Some(&[Scope::InstanceRead]),
        )
        .unwrap();
        let identity = verify(&format!("Bearer {limited}")).unwrap();
        assert!(identity.permissions.allow(Scope::InstanceRead));
        assert!(!identity.permissions.allow(Scope::InstanceWrite));
    }

    #[test]
    fn headers_that_are_no_bearer_tokens() {
        assert_eq!(Verifier::new(SECRET).verify(None), Err(TokenError::Missing));
        for header in [
            "",
            "Bearer",
            "Bearer ",
            "Basic abc",
            "abc",
            "Bearer a b",
            "\u{e9} x",
        ] {
            assert_eq!(verify(header), Err(TokenError::Format), "{header:?}");
        }
    }

    #[test]
    fn forged_and_stale_tokens() {
        let good = json!({"sub": "ann", "exp": later()});
        let cases = [
            ("alg none", unsigned(&json!({"alg": "none", "typ": "JWT"}), &good)),
            ("alg None", unsigned(&json!({"alg": "None"}), &good)),
            ("no alg", unsigned(&json!({"typ": "JWT"}), &good)),
            ("RS256 header", unsigned(&json!({"alg": "RS256"}), &good)),
            ("HS384", sign(Algorithm::HS384, SECRET, &good)),
            ("HS512", sign(Algorithm::HS512, SECRET, &good)),
            ("other secret", sign(Algorithm::HS256, "another", &good)),
            ("empty secret", sign(Algorithm::HS256, "", &good)),
            (
                "expired",
                sign(
                    Algorithm::HS256,
                    SECRET,
                    &json!({"sub": "ann", "exp": later() - 7200}),
                ),
            ),
            (
                "no expiry",
                sign(Algorithm::HS256, SECRET, &json!({"sub": "ann"})),
            ),
            (
                "expiry as text",
                sign(
                    Algorithm::HS256,
                    SECRET,
                    &json!({"sub": "ann", "exp": "tomorrow"}),
                ),
            ),
            (
                "not yet valid",
                sign(
                    Algorithm::HS256,
                    SECRET,
                    &json!({"exp": later(), "nbf": later() - 60}),
                ),
            ),
            (
                "permissions null",
                sign(
                    Algorithm::HS256,
                    SECRET,
                    &json!({"exp": later(), "permissions": null}),
                ),
            ),
            (
                "permissions text",
                sign(
                    Algorithm::HS256,
                    SECRET,
                    &json!({"exp": later(), "permissions": "*"}),
                ),
            ),
            ("garbage", "a.b.c".to_owned()),
            ("two parts", "a.b".to_owned()),
            ("huge", "a".repeat(MAX_TOKEN + 1)),
        ];
        for (what, token) in cases {
            assert_eq!(
                verify(&format!("Bearer {token}")),
                Err(TokenError::Invalid),
                "{what}"
            );
        }
    }

    #[test]
    fn a_tampered_signature_is_refused() {
        let token = mint(
            SECRET,
            "ann",
            Duration::from_secs(60),
            Some(&[Scope::InstanceRead]),
        )
        .unwrap();
        let mut parts: Vec<&str> = token.split('.').collect();
        let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD
            .encode(json!({"sub": "ann", "exp": later()}).to_string());
        parts[1] = &claims;
        assert_eq!(
            verify(&format!("Bearer {}", parts.join("."))),
            Err(TokenError::Invalid)
        );
    }

    #[test]
    fn permissions() {
        let permissions = |value: serde_json::Value| {
            let token = sign(
                Algorithm::HS256,
                SECRET,
                &json!({"sub": "ann", "exp": later(), "permissions": value}),
            );
            verify(&format!("Bearer {token}")).unwrap().permissions
        };
        assert_eq!(permissions(json!(["*"])), Permissions::Full);
        assert!(!permissions(json!([])).allow(Scope::InstanceRead));
        assert!(permissions(json!(["image:read", "future:scope"])).allow(Scope::ImageRead));
        assert!(!permissions(json!(["instance:*"])).allow(Scope::InstanceRead));
    }

    #[test]
    fn registry_tokens_do_not_open_the_api() {
        for claims in [
            json!({"sub": "x", "exp": later(), "repos": ["a"]}),
            json!({"sub": "x", "exp": later(), "scope": "push"}),
            json!({"sub": "x", "exp": later(), "build_id": "b"}),
            json!({"sub": "builder-b", "exp": later()}),
        ] {
            let token = sign(Algorithm::HS256, SECRET, &claims);
            assert_eq!(
                verify(&format!("Bearer {token}")),
                Err(TokenError::Type),
                "{claims}"
            );
        }
    }

    #[test]
    fn an_empty_secret_opens_nothing() {
        let token = sign(Algorithm::HS256, "", &json!({"sub": "ann", "exp": later()}));
        let verifier = Verifier::new("");
        assert_eq!(
            verifier.verify(Some(format!("Bearer {token}").as_bytes())),
            Err(TokenError::Invalid)
        );
    }

    #[test]
    fn the_registry_takes_both_forms() {
        let verifier = Verifier::new(SECRET);
        let token = mint(SECRET, "ann", Duration::from_secs(60), Some(&[Scope::ImageRead])).unwrap();
        let basic = base64::engine::general_purpose::STANDARD.encode(format!("{token}:anything"));
        for header in [
            format!("Bearer {token}"),
            format!("Basic {basic}"),
            format!("basic {basic}"),
        ] {
            let grant = verifier.verify_registry(Some(header.as_bytes())).unwrap();
            assert!(grant.allows(None, RegistryAccess::Pull));
            assert!(grant.allows(Some("any/depth/at/all"), RegistryAccess::Pull));
            assert!(!grant.allows(Some("any"), RegistryAccess::Push));
        }
        assert_eq!(verifier.verify_registry(None), Err(TokenError::Missing));
        assert!(verifier.verify_registry(Some(b"Basic !!!")).is_err());
    }

    #[test]
    fn builders_stay_in_their_repositories() {
        let verifier = Verifier::new(SECRET);
        let grant = |claims: &serde_json::Value| {
            verifier.verify_registry(Some(
                format!("Bearer {}", sign(Algorithm::HS256, SECRET, claims)).as_bytes(),
            ))
        };
        let push = grant(&json!({"sub": "builder-1", "exp": later(), "build_id": "1", "repos": ["builds/1"], "scope": "push"})).unwrap();
        assert!(push.allows(None, RegistryAccess::Pull));
        assert!(push.allows(Some("builds/1"), RegistryAccess::Push));
        assert!(push.allows(Some("builds/1"), RegistryAccess::Pull));
        assert!(!push.allows(Some("builds/2"), RegistryAccess::Pull));
        let pull =
            grant(&json!({"sub": "builder-1", "exp": later(), "repos": ["builds/1"], "scope": "pull"}))
                .unwrap();
        assert!(pull.allows(Some("builds/1"), RegistryAccess::Pull));
        assert!(!pull.allows(Some("builds/1"), RegistryAccess::Push));
        assert_eq!(
            grant(&json!({"sub": "builder-1", "exp": later()})),
            Err(TokenError::Invalid)
        );
    }
}
