//! Pulls on bad days: connections that break, registries that lie, refuse or say nothing.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use hypeman_images::ImageError;
use hypeman_images::manifest::media_type;

use super::support::{
    Recorder, Registry, Seen, amd64, answer, broken_body, client, client_with, noise, store,
};

#[tokio::test]
async fn a_manifest_that_is_not_what_its_digest_says_is_refused() {
    let registry = Registry::start().await;
    let manifest = registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    let other = registry.add_image(&["v2"], "amd64", &[noise(2, 10)]);
    registry.content(|content| {
        let swapped = content.manifests[&other.digest.to_string()].clone();
        content.manifests.insert(manifest.digest.to_string(), swapped);
    });
    let reference = registry.reference("app").with_digest(manifest.digest);
    let error = client().resolve(&reference, &amd64(), None).await.unwrap_err();
    assert!(matches!(error, ImageError::DigestMismatch { .. }), "{error}");
}

#[tokio::test]
async fn a_manifest_of_endless_size_is_cut_off() {
    let registry = Registry::start().await;
    registry.hook(|seen| {
        let endless = || futures::stream::repeat(Ok::<_, std::fmt::Error>(Bytes::from_static(&[b' '; 8192])));
        seen.is_get_of("/manifests/")
            .then(|| answer(200, &[], Body::from_stream(endless())))
    });
    let error = client()
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::TooLarge { .. }), "{error}");
}

/// Pulls a one-layer image whose layer the hook serves, and says how it ended and what was left unfinished.
async fn pull_with(
    registry: &Registry,
    layer: &Bytes,
    hook: impl Fn(&Seen, &str) -> Option<Response> + Send + Sync + 'static,
) -> (Result<(), ImageError>, usize) {
    let manifest = registry.add_image(&["v1"], "amd64", std::slice::from_ref(layer));
    let digest = manifest.layers[0].digest.to_string();
    registry.hook(move |seen| seen.is_get_of(&digest).then(|| hook(seen, &digest)).flatten());
    let (dir, store) = store().await;
    let client = client();
    let reference = registry.reference("app:v1");
    let resolved = client.resolve(&reference, &amd64(), None).await.unwrap();
    let outcome = client.pull(&reference, &resolved, None, &store, &()).await;
    if outcome.is_ok() {
        assert_eq!(
            std::fs::read(store.path(&manifest.layers[0].digest)).unwrap(),
            *layer
        );
    } else {
        assert!(!store.exists(&manifest.layers[0].digest).await.unwrap());
    }
    (
        outcome.map(|_| ()),
        std::fs::read_dir(dir.path().join("partial")).unwrap().count(),
    )
}

#[tokio::test]
async fn a_download_that_breaks_is_continued_where_it_broke() {
    let registry = Registry::start().await;
    let layer = noise(7, 3_000_000);
    let (breaks, part) = (AtomicUsize::new(0), layer.clone());
    let (outcome, left) = pull_with(&registry, &layer, move |seen, _| {
        // The first three connections bring a part each, then break.
        let number = breaks.fetch_add(1, Ordering::SeqCst);
        let start: usize = seen
            .header("range")
            .map_or(0, |range| range[6..range.len() - 1].parse().unwrap());
        let range = format!("bytes {start}-{}/{}", part.len() - 1, part.len());
        let rest = (part.len() - start).to_string();
        let body = broken_body(part.slice(start..start + 700_000));
        let status = if start == 0 { 200 } else { 206 };
        (number < 3).then(|| {
            answer(
                status,
                &[("content-range", &range), ("content-length", &rest)],
                body,
            )
        })
    })
    .await;
    outcome.unwrap();
    assert_eq!(left, 0);
    let offsets: Vec<String> = registry
        .seen()
        .iter()
        .filter(|seen| seen.is_get_of("/blobs/"))
        .filter_map(|seen| seen.header("range").map(str::to_owned))
        .collect();
    assert_eq!(offsets, ["bytes=700000-", "bytes=1400000-", "bytes=2100000-"]);
}

#[tokio::test]
async fn a_server_that_cannot_continue_is_read_from_the_start_again() {
    let registry = Registry::start().await;
    let layer = noise(8, 2_000_000);
    let (calls, part) = (AtomicUsize::new(0), layer.clone());
    let (outcome, left) = pull_with(&registry, &layer, move |_, _| {
        let length = part.len().to_string();
        Some(match calls.fetch_add(1, Ordering::SeqCst) {
            0 => answer(
                200,
                &[("content-length", &length)],
                broken_body(part.slice(..900_000)),
            ),
            _ => answer(200, &[], part.clone()),
        })
    })
    .await;
    outcome.unwrap();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_continuation_at_the_wrong_place_is_not_believed() {
    let registry = Registry::start().await;
    let layer = noise(9, 2_000_000);
    let (calls, part) = (AtomicUsize::new(0), layer.clone());
    let (outcome, _) = pull_with(&registry, &layer, move |_, _| {
        let length = part.len().to_string();
        match calls.fetch_add(1, Ordering::SeqCst) {
            0 => Some(answer(
                200,
                &[("content-length", &length)],
                broken_body(part.slice(..900_000)),
            )),
            1 => Some(answer(
                206,
                &[("content-range", "bytes 5-1999999/2000000")],
                part.slice(5..),
            )),
            _ => None,
        }
    })
    .await;
    outcome.unwrap();
}

#[tokio::test]
async fn an_interrupted_pull_is_continued_by_the_next_one() {
    let registry = Registry::start().await;
    let layer = noise(10, 3_000_000);
    let manifest = registry.add_image(&["v1"], "amd64", std::slice::from_ref(&layer));
    let digest = manifest.layers[0].digest;
    let (dir, store) = store().await;
    let client = client();
    let reference = registry.reference("app:v1");
    let resolved = client.resolve(&reference, &amd64(), None).await.unwrap();
    let recorder = Recorder {
        cancel_at: Some(1_500_000),
        ..Recorder::default()
    };
    let error = client
        .pull(&reference, &resolved, None, &store, &recorder)
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::Cancelled), "{error}");
    drop(store);

    // A new store is a new process: what is on disk is hashed again and trusted only with the rest.
    let store = hypeman_images::BlobStore::open(dir.path(), Default::default())
        .await
        .unwrap();
    client
        .pull(&reference, &resolved, None, &store, &())
        .await
        .unwrap();
    assert_eq!(std::fs::read(store.path(&digest)).unwrap(), layer);
    let continued = |seen: &Seen| seen.is_get_of("/blobs/") && seen.header("range").is_some();
    assert_eq!(registry.count(continued), 1);
}

#[tokio::test]
async fn a_leftover_that_is_not_the_blobs_beginning_is_fetched_anew() {
    let registry = Registry::start().await;
    let manifest = registry.add_image(&["v1"], "amd64", &[noise(11, 100_000)]);
    let digest = manifest.layers[0].digest;
    let (dir, store) = store().await;
    std::fs::write(dir.path().join("partial").join(digest.hex()), b"something else").unwrap();
    let client = client();
    let reference = registry.reference("app:v1");
    let resolved = client.resolve(&reference, &amd64(), None).await.unwrap();
    client
        .pull(&reference, &resolved, None, &store, &())
        .await
        .unwrap();
    assert!(store.exists(&digest).await.unwrap());
}

#[tokio::test]
async fn a_blob_with_the_wrong_bytes_is_refused_and_leaves_nothing() {
    let registry = Registry::start().await;
    let layer = noise(12, 100_000);
    let wrong = noise(112, 100_000);
    let (outcome, left) = pull_with(&registry, &layer, move |_, _| {
        Some(answer(200, &[], wrong.clone()))
    })
    .await;
    assert!(
        matches!(outcome, Err(ImageError::DigestMismatch { .. })),
        "{outcome:?}"
    );
    assert_eq!(left, 0);
}

#[tokio::test]
async fn a_blob_of_another_size_than_the_manifest_says_is_refused_at_once() {
    for (seed, size) in [(14, 99_999), (15, 100_001)] {
        let registry = Registry::start().await;
        let layer = noise(seed, 100_000);
        let wrong = noise(seed, size);
        let (outcome, left) = pull_with(&registry, &layer, move |_, _| {
            Some(answer(200, &[], wrong.clone()))
        })
        .await;
        assert!(
            matches!(outcome, Err(ImageError::SizeMismatch { .. })),
            "{outcome:?}"
        );
        assert_eq!(left, 0);
        assert_eq!(
            registry.count(|seen| seen.is_get_of("/blobs/") && seen.header("range").is_none()),
            3
        );
    }
}

#[tokio::test]
async fn a_chunked_blob_is_fine_and_an_endless_one_is_cut_off() {
    let registry = Registry::start().await;
    let layer = noise(16, 500_000);
    let chunks: Vec<Result<Bytes, std::io::Error>> = (0..5)
        .map(|index| Ok(layer.slice(index * 100_000..(index + 1) * 100_000)))
        .collect();
    let chunks = Arc::new(Mutex::new(Some(chunks)));
    let (outcome, _) = pull_with(&registry, &layer, move |_, _| {
        let chunks = chunks.lock().unwrap().take()?;
        Some(answer(200, &[], Body::from_stream(futures::stream::iter(chunks))))
    })
    .await;
    outcome.unwrap();

    let registry = Registry::start().await;
    let (outcome, left) = pull_with(&registry, &layer, move |_, _| {
        let endless = futures::stream::repeat(Ok::<_, std::fmt::Error>(Bytes::from_static(&[7; 8192])));
        Some(answer(200, &[], Body::from_stream(endless)))
    })
    .await;
    assert!(
        matches!(outcome, Err(ImageError::SizeMismatch { .. })),
        "{outcome:?}"
    );
    assert_eq!(left, 0);
}

#[tokio::test]
async fn passing_server_errors_are_repeated_and_lasting_ones_reported() {
    let registry = Registry::start().await;
    let layer = noise(17, 1000);
    let calls = AtomicUsize::new(0);
    let (outcome, _) = pull_with(&registry, &layer, move |_, _| {
        (calls.fetch_add(1, Ordering::SeqCst) < 2).then(|| answer(503, &[], ""))
    })
    .await;
    outcome.unwrap();

    let registry = Registry::start().await;
    let (outcome, _) = pull_with(&registry, &layer, |_, _| Some(answer(500, &[], ""))).await;
    assert!(matches!(outcome, Err(ImageError::Network { .. })), "{outcome:?}");
    assert_eq!(registry.count(|seen| seen.is_get_of("/blobs/")), 2 + 4);
}

#[tokio::test]
async fn retry_after_is_honoured_within_bounds() {
    let registry = Registry::start().await;
    let layer = noise(18, 1000);
    let calls = AtomicUsize::new(0);
    let began = std::time::Instant::now();
    let (outcome, _) = pull_with(&registry, &layer, move |_, _| {
        (calls.fetch_add(1, Ordering::SeqCst) < 1).then(|| answer(429, &[("retry-after", "1")], ""))
    })
    .await;
    outcome.unwrap();
    assert!(began.elapsed() >= Duration::from_secs(1));

    let registry = Registry::start().await;
    let (outcome, _) = pull_with(&registry, &layer, |_, _| {
        Some(answer(429, &[("retry-after", "3600")], ""))
    })
    .await;
    match outcome {
        Err(ImageError::RateLimited { retry_after, .. }) => {
            assert_eq!(retry_after, Some(Duration::from_secs(3600)))
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(registry.count(|seen| seen.is_get_of("/blobs/")), 2 + 1);
}

#[tokio::test]
async fn silence_in_the_middle_of_a_blob_is_an_error_after_the_deadline() {
    let registry = Registry::start().await;
    let manifest = registry.add_image(&["v1"], "amd64", &[noise(19, 100_000)]);
    let digest = manifest.layers[0].digest.to_string();
    registry.hook(move |seen| {
        let silent = || futures::stream::pending::<Result<Bytes, std::io::Error>>();
        seen.is_get_of(&digest)
            .then(|| answer(200, &[("content-length", "100000")], Body::from_stream(silent())))
    });
    let (_dir, store) = store().await;
    let reference = registry.reference("app:v1");
    let resolved = client().resolve(&reference, &amd64(), None).await.unwrap();
    let error = client_with(|options| options.idle_timeout = Duration::from_millis(50))
        .pull(&reference, &resolved, None, &store, &())
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::Network { .. }), "{error}");
}

#[tokio::test]
async fn a_registry_that_does_not_answer_is_a_network_error() {
    let registry = Registry::start().await;
    let reference = registry.reference("app:v1");
    drop(registry);
    tokio::task::yield_now().await;
    let error = client().resolve(&reference, &amd64(), None).await.unwrap_err();
    assert_eq!(error.code(), "registry_unreachable", "{error}");
}

#[tokio::test]
async fn a_config_that_does_not_fit_the_layers_stops_the_pull_before_them() {
    let registry = Registry::start().await;
    let manifest = registry.add_image(&["v1"], "amd64", &[noise(20, 1000)]);
    let two = [manifest.layers[0].clone(), manifest.layers[0].clone()];
    let lying =
        hypeman_images::Manifest::assemble(media_type::OCI_MANIFEST, manifest.config.clone(), two.to_vec())
            .unwrap();
    registry.add_manifest(&["v2"], media_type::OCI_MANIFEST, lying.raw);
    let (_dir, store) = store().await;
    let client = client();
    let reference = registry.reference("app:v2");
    let resolved = client.resolve(&reference, &amd64(), None).await.unwrap();
    let error = client
        .pull(&reference, &resolved, None, &store, &())
        .await
        .unwrap_err();
    assert_eq!(error.code(), "invalid_manifest");
    assert_eq!(
        registry.count(|seen| seen.is_get_of(&manifest.layers[0].digest.to_string())),
        0
    );
}
