//! Anonymous, basic and bearer authentication, and where credentials come from.

use std::sync::atomic::{AtomicUsize, Ordering};

use hypeman_images::{Credentials, ImageError};

use super::support::{Registry, Seen, amd64, answer, client, client_with, noise};

/// Makes the registry want a token from its own token service; `accepts` decides on the service's caller.
pub fn want_token(registry: &Registry, realm: String, token: &'static str) {
    let challenge = format!(r#"Bearer realm="{realm}",service="test""#);
    registry.hook(move |seen| {
        let wanted = format!("Bearer {token}");
        let known = seen.authorization() == Some(wanted.as_str());
        (seen.path.starts_with("/v2/") && !known)
            .then(|| answer(401, &[("www-authenticate", &challenge)], ""))
    });
}

pub fn give_token(
    registry: &Registry,
    token: &'static str,
    accepts: impl Fn(&Seen) -> bool + Send + Sync + 'static,
) {
    registry.hook(move |seen| {
        (seen.path == "/token").then(|| match accepts(seen) {
            true => answer(200, &[], format!(r#"{{"token":"{token}","expires_in":300}}"#)),
            false => answer(401, &[], ""),
        })
    });
}

#[tokio::test]
async fn an_anonymous_token_is_fetched_once_and_used_for_everything() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10), noise(2, 10)]);
    want_token(&registry, registry.url("/token"), "t0ken");
    give_token(&registry, "t0ken", |seen| {
        seen.authorization().is_none() && seen.query == "service=test&scope=repository%3Ateam%2Fapp%3Apull"
    });
    let client = client();
    let reference = registry.reference("team/app:v1");
    for _ in 0..2 {
        client.resolve(&reference, &amd64(), None).await.unwrap();
    }
    assert_eq!(registry.count(|seen| seen.path == "/token"), 1);
}

#[tokio::test]
async fn basic_credentials_are_sent_only_after_the_challenge() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    registry.hook(|seen| {
        (seen.authorization() != Some("Basic dXNlcjpwYXNz"))
            .then(|| answer(401, &[("www-authenticate", "Basic realm=\"x\"")], ""))
    });
    let credentials = Credentials::basic("user", "pass");
    client()
        .resolve(&registry.reference("app:v1"), &amd64(), Some(&credentials))
        .await
        .unwrap();
    assert_eq!(registry.seen()[0].authorization(), None);

    let wrong = Credentials::basic("user", "wrong-secret");
    let error = client()
        .resolve(&registry.reference("app:v1"), &amd64(), Some(&wrong))
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    assert!(!format!("{error} {error:?}").contains("wrong-secret"));
}

#[tokio::test]
async fn credentials_earn_a_token_and_ones_token_is_never_anothers() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    want_token(&registry, registry.url("/token"), "t0ken");
    give_token(&registry, "t0ken", |seen| {
        seen.authorization() == Some("Basic dXNlcjpwYXNz")
    });
    let client = client();
    let reference = registry.reference("app:v1");
    let credentials = Credentials::basic("user", "pass");
    client
        .resolve(&reference, &amd64(), Some(&credentials))
        .await
        .unwrap();
    let error = client.resolve(&reference, &amd64(), None).await.unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    let other = Credentials::basic("user", "other");
    assert!(client.resolve(&reference, &amd64(), Some(&other)).await.is_err());
}

#[tokio::test]
async fn an_expired_token_is_renewed_in_the_middle() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    let realm = registry.url("/token");
    let calls = AtomicUsize::new(0);
    registry.hook(move |seen| {
        let challenge = format!(r#"Bearer realm="{realm}""#);
        let refuse = || answer(401, &[("www-authenticate", &challenge)], "");
        if seen.path == "/token" {
            let token = format!("t{}", calls.fetch_add(1, Ordering::SeqCst));
            return Some(answer(200, &[], format!(r#"{{"access_token":"{token}"}}"#)));
        }
        // The manifest takes the first token, the config only the second.
        let wanted = if seen.path.contains("/blobs/") {
            "Bearer t1"
        } else {
            "Bearer t0"
        };
        (seen.authorization() != Some(wanted)).then(refuse)
    });
    client()
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_registry_token_is_sent_as_it_is() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    registry.hook(|seen| (seen.authorization() != Some("Bearer ready-made")).then(|| answer(401, &[], "")));
    let credentials = Credentials::registry_token("ready-made");
    client()
        .resolve(&registry.reference("app:v1"), &amd64(), Some(&credentials))
        .await
        .unwrap();
}

#[tokio::test]
async fn an_identity_token_is_exchanged_by_post_and_never_in_a_url() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    want_token(&registry, registry.url("/token"), "t0ken");
    give_token(&registry, "t0ken", |seen| {
        seen.method == axum::http::Method::POST && seen.query.is_empty()
    });
    let credentials = Credentials::identity_token("refresh-me");
    client()
        .resolve(&registry.reference("app:v1"), &amd64(), Some(&credentials))
        .await
        .unwrap();
}

#[tokio::test]
async fn dockers_config_file_is_read_and_borrowed_credentials_win() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    registry.hook(|seen| {
        (seen.authorization() != Some("Basic dXNlcjpwYXNz"))
            .then(|| answer(401, &[("www-authenticate", "Basic")], ""))
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    let auths =
        serde_json::json!({"auths": {format!("https://{}/v1/", registry.address): {"auth": "dXNlcjpwYXNz"}}});
    std::fs::write(file.path(), auths.to_string()).unwrap();
    let client = client_with(|options| options.docker_config = Some(file.path().to_owned()));
    let reference = registry.reference("app:v1");
    client.resolve(&reference, &amd64(), None).await.unwrap();
    let borrowed = Credentials::basic("someone", "else");
    assert!(
        client
            .resolve(&reference, &amd64(), Some(&borrowed))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_damaged_config_file_is_an_error_that_quotes_nothing_of_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), r#"{"auths": {"127.0.0.1:1": {"auth": hunter2}}}"#).unwrap();
    let client = client_with(|options| options.docker_config = Some(file.path().to_owned()));
    let reference = hypeman_images::Reference::parse("127.0.0.1:1/app").unwrap();
    let error = client.resolve(&reference, &amd64(), None).await.unwrap_err();
    assert_eq!(error.code(), "invalid_manifest");
    assert!(!format!("{error} {error:?}").contains("hunter2"));
}

#[test]
fn credentials_are_redacted_when_printed() {
    for credentials in [
        Credentials::basic("user-name", "pass-word"),
        Credentials::registry_token("pass-word"),
        Credentials::identity_token("pass-word"),
    ] {
        let printed = format!("{credentials:?}");
        assert!(
            !printed.contains("pass-word") && !printed.contains("user-name"),
            "{printed}"
        );
    }
}
