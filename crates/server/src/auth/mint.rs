//! Tokens are made offline, by whoever knows the secret.

use std::time::Duration;

use jsonwebtoken::{Algorithm, EncodingKey, Header};

use super::token::{BUILDER_SUBJECT, Claims};
use super::{Scope, hs256};

/// Why a token could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MintError {
    /// The server has no secret.
    #[error("the JWT secret is empty; set jwt_secret in the configuration first")]
    NoSecret,
    /// The subject is one that the API refuses.
    #[error("the user id must not be empty or begin with {BUILDER_SUBJECT:?}")]
    Subject,
    /// The lifetime does not fit a time.
    #[error("the duration must be at least a second and fit the calendar")]
    Duration,
    /// Signing failed.
    #[error("the token could not be signed: {0}")]
    Sign(#[from] jsonwebtoken::errors::Error),
}

/// Makes a token for `user` that is valid for `duration`, limited to `scopes`; `None` allows everything.
///
/// # Errors
/// When the secret is empty, or the user or the duration cannot be used.
pub fn mint(
    secret: &str,
    user: &str,
    duration: Duration,
    scopes: Option<&[Scope]>,
) -> Result<String, MintError> {
    if secret.is_empty() {
        return Err(MintError::NoSecret);
    }
    if user.is_empty() || user.starts_with(BUILDER_SUBJECT) {
        return Err(MintError::Subject);
    }
    let now = jiff::Timestamp::now().as_second();
    let lifetime = i64::try_from(duration.as_secs())
        .ok()
        .filter(|seconds| *seconds > 0)
        .ok_or(MintError::Duration)?;
    let claims = Claims {
        sub: user.to_owned(),
        iat: Some(now),
        exp: now.checked_add(lifetime).ok_or(MintError::Duration)?,
        permissions: scopes.map(|scopes| scopes.iter().map(|scope| scope.as_str().to_owned()).collect()),
        repos: None,
        scope: None,
        build_id: None,
    };
    hs256::install();
    Ok(jsonwebtoken::encode(
        &Header::new(Algorithm::HS256),
        &claims,
        &EncodingKey::from_secret(secret.as_bytes()),
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECRET: &str = "a secret of tests";

    #[test]
    fn unusable_requests_for_tokens_are_refused() {
        assert!(matches!(
            mint("", "ann", Duration::from_secs(60), None),
            Err(MintError::NoSecret)
        ));
        assert!(matches!(
            mint(SECRET, "", Duration::from_secs(60), None),
            Err(MintError::Subject)
        ));
        assert!(matches!(
            mint(SECRET, "builder-1", Duration::from_secs(60), None),
            Err(MintError::Subject)
        ));
        assert!(matches!(
            mint(SECRET, "ann", Duration::ZERO, None),
            Err(MintError::Duration)
        ));
        assert!(matches!(
            mint(SECRET, "ann", Duration::MAX, None),
            Err(MintError::Duration)
        ));
    }
}
