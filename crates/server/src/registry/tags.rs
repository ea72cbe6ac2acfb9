//! Lists of tags, a page at a time.

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use hypeman_api::registry::TagList;
use percent_encoding::{NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::error::{RegistryFailure, RegistryResult};
use super::set;
use crate::state::AppState;

/// `GET <name>/tags/list`
pub fn list(state: &AppState, repository: &str, query: Option<&str>) -> RegistryResult<Response> {
    let tags = state.engine.registry_tags(repository)?.ok_or_else(|| {
        RegistryFailure::new(
            StatusCode::NOT_FOUND,
            "NAME_UNKNOWN",
            "repository name not known to registry",
        )
    })?;
    let (page, more) = page(tags, query.unwrap_or_default())?;
    let next = page.last().filter(|_| more.is_some()).map(|last| {
        let last = utf8_percent_encode(last, NON_ALPHANUMERIC);
        format!(
            "</v2/{repository}/tags/list?n={}&last={last}>; rel=\"next\"",
            more.unwrap_or_default()
        )
    });
    let mut response = Json(TagList {
        name: repository.to_owned(),
        tags: page,
    })
    .into_response();
    if let Some(next) = next {
        set(&mut response, header::LINK, &next);
    }
    Ok(response)
}

/// The tags of one page, and its size when another follows.
fn page(mut tags: Vec<String>, query: &str) -> RegistryResult<(Vec<String>, Option<usize>)> {
    let mut count = None;
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        let value = percent_decode_str(value).decode_utf8_lossy();
        match name {
            "n" => {
                let invalid = || {
                    RegistryFailure::new(
                        StatusCode::BAD_REQUEST,
                        "PAGINATION_NUMBER_INVALID",
                        "n must be a number",
                    )
                };
                count = Some(value.parse::<usize>().map_err(|_| invalid())?);
            }
            "last" => tags.retain(|tag| tag.as_str() > value.as_ref()),
            _ => {}
        }
    }
    match count {
        Some(count) if count < tags.len() => {
            tags.truncate(count);
            Ok((tags, Some(count)))
        }
        _ => Ok((tags, None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages() {
        let tags = || ["a", "b", "c", "d"].map(str::to_owned).to_vec();
        let of = |query: &str| page(tags(), query).unwrap();
        assert_eq!(of(""), (tags(), None));
        assert_eq!(of("n=2"), (vec!["a".into(), "b".into()], Some(2)));
        assert_eq!(of("n=2&last=b"), (vec!["c".into(), "d".into()], None));
        assert_eq!(of("last=b&n=1"), (vec!["c".into()], Some(1)));
        assert_eq!(of("n=0"), (vec![], Some(0)));
        assert_eq!(of("last=z"), (vec![], None));
        assert!(page(tags(), "n=-1").is_err());
        assert!(page(tags(), "n=x").is_err());
    }
}
