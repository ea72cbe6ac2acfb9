//! One test for each rule against leaking credentials and against being led where a registry has no business.
//!
//! Addresses of the loopback network stand in for different hosts: 127.0.0.1 is the registry, 127.0.0.2 a stranger.

use hypeman_images::{Credentials, ImageError};

use super::auth::{give_token, want_token};
use super::support::{Registry, amd64, answer, client, client_with, noise, store};

const SECRET: &str = "Basic dXNlcjpwYXNz";

fn secret() -> Credentials {
    Credentials::basic("user", "pass")
}

/// A registry with an image, and a second host; the registry wants basic authentication.
async fn guarded() -> (Registry, Registry) {
    let (registry, stranger) = (Registry::start().await, Registry::start_on("127.0.0.2").await);
    registry.add_image(&["v1"], "amd64", &[noise(1, 1000)]);
    registry.hook(|seen| {
        (seen.authorization() != Some(SECRET)).then(|| answer(401, &[("www-authenticate", "Basic")], ""))
    });
    (registry, stranger)
}

fn redirect_to(registry: &Registry, part: &'static str, status: u16, location: String) {
    registry.hook(move |seen| {
        seen.is_get_of(part)
            .then(|| answer(status, &[("location", &location)], ""))
    });
}

async fn resolve(registry: &Registry) -> Result<(), ImageError> {
    client()
        .resolve(&registry.reference("app:v1"), &amd64(), Some(&secret()))
        .await
        .map(|_| ())
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_to_another_host() {
    for status in [301, 302, 303, 307, 308] {
        let (registry, stranger) = guarded().await;
        let manifest = registry.add_image(&["v1"], "amd64", &[noise(2, 1000)]);
        for blob in [&manifest.config, &manifest.layers[0]] {
            let bytes = registry.content(|content| content.blobs[&blob.digest.to_string()].clone());
            stranger.add_blob(bytes);
        }
        let target = stranger.address;
        registry.hook(move |seen| {
            let location = format!("http://{target}{}?signature=abc", seen.path);
            (seen.is_get_of("/blobs/") && seen.authorization() == Some(SECRET))
                .then(|| answer(status, &[("location", &location)], ""))
        });
        let (_dir, store) = store().await;
        let client = client();
        let reference = registry.reference("app:v1");
        let resolved = client
            .resolve(&reference, &amd64(), Some(&secret()))
            .await
            .unwrap();
        client
            .pull(&reference, &resolved, Some(&secret()), &store, &())
            .await
            .unwrap();
        let seen = stranger.seen();
        assert_eq!(seen.len(), 3, "the config twice, the layer once");
        assert!(seen.iter().all(|seen| seen.authorization().is_none()));
    }
}

#[tokio::test]
async fn credentials_do_not_follow_a_redirect_to_another_port() {
    let (registry, _) = guarded().await;
    let neighbour = Registry::start().await;
    neighbour.hook(|_| Some(answer(401, &[("www-authenticate", "Basic")], "")));
    redirect_to(
        &registry,
        "/manifests/",
        307,
        neighbour.url("/v2/app/manifests/v1"),
    );
    let error = resolve(&registry).await.unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    assert!(neighbour.seen().iter().all(|seen| seen.authorization().is_none()));
}

#[tokio::test]
async fn a_redirected_host_that_asks_for_a_token_gets_an_anonymous_one() {
    let (registry, stranger) = guarded().await;
    let manifest = stranger.add_image(&["v1"], "amd64", &[noise(3, 10)]);
    want_token(&stranger, stranger.url("/token"), "anonymous");
    give_token(&stranger, "anonymous", |seen| seen.authorization().is_none());
    redirect_to(&registry, "/v2/", 307, stranger.url("/v2/app/manifests/v1"));
    let config = manifest.config.digest;
    let blob = stranger.url(&format!("/v2/app/blobs/{config}"));
    redirect_to(&registry, "/blobs/", 307, blob);
    resolve(&registry).await.unwrap();
    assert!(
        stranger
            .seen()
            .iter()
            .all(|seen| seen.authorization() != Some(SECRET))
    );
}

#[tokio::test]
async fn an_unrelated_realm_gets_no_credentials() {
    let (registry, stranger) = (Registry::start().await, Registry::start_on("127.0.0.2").await);
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    want_token(&registry, stranger.url("/token"), "t0ken");
    give_token(&stranger, "t0ken", |seen| seen.authorization().is_some());
    let error = resolve(&registry).await.unwrap_err();
    assert!(
        error
            .to_string()
            .contains("add 127.0.0.1=127.0.0.2 to images.trusted_realms"),
        "the way out is told: {error}"
    );
    assert!(stranger.seen().iter().all(|seen| seen.authorization().is_none()));
    assert_eq!(stranger.seen().len(), 1);
}

#[tokio::test]
async fn a_realm_that_the_operator_trusts_gets_them() {
    let (registry, service) = (Registry::start().await, Registry::start_on("127.0.0.2").await);
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    want_token(&registry, service.url("/token"), "t0ken");
    give_token(&service, "t0ken", |seen| seen.authorization() == Some(SECRET));
    let client = client_with(|options| {
        options.trusted_realms = vec![("127.0.0.1".to_owned(), "127.0.0.2".to_owned())];
    });
    client
        .resolve(&registry.reference("app:v1"), &amd64(), Some(&secret()))
        .await
        .unwrap();
}

#[tokio::test]
async fn hostile_realms_are_refused_without_a_request() {
    for realm in [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "http://[::ffff:a9fe:a9fe]/",
        "http://0xa9fea9fe/",
        "http://2852039166/",
        "http://[fe80::1]/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://user:pass@127.0.0.1/token",
        "http://user@127.0.0.1/token",
        "http://example.com/token",
        "http://10.0.0.1/token",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "/token",
        "",
    ] {
        let registry = Registry::start().await;
        want_token(&registry, realm.to_owned(), "t0ken");
        let error = resolve(&registry).await.unwrap_err();
        assert!(
            matches!(error, ImageError::UnsafeServer { .. }),
            "{realm}: {error}"
        );
        assert!(
            registry.seen().iter().all(|seen| seen.authorization().is_none()),
            "{realm}"
        );
    }
}

#[tokio::test]
async fn hostile_redirects_are_refused_without_a_request() {
    for location in [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "//169.254.169.254/",
        "http://user:pass@127.0.0.1/",
        "http://example.com/",
        "file:///etc/passwd",
        "http://",
    ] {
        let (registry, _) = guarded().await;
        redirect_to(&registry, "/manifests/", 307, location.to_owned());
        let error = resolve(&registry).await.unwrap_err();
        assert!(
            matches!(error, ImageError::UnsafeServer { .. }),
            "{location}: {error}"
        );
    }
}

#[tokio::test]
async fn token_calls_are_not_redirected() {
    let registry = Registry::start().await;
    let stranger = Registry::start_on("127.0.0.2").await;
    want_token(&registry, registry.url("/token"), "t0ken");
    redirect_to(&registry, "/token", 307, stranger.url("/token"));
    let error = resolve(&registry).await.unwrap_err();
    assert!(matches!(error, ImageError::UnsafeServer { .. }), "{error}");
    assert_eq!(stranger.seen().len(), 0);
}

#[tokio::test]
async fn redirects_end() {
    let (registry, _) = guarded().await;
    redirect_to(&registry, "/manifests/", 302, "/v2/app/manifests/v1".to_owned());
    let error = resolve(&registry).await.unwrap_err();
    assert!(error.to_string().contains("too often"), "{error}");
}

#[tokio::test]
async fn challenges_end() {
    let registry = Registry::start().await;
    want_token(&registry, registry.url("/token"), "good");
    give_token(&registry, "bad", |_| true);
    let error = resolve(&registry).await.unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    assert_eq!(registry.count(|seen| seen.path == "/token"), 1);
}

#[tokio::test]
async fn plain_http_is_for_loopback_and_listed_registries_only() {
    // Nothing listens there with TLS, so the attempt itself must fail, and never fall back to HTTP.
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    let reference = hypeman_images::Reference::parse("registry.invalid/app:v1").unwrap();
    let error = client().resolve(&reference, &amd64(), None).await.unwrap_err();
    assert_eq!(error.code(), "registry_unreachable", "{error}");
}

#[tokio::test]
async fn metadata_addresses_are_refused_even_as_the_registry_itself() {
    for name in [
        "169.254.169.254/app",
        "169.254.169.254:80/app",
        "[fe80::1]:5000/app",
        "[::ffff:a9fe:a9fe]/app",
    ] {
        let insecure = name.split('/').next().unwrap().to_owned();
        let client = client_with(|options| options.insecure = vec![insecure]);
        let reference = hypeman_images::Reference::parse(name).unwrap();
        let error = client.resolve(&reference, &amd64(), None).await.unwrap_err();
        assert!(
            matches!(error, ImageError::UnsafeServer { .. }),
            "{name}: {error}"
        );
    }
}
