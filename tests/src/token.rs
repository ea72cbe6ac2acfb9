//! Tokens as operators mint them, and some that nobody should accept.

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, Mac};
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
    mint_with(secret, claims)
}

/// A token with further or other claims.
#[must_use]
pub fn mint_with(secret: &str, extra: Claims) -> String {
    let mut claims = Claims::new();
    claims.insert("sub".into(), json!("story"));
    claims.insert("iat".into(), json!(now()));
    claims.insert("exp".into(), json!(now() + 3600));
    claims.extend(extra);
    let header = json!({"alg": "HS256", "typ": "JWT"});
    let encode = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", encode(header), encode(Value::Object(claims)));
    let mac = Hmac::<sha2::Sha256>::new_from_slice(secret.as_bytes()).expect("any length");
    let signature = mac.chain_update(&text).finalize().into_bytes();
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}
