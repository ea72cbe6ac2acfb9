//! What a server's answer means when it is no success.

use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use serde::Deserialize;

/// Statuses that may be gone at the next attempt.
pub(super) fn is_passing(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS
    ) || (status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED)
}

/// `Retry-After` in seconds; the date form is not used by registries and is ignored.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers
        .get(RETRY_AFTER)?
        .to_str()
        .ok()?
        .trim()
        .parse::<u64>()
        .ok()?;
    Some(Duration::from_secs(seconds.min(24 * 3600)))
}

/// The message in a registry's error body, made fit to print.
pub(super) fn server_message(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Body {
        #[serde(default)]
        errors: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let Ok(Body { errors }) = serde_json::from_slice(body) else {
        return String::new();
    };
    let Some(Item { code, message }) = errors.into_iter().next() else {
        return String::new();
    };
    let text = if message.is_empty() { code } else { message };
    text.chars()
        .filter(|character| !character.is_control())
        .take(200)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_made_fit_to_print() {
        let long = format!(
            r#"{{"errors":[{{"code":"X","message":"a\u001b[31m{}"}}]}}"#,
            "b".repeat(500)
        );
        let message = server_message(long.as_bytes());
        assert!(message.starts_with("a[31mb") && message.len() == 200, "{message}");
        assert_eq!(server_message(br#"{"errors":[{"code":"DENIED"}]}"#), "DENIED");
        assert_eq!(server_message(br#"{"errors":[]}"#), "");
        assert_eq!(server_message(b"<html>"), "");
    }

    #[test]
    fn retry_after_is_read_in_seconds_and_bounded() {
        let read = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(read(" 7 "), Some(Duration::from_secs(7)));
        assert_eq!(read("18446744073709551615"), Some(Duration::from_secs(86_400)));
        assert_eq!(read("-1"), None);
        assert_eq!(read("Wed, 21 Oct 2026 07:28:00 GMT"), None);
    }
}
