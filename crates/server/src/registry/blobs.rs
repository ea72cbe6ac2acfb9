//! Reading blobs, whole or in part.

use axum::body::Body;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use hypeman_images::{Digest, ImageError};
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_util::io::ReaderStream;

use super::error::{RegistryFailure, RegistryResult};
use super::{CONTENT_DIGEST, empty, set};
use crate::error::ApiError;
use crate::state::AppState;

/// Bytes read from disk at once.
const READ_SIZE: usize = 256 * 1024;

/// `GET` and `HEAD` of a blob.
pub async fn read(
    state: &AppState,
    method: &Method,
    headers: &HeaderMap,
    digest: &Digest,
) -> RegistryResult<Response> {
    let (file, size) = if method == Method::HEAD {
        // Who asks so does not store it again when it is here.
        let size = state.engine.registry_promise_blob(digest).await?;
        let size = size.ok_or_else(|| ImageError::NotFound(format!("blob {digest}")))?;
        (None, size)
    } else {
        let (file, size) = state.engine.blobs().open_blob(digest).await?;
        (Some(file), size)
    };
    let range = headers
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok())
        .map_or(Part::Whole, |text| part(text, size));
    let (status, start, length) = match range {
        Part::Whole => (StatusCode::OK, 0, size),
        Part::Range { start, end } => (StatusCode::PARTIAL_CONTENT, start, end - start + 1),
        Part::Unsatisfiable => {
            let failure = RegistryFailure::new(
                StatusCode::RANGE_NOT_SATISFIABLE,
                "SIZE_INVALID",
                "the range is outside of the blob",
            );
            return Err(failure.with(header::CONTENT_RANGE, format!("bytes */{size}")));
        }
    };
    let mut response = if let Some(mut file) = file {
        if start > 0 {
            file.seek(std::io::SeekFrom::Start(start))
                .await
                .map_err(|error| {
                    let error = ApiError::internal(&error);
                    RegistryFailure::new(error.status(), "UNKNOWN", error.message())
                })?;
        }
        let mut response = Response::new(Body::from_stream(ReaderStream::with_capacity(
            file.take(length),
            READ_SIZE,
        )));
        *response.status_mut() = status;
        response
    } else {
        empty(status)
    };
    set(&mut response, CONTENT_DIGEST, &digest.to_string());
    set(&mut response, header::ETAG, &format!("\"{digest}\""));
    if status == StatusCode::PARTIAL_CONTENT {
        set(
            &mut response,
            header::CONTENT_RANGE,
            &format!("bytes {start}-{}/{size}", start + length - 1),
        );
    }
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    fields.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    fields.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    Ok(response)
}

/// What part of a blob a request wants.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    Whole,
    /// Both included.
    Range {
        start: u64,
        end: u64,
    },
    Unsatisfiable,
}

/// Reads a `Range` header. Several ranges and foreign units are answered with the whole, as HTTP allows.
fn part(text: &str, size: u64) -> Part {
    let Some((first, last)) = text
        .trim()
        .strip_prefix("bytes=")
        .and_then(|range| range.split_once('-'))
    else {
        return Part::Whole;
    };
    let number = |text: &str| text.trim().parse::<u64>().ok();
    let (start, end) = match (first.trim(), last.trim()) {
        ("", suffix) => match number(suffix) {
            None => return Part::Whole,
            Some(0) => return Part::Unsatisfiable,
            Some(count) => (size.saturating_sub(count), size.saturating_sub(1)),
        },
        (first, "") => match number(first) {
            None => return Part::Whole,
            Some(start) => (start, size.saturating_sub(1)),
        },
        (first, last) => match (number(first), number(last)) {
            (Some(start), Some(end)) if start <= end => (start, end.min(size.saturating_sub(1))),
            _ => return Part::Whole,
        },
    };
    if start >= size {
        Part::Unsatisfiable
    } else {
        Part::Range { start, end }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges() {
        for (text, expected) in [
            ("bytes=0-3", Part::Range { start: 0, end: 3 }),
            ("bytes=4-", Part::Range { start: 4, end: 9 }),
            ("bytes=-4", Part::Range { start: 6, end: 9 }),
            ("bytes=-100", Part::Range { start: 0, end: 9 }),
            ("bytes=0-100", Part::Range { start: 0, end: 9 }),
            ("bytes=9-9", Part::Range { start: 9, end: 9 }),
            ("bytes=10-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=3-1", Part::Whole),
            ("bytes=0-1,3-4", Part::Whole),
            ("lines=0-1", Part::Whole),
            ("bytes=x-y", Part::Whole),
        ] {
            assert_eq!(part(text, 10), expected, "{text}");
        }
        assert_eq!(part("bytes=0-", 0), Part::Unsatisfiable);
    }
}
