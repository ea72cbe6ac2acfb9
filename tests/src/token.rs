//! Tokens as operators mint them, and some that nobody should accept.

use std::time::{SystemTime, UNIX_EPOCH};

use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Map, Value, json};

/// Claims of a token.
pub type Claims = Map<String, Value>;

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock after 1970")
        .as_secs()
}

/// A valid token of one hour; `scopes` limits it.
#[must_use]
pub fn mint(secret: &str, scopes: Option<&[&str]>) -> String {
    let mut claims = Claims::new();
    if let Some(scopes) = scopes {
        claims.insert("permissions".into(), json!(scopes));
    }
    mint_with(secret, claims, Algorithm::HS256)
}

/// A token with further or other claims and any HMAC algorithm.
#[must_use]
pub fn mint_with(secret: &str, extra: Claims, algorithm: Algorithm) -> String {
    let mut claims = Claims::new();
    claims.insert("sub".into(), json!("story"));
    claims.insert("iat".into(), json!(now()));
    claims.insert("exp".into(), json!(now() + 3600));
    claims.extend(extra);
    jsonwebtoken::encode(
        &Header::new(algorithm),
        &claims,
        &EncodingKey::from_secret(secret.as_bytes()),
    )
    .expect("token")
}
