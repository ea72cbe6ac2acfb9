//! What requests carry, checked before a handler sees it: JSON bodies, query parameters, tag filters.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;

use crate::error::ApiError;
use crate::strict;

/// Largest JSON body, bytes.
pub const MAX_JSON: usize = 1 << 20;

/// How long a client may take to send the next piece of a body.
pub const BODY_STALL: Duration = Duration::from_secs(30);

/// A required JSON body.
#[derive(Debug)]
pub struct JsonBody<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = json_body(request).await?;
        if bytes.is_empty() {
            return Err(ApiError::schema("a JSON body is required; send {} for defaults"));
        }
        read_json(&bytes).map(Self)
    }
}

/// A JSON body that may be absent.
#[derive(Debug)]
pub struct OptionalJsonBody<T>(pub Option<T>);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for OptionalJsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let bytes = json_body(request).await?;
        if bytes.is_empty() {
            return Ok(Self(None));
        }
        read_json(&bytes).map(Self)
    }
}

async fn json_body(request: Request) -> Result<Vec<u8>, ApiError> {
    let typed = request.headers().get(header::CONTENT_TYPE).map(|value| {
        let kind = value
            .to_str()
            .unwrap_or_default()
            .split(';')
            .next()
            .unwrap_or_default()
            .trim();
        kind.eq_ignore_ascii_case("application/json")
    });
    let bytes = read_body(request.into_body(), MAX_JSON).await?;
    if typed == Some(false) && !bytes.is_empty() {
        return Err(ApiError::schema("the body must be application/json"));
    }
    Ok(bytes)
}

fn read_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    strict::from_slice(bytes)
        .map_err(|error| ApiError::schema(format!("the body does not match the schema: {error}")))
}

/// Reads a body whole, within a size and with a client that keeps sending.
///
/// # Errors
/// 413 when it is larger, 408 when the client stalls, 400 when it breaks off.
pub async fn read_body(body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut stream = body.into_data_stream();
    let mut bytes = Vec::new();
    loop {
        match tokio::time::timeout(BODY_STALL, stream.next()).await {
            Err(_) => {
                return Err(ApiError::layer(
                    StatusCode::REQUEST_TIMEOUT,
                    "the body did not arrive in time",
                ));
            }
            Ok(None) => return Ok(bytes),
            Ok(Some(Err(_))) => return Err(ApiError::schema("the body broke off")),
            Ok(Some(Ok(chunk))) => {
                if bytes.len() + chunk.len() > limit {
                    let message = format!("the body is larger than {limit} bytes");
                    return Err(ApiError::layer(StatusCode::PAYLOAD_TOO_LARGE, message));
                }
                bytes.extend_from_slice(&chunk);
            }
        }
    }
}

/// A body as it comes, ended with an error when the client stalls. It may be asked again after its end.
pub fn streamed(body: Body) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send {
    let pieces = futures::stream::unfold(Some(body.into_data_stream()), |state| async {
        let mut stream = state?;
        match tokio::time::timeout(BODY_STALL, stream.next()).await {
            Ok(None) => None,
            Ok(Some(Ok(bytes))) => Some((Ok(bytes), Some(stream))),
            Ok(Some(Err(error))) => Some((Err(std::io::Error::other(error)), None)),
            Err(_) => Some((Err(std::io::Error::other("the client stalled")), None)),
        }
    });
    pieces.fuse()
}

/// Query parameters.
#[derive(Debug)]
pub struct Params<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Query::<T>::try_from_uri(&parts.uri)
            .map(|Query(params)| Self(params))
            .map_err(|error| ApiError::schema(format!("invalid query: {}", root_cause(&error))))
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

/// The `tags[key]=value` filter.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TagFilter(pub BTreeMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for TagFilter {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parse_tags(parts.uri.query().unwrap_or_default()).map(Self)
    }
}

fn parse_tags(query: &str) -> Result<BTreeMap<String, String>, ApiError> {
    let malformed = || ApiError::schema("invalid query: write tag filters as tags[key]=value");
    let mut tags = BTreeMap::new();
    for pair in query.split('&') {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let name = decode(name).ok_or_else(malformed)?;
        let Some(rest) = name.strip_prefix("tags") else {
            continue;
        };
        let Some(key) = rest.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) else {
            if rest.is_empty() || rest.starts_with('[') {
                return Err(malformed());
            }
            continue;
        };
        let value = decode(value).ok_or_else(malformed)?;
        if tags.insert(key.to_owned(), value).is_some() {
            return Err(ApiError::schema(format!(
                "invalid query: tags[{key}] is given twice"
            )));
        }
        if tags.len() > hypeman_core::tags::MAX_ENTRIES {
            return Err(ApiError::schema("invalid query: too many tag filters"));
        }
    }
    // What cannot be a tag would match nothing, and is a mistake: `tags[a][b]=c` for instance.
    hypeman_core::tags::check(&tags)
        .map_err(|error| ApiError::schema(format!("invalid query: {}", error.message)))?;
    Ok(tags)
}

/// Decodes one part of a query; `None` when it is not UTF-8.
fn decode(text: &str) -> Option<String> {
    let spaced = text.replace('+', " ");
    percent_decode_str(&spaced)
        .decode_utf8()
        .ok()
        .map(std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tags(query: &str) -> Vec<(String, String)> {
        parse_tags(query).unwrap().into_iter().collect()
    }

    fn pair(key: &str, value: &str) -> (String, String) {
        (key.to_owned(), value.to_owned())
    }

    #[test]
    fn brackets_may_be_encoded() {
        assert_eq!(
            tags("tags[team]=backend&state=Running"),
            [pair("team", "backend")]
        );
        assert_eq!(
            tags("tags%5Bteam%5D=backend&tags%5benv%5d=prod"),
            [pair("env", "prod"), pair("team", "backend")]
        );
    }

    #[test]
    fn special_characters_of_tags_survive() {
        assert_eq!(
            tags("tags%5Ba%2Fb%3Dc%2Bd+e%5D=x%2Fy%3Dz%2Bq%20r"),
            [pair("a/b=c+d e", "x/y=z+q r")]
        );
        assert_eq!(tags("tags[a]="), [pair("a", "")]);
        assert_eq!(tags("tags[a]"), [pair("a", "")]);
    }

    #[test]
    fn malformed_filters_are_refused() {
        for query in [
            "tags=x",
            "tags[a=x",
            "tags[a]=%ff",
            "tags[a]=1&tags[a]=2",
            "tags",
            "tags[a][b]=1",
            "tags[]=x",
            "tags[%C3%A4]=x",
        ] {
            assert_eq!(
                parse_tags(query).unwrap_err().status(),
                StatusCode::BAD_REQUEST,
                "{query}"
            );
        }
        assert!(tags("tagsoup=1&other").is_empty());
    }

    proptest! {
        #[test]
        fn any_query_is_answered(query in ".{0,200}") {
            let _ = parse_tags(&query);
        }
    }
}
