//! Pushing from archives and from the blob store.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::http::Method;
use hypeman_images::manifest::media_type;
use hypeman_images::{
    BlobStore, Credentials, Descriptor, Digest, ImageError, Manifest, Platform, PushOptions, RegistryClient,
};

use super::support::{Registry, Seen, amd64, answer, client, config_for, noise, store};

/// An image in a blob store.
pub async fn stored_image(store: &BlobStore, kind: &str, sizes: &[usize]) -> Manifest {
    let layers: Vec<_> = sizes
        .iter()
        .enumerate()
        .map(|(seed, size)| noise(seed as u64 + 1, *size))
        .collect();
    let mut descriptors = Vec::new();
    for layer in &layers {
        let digest = store.put_bytes(layer.clone()).await.unwrap();
        descriptors.push(Descriptor::new(
            media_type::DOCKER_LAYER,
            digest,
            layer.len() as u64,
        ));
    }
    let config = config_for("amd64", &layers);
    let descriptor = Descriptor::of(media_type::DOCKER_CONFIG, &config);
    store.put_bytes(config.into()).await.unwrap();
    let manifest = Manifest::assemble(kind, descriptor, descriptors).unwrap();
    store.put_bytes(manifest.raw.clone()).await.unwrap();
    manifest
}

pub fn root_of(manifest: &Manifest) -> Descriptor {
    Descriptor::of(&manifest.media_type, &manifest.raw)
}

async fn push(
    client: &RegistryClient,
    registry: &Registry,
    store: &BlobStore,
    manifest: &Manifest,
) -> Result<hypeman_images::Pushed, ImageError> {
    let target = registry.reference("team/app:v1");
    client
        .push(
            &Arc::new(store.clone()),
            &root_of(manifest),
            &target,
            None,
            &PushOptions::default(),
            &(),
        )
        .await
}

#[tokio::test]
async fn an_image_is_pushed_and_can_be_pulled_again() {
    let registry = Registry::start().await;
    let (_dir, source) = store().await;
    let manifest = stored_image(&source, media_type::DOCKER_MANIFEST, &[1_000_000, 0, 300_000]).await;
    let client = client();
    let pushed = push(&client, &registry, &source, &manifest).await.unwrap();
    assert_eq!(pushed.digest, manifest.digest);
    assert_eq!(pushed.layers, 3);
    assert_eq!(pushed.bytes, 1_300_000 + manifest.config.size);

    let (_other, store) = store().await;
    let reference = registry.reference("team/app:v1");
    let resolved = client.resolve(&reference, &amd64(), None).await.unwrap();
    assert_eq!(resolved.digest, manifest.digest);
    client
        .pull(&reference, &resolved, None, &store, &())
        .await
        .unwrap();
}

#[tokio::test]
async fn blobs_that_the_registry_has_are_not_sent_again() {
    let registry = Registry::start().await;
    let (_dir, source) = store().await;
    let manifest = stored_image(&source, media_type::OCI_MANIFEST, &[1000, 2000]).await;
    let client = client();
    push(&client, &registry, &source, &manifest).await.unwrap();
    let posts = registry.count(|seen| seen.method == Method::POST);
    assert_eq!(
        push(&client, &registry, &source, &manifest).await.unwrap().bytes,
        0
    );
    assert_eq!(registry.count(|seen| seen.method == Method::POST), posts);
}

#[tokio::test]
async fn a_docker_image_can_be_pushed_as_oci() {
    let registry = Registry::start().await;
    let (_dir, source) = store().await;
    let manifest = stored_image(&source, media_type::DOCKER_MANIFEST, &[1000]).await;
    let options = PushOptions {
        convert_to_oci: true,
        ..PushOptions::default()
    };
    let target = registry.reference("app:v1");
    let pushed = client()
        .push(
            &Arc::new(source),
            &root_of(&manifest),
            &target,
            None,
            &options,
            &(),
        )
        .await
        .unwrap();
    assert_ne!(pushed.digest, manifest.digest);
    let resolved = client().resolve(&target, &amd64(), None).await.unwrap();
    assert_eq!(resolved.manifest.media_type, media_type::OCI_MANIFEST);
    assert_eq!(resolved.manifest.config.media_type, media_type::OCI_CONFIG);
    assert_eq!(resolved.manifest.layers[0].media_type, media_type::OCI_LAYER);
}

#[tokio::test]
async fn an_index_is_pushed_with_its_images_first() {
    let registry = Registry::start().await;
    let (_dir, source) = store().await;
    let amd = stored_image(&source, media_type::OCI_MANIFEST, &[1000]).await;
    let arm = stored_image(&source, media_type::OCI_MANIFEST, &[2000]).await;
    let entry = |manifest: &Manifest, platform: &str| Descriptor {
        platform: Some(Platform::parse(platform).unwrap()),
        ..root_of(manifest)
    };
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": media_type::OCI_INDEX,
        "manifests": [entry(&amd, "linux/amd64"), entry(&arm, "linux/arm64")],
    });
    let index = serde_json::to_vec(&index).unwrap();
    let root = Descriptor::of(media_type::OCI_INDEX, &index);
    source.put_bytes(index.into()).await.unwrap();
    let source = Arc::new(source);
    let target = registry.reference("app:v1");
    let pushed = client()
        .push(&source, &root, &target, None, &PushOptions::default(), &())
        .await
        .unwrap();
    assert_eq!(pushed.digest, root.digest);
    let puts: Vec<String> = registry
        .seen()
        .into_iter()
        .filter(|seen| seen.method == Method::PUT && seen.path.contains("/manifests/"))
        .map(|seen| seen.path)
        .collect();
    assert_eq!(puts.len(), 3);
    assert!(puts[2].ends_with("/manifests/v1"), "{puts:?}");
    assert_eq!(
        client()
            .resolve(&target, &Platform::linux("arm64"), None)
            .await
            .unwrap()
            .digest,
        arm.digest
    );

    let only = PushOptions {
        platform: Some(amd64()),
        ..PushOptions::default()
    };
    let target = registry.reference("app:amd");
    let pushed = client()
        .push(&source, &root, &target, None, &only, &())
        .await
        .unwrap();
    assert_eq!(pushed.digest, amd.digest);
}

#[tokio::test]
async fn an_upload_that_breaks_is_sent_again_from_its_start() {
    let registry = Registry::start().await;
    let (_dir, source) = store().await;
    let manifest = stored_image(&source, media_type::OCI_MANIFEST, &[1_000_000]).await;
    let calls = AtomicUsize::new(0);
    registry.hook(move |seen| {
        let is_blob = seen.method == Method::PUT && seen.path.contains("/blobs/uploads/");
        (is_blob && calls.fetch_add(1, Ordering::SeqCst) < 2).then(|| answer(502, &[], ""))
    });
    push(&client(), &registry, &source, &manifest).await.unwrap();
}

#[tokio::test]
async fn the_registrys_own_words_reach_the_user() {
    let registry = Registry::start().await;
    let (_dir, source) = store().await;
    let manifest = stored_image(&source, media_type::OCI_MANIFEST, &[10]).await;
    registry.hook(|seen| {
        (seen.method == Method::PUT && seen.path.contains("/manifests/")).then(|| {
            answer(
                400,
                &[],
                r#"{"errors":[{"code":"MANIFEST_INVALID","message":"tag is\u0007 frozen"}]}"#,
            )
        })
    });
    let error = push(&client(), &registry, &source, &manifest).await.unwrap_err();
    assert!(error.to_string().contains("tag is frozen"), "{error}");
}

#[tokio::test]
async fn a_blob_that_the_source_lacks_is_named() {
    let registry = Registry::start().await;
    let (_dir, source) = store().await;
    let manifest = stored_image(&source, media_type::OCI_MANIFEST, &[10, 20]).await;
    source.delete(&manifest.layers[1].digest).await.unwrap();
    let error = push(&client(), &registry, &source, &manifest).await.unwrap_err();
    assert!(
        error.to_string().contains(&manifest.layers[1].digest.to_string()),
        "{error}"
    );
    assert_eq!(registry.count(|seen| seen.path.contains("/manifests/")), 0);
}

#[tokio::test]
async fn a_target_digest_must_be_the_images() {
    let registry = Registry::start().await;
    let (_dir, source) = store().await;
    let manifest = stored_image(&source, media_type::OCI_MANIFEST, &[10]).await;
    let target = registry.reference("app").with_digest(Digest::of(b"other"));
    let options = PushOptions::default();
    let outcome = client()
        .push(
            &Arc::new(source),
            &root_of(&manifest),
            &target,
            None,
            &options,
            &(),
        )
        .await;
    assert!(
        matches!(outcome, Err(ImageError::DigestMismatch { .. })),
        "{outcome:?}"
    );
}

/// Pushes with credentials to a registry that sends uploads to `location`.
async fn push_to_location(
    location: impl Fn(&Registry) -> String,
    stranger: &Registry,
) -> Result<(), ImageError> {
    let registry = Registry::start().await;
    let (_dir, source) = store().await;
    let manifest = stored_image(&source, media_type::OCI_MANIFEST, &[10]).await;
    let location = location(stranger);
    registry
        .hook(move |seen| (seen.method == Method::POST).then(|| answer(202, &[("location", &location)], "")));
    registry.hook(|seen| {
        (seen.authorization() != Some("Basic dXNlcjpwYXNz"))
            .then(|| answer(401, &[("www-authenticate", "Basic")], ""))
    });
    let target = registry.reference("app:v1");
    let secret = Credentials::basic("user", "pass");
    let options = PushOptions::default();
    client()
        .push(
            &Arc::new(source),
            &root_of(&manifest),
            &target,
            Some(&secret),
            &options,
            &(),
        )
        .await
        .map(|_| ())
}

#[tokio::test]
async fn credentials_do_not_follow_an_upload_location_to_another_host() {
    let stranger = Registry::start_on("127.0.0.2").await;
    stranger.hook(|_| Some(answer(201, &[], "")));
    push_to_location(|stranger| stranger.url("/upload"), &stranger)
        .await
        .unwrap();
    let seen: Vec<Seen> = stranger.seen();
    assert_eq!(seen.len(), 2, "config and layer");
    assert!(seen.iter().all(|seen| seen.authorization().is_none()));
}

#[tokio::test]
async fn a_stranger_that_asks_for_credentials_at_an_upload_location_gets_none() {
    let stranger = Registry::start_on("127.0.0.2").await;
    stranger.hook(|_| Some(answer(401, &[("www-authenticate", "Basic")], "")));
    let error = push_to_location(|stranger| stranger.url("/upload"), &stranger)
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::Unauthorized { .. }), "{error}");
    assert!(stranger.seen().iter().all(|seen| seen.authorization().is_none()));
}

#[tokio::test]
async fn hostile_upload_locations_are_refused_without_a_request() {
    let stranger = Registry::start_on("127.0.0.2").await;
    for location in [
        "http://169.254.169.254/latest",
        "http://[::ffff:169.254.169.254]/",
        "http://user:pass@127.0.0.1/upload",
        "http://example.com/upload",
        "ftp://127.0.0.1/upload",
    ] {
        let error = push_to_location(|_| location.to_owned(), &stranger)
            .await
            .unwrap_err();
        assert!(
            matches!(error, ImageError::UnsafeServer { .. }),
            "{location}: {error}"
        );
    }
}

#[tokio::test]
async fn a_redirected_upload_is_refused() {
    let stranger = Registry::start_on("127.0.0.2").await;
    stranger.hook(|seen| {
        let other = (seen.method == Method::PUT).then_some("http://127.0.0.2:1/elsewhere");
        other.map(|location| answer(307, &[("location", location)], ""))
    });
    let error = push_to_location(|stranger| stranger.url("/upload"), &stranger)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("redirects an upload"), "{error}");
}
