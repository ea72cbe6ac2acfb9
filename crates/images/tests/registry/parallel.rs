//! Blobs of one image come side by side.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use tokio::sync::Barrier;

use super::support::{Registry, amd64, answer, client_with, noise, store};

#[tokio::test]
async fn layers_are_fetched_at_the_same_time() {
    let registry = Registry::start().await;
    let layers: Vec<Bytes> = [1, 3, 5, 7]
        .into_iter()
        .map(|seed| noise(seed, 100_000))
        .collect();
    let manifest = registry.add_image(&["v1"], "amd64", &layers);
    // No layer begins to arrive before another one was asked for, too.
    let pair = Arc::new(Barrier::new(2));
    for (descriptor, layer) in manifest.layers.iter().zip(&layers) {
        let (digest, layer, pair) = (descriptor.digest.to_string(), layer.clone(), Arc::clone(&pair));
        registry.hook(move |seen| {
            let (layer, pair) = (layer.clone(), Arc::clone(&pair));
            let body = futures::stream::once(async move {
                pair.wait().await;
                Ok::<Bytes, std::io::Error>(layer)
            });
            seen.is_get_of(&digest)
                .then(|| answer(200, &[], Body::from_stream(body)))
        });
    }
    let (_dir, store) = store().await;
    let reference = registry.reference("app:v1");
    let client = client_with(|options| options.idle_timeout = Duration::from_secs(120));
    let resolved = client.resolve(&reference, &amd64(), None).await.unwrap();
    client
        .pull(&reference, &resolved, None, &store, &())
        .await
        .unwrap();
    for descriptor in &manifest.layers {
        assert!(store.exists(&descriptor.digest).await.unwrap());
        // One after the other, the first would have stalled, and been asked for again.
        let digest = descriptor.digest.to_string();
        assert_eq!(registry.count(|seen| seen.is_get_of(&digest)), 1);
    }
}
