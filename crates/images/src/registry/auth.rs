//! Challenges and tokens: how a registry asks for proof, and how we get one from its token service.

use std::time::{Duration, Instant};

use reqwest::Url;
use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};
use serde::Deserialize;

use super::credentials::Credentials;
use super::policy::Origin;
use crate::error::{ImageError, Result};

/// Most tokens kept.
pub(super) const MAX_TOKENS: usize = 1024;
/// Largest answer of a token service, in bytes.
pub(super) const MAX_TOKEN_BYTES: u64 = 256 << 10;
/// Longest token that is sent on, in bytes.
const MAX_TOKEN_TEXT: usize = 64 << 10;
/// Life of a token whose service does not say, as the protocol has it.
const DEFAULT_LIFE: Duration = Duration::from_secs(60);
/// Tokens are renewed at the latest after this, whatever their service says.
const MAX_LIFE: Duration = Duration::from_secs(3600);

/// What a cached token is good for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct TokenKey {
    pub(super) origin: Origin,
    pub(super) scope: String,
    /// Hash of the credentials that earned it, so that no one uses another's token.
    pub(super) credentials: Option<[u8; 32]>,
}

/// An `Authorization` value and when to stop using it.
#[derive(Clone)]
pub(super) struct Token {
    pub(super) header: String,
    pub(super) expires: Instant,
}

/// One way to authenticate that a server offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Challenge {
    Basic,
    Bearer { realm: String, service: Option<String> },
}

/// The strongest challenge of an answer: Bearer before Basic.
pub(super) fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let mut found = None;
    for value in headers.get_all(WWW_AUTHENTICATE).iter().take(8) {
        let Ok(text) = value.to_str() else { continue };
        for challenge in parse(text.get(..4096).unwrap_or(text)) {
            match challenge {
                Challenge::Bearer { .. } => return Some(challenge),
                Challenge::Basic => found = Some(challenge),
            }
        }
    }
    found
}

/// Reads a `WWW-Authenticate` value: schemes, each with comma-separated `name=value` or `name="value"`.
fn parse(text: &str) -> Vec<Challenge> {
    let mut challenges: Vec<(String, Vec<(String, String)>)> = Vec::new();
    let mut rest = text.trim_start_matches([' ', ',', '\t']);
    while !rest.is_empty() {
        let end = rest.find([' ', '=', ',', '\t']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let after = after.trim_start_matches([' ', '\t']);
        if let Some(value) = after.strip_prefix('=')
            && !word.is_empty()
        {
            let (value, after) = read_value(value.trim_start_matches([' ', '\t']));
            if let Some((_, parameters)) = challenges.last_mut() {
                parameters.push((word.to_ascii_lowercase(), value));
            }
            rest = after;
        } else if word.is_empty() {
            rest = after.get(1..).unwrap_or_default();
        } else {
            challenges.push((word.to_ascii_lowercase(), Vec::new()));
            rest = after;
        }
        rest = rest.trim_start_matches([' ', ',', '\t']);
    }
    let read = |(scheme, parameters): (String, Vec<(String, String)>)| {
        let get = |name: &str| {
            parameters
                .iter()
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.clone())
        };
        match scheme.as_str() {
            "basic" => Some(Challenge::Basic),
            "bearer" => Some(Challenge::Bearer {
                realm: get("realm")?,
                service: get("service"),
            }),
            _ => None,
        }
    };
    challenges.into_iter().filter_map(read).collect()
}

fn read_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut escaped = false;
    for (index, character) in quoted.char_indices() {
        match character {
            _ if escaped => {
                value.push(character);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (value, &quoted[index + 1..]),
            _ => value.push(character),
        }
    }
    (value, "")
}

/// A request to a token service.
pub(super) struct TokenRequest {
    pub(super) url: Url,
    pub(super) authorization: Option<String>,
    /// Form body of the OAuth2 exchange of a refresh token; `None` means GET.
    pub(super) form: Option<String>,
}

/// Builds the request. `credentials` are only given when the realm may see them.
pub(super) fn token_request(
    realm: &Url,
    service: Option<&str>,
    scope: &str,
    credentials: Option<&Credentials>,
) -> TokenRequest {
    let mut url = realm.clone();
    url.set_fragment(None);
    let service = service.map(|text| text.chars().take(256).collect::<String>());
    if let Some(refresh) = credentials.and_then(Credentials::refresh_token) {
        let mut form = realm.clone();
        form.set_query(None);
        let mut pairs = form.query_pairs_mut();
        pairs
            .append_pair("grant_type", "refresh_token")
            .append_pair("client_id", "hypeman");
        pairs
            .append_pair("refresh_token", refresh)
            .append_pair("scope", scope);
        if let Some(service) = &service {
            pairs.append_pair("service", service);
        }
        drop(pairs);
        return TokenRequest {
            url,
            authorization: None,
            form: form.query().map(str::to_owned),
        };
    }
    let mut pairs = url.query_pairs_mut();
    if let Some(service) = &service {
        pairs.append_pair("service", service);
    }
    pairs.append_pair("scope", scope);
    drop(pairs);
    TokenRequest {
        url,
        authorization: credentials.and_then(Credentials::basic_header),
        form: None,
    }
}

#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<f64>,
}

/// Reads the answer of a token service.
pub(super) fn token_of(answer: &[u8], host: &str, now: Instant) -> Result<Token> {
    let unusable = |reason: &str| ImageError::Unauthorized {
        host: host.to_owned(),
        reason: reason.to_owned(),
    };
    // No parser message: it could quote the token.
    let answer: Answer =
        serde_json::from_slice(answer).map_err(|_| unusable("the token service's answer is not a token"))?;
    let token = answer
        .token
        .filter(|token| !token.is_empty())
        .or(answer.access_token);
    let token = token
        .filter(|token| !token.is_empty())
        .ok_or_else(|| unusable("the token service gave no token"))?;
    if token.len() > MAX_TOKEN_TEXT || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(unusable("the token service gave a malformed token"));
    }
    let stated = answer
        .expires_in
        .filter(|seconds| seconds.is_finite() && *seconds > 0.0);
    let life = stated
        .map_or(DEFAULT_LIFE, |seconds| Duration::from_secs_f64(seconds.min(1e6)))
        .min(MAX_LIFE);
    // Renewed a little early, so that it does not expire on its way.
    let expires = now + life.saturating_sub(Duration::from_secs(5).min(life / 10));
    Ok(Token {
        header: format!("Bearer {token}"),
        expires,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_in_each_spelling() {
        let bearer = |realm: &str, service: Option<&str>| Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
        };
        assert_eq!(
            parse(
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="a:b:pull,push""#
            ),
            [bearer("https://auth.docker.io/token", Some("registry.docker.io"))]
        );
        assert_eq!(
            parse("bearer realm=https://a/b , service = x"),
            [bearer("https://a/b", Some("x"))]
        );
        assert_eq!(
            parse(r#"Basic realm="x, y", Bearer realm="https://r\"q""#),
            [Challenge::Basic, bearer("https://r\"q", None)]
        );
        assert_eq!(parse("Bearer service=x"), []);
        assert_eq!(parse("Negotiate"), []);
        assert_eq!(parse(r#"Bearer realm="open"#), [bearer("open", None)]);
    }

    #[test]
    fn a_token_request_carries_scope_and_service_and_keeps_the_realms_query() {
        let realm = Url::parse("https://a.example/token?tenant=1").unwrap();
        let credentials = Credentials::basic("u", "p");
        let request = token_request(&realm, Some("reg"), "repository:x/y:pull", Some(&credentials));
        assert_eq!(
            request.url.as_str(),
            "https://a.example/token?tenant=1&service=reg&scope=repository%3Ax%2Fy%3Apull"
        );
        assert_eq!(request.authorization.as_deref(), Some("Basic dTpw"));
    }

    #[test]
    fn a_refresh_token_goes_into_the_body_only() {
        let realm = Url::parse("https://a.example/token").unwrap();
        let request = token_request(&realm, None, "s", Some(&Credentials::identity_token("se&cret")));
        assert!(!request.url.as_str().contains("cret"));
        assert!(request.form.unwrap().contains("refresh_token=se%26cret"));
    }

    #[test]
    fn tokens_that_could_smuggle_headers_are_refused() {
        let now = Instant::now();
        assert!(token_of(br#"{"token":"a\r\nX: y"}"#, "h", now).is_err());
        assert!(token_of(br#"{"token":""}"#, "h", now).is_err());
        assert!(token_of(b"secret", "h", now).is_err_and(|error| !error.to_string().contains("secret")));
        let token = token_of(br#"{"access_token":"abc","expires_in":1e300}"#, "h", now).unwrap();
        assert_eq!(token.header, "Bearer abc");
        assert!(token.expires <= now + MAX_LIFE);
    }

    proptest::proptest! {
        #[test]
        fn no_challenge_makes_the_parser_panic(text in ".{0,200}") {
            parse(&text);
        }
    }
}
