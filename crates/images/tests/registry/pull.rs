//! Resolving and pulling, on good days.

use bytes::Bytes;
use hypeman_images::manifest::media_type;
use hypeman_images::{Descriptor, Digest, ImageError, Platform, TransferEvent, layer_sources};

use super::support::{Recorder, Registry, amd64, client, noise, store};

#[tokio::test]
async fn an_image_is_pulled_with_all_its_layers_and_the_progress_adds_up() {
    let registry = Registry::start().await;
    let layers: Vec<Bytes> = (1..=6).map(|seed| noise(seed, 300_000 * seed as usize)).collect();
    registry.add_image(&["v1"], "amd64", &layers);
    let (dir, store) = store().await;
    let recorder = Recorder::default();
    let reference = registry.reference("team/app/web:v1");

    let client = client();
    let resolved = client.resolve(&reference, &amd64(), None).await.unwrap();
    assert_eq!(resolved.index_digest, None);
    let image = client
        .pull(&reference, &resolved, None, &store, &recorder)
        .await
        .unwrap();

    assert_eq!(image.config.cmd, ["/bin/true"]);
    assert_eq!(image.layers.len(), 6);
    for (layer, expected) in image.layers.iter().zip(&layers) {
        assert_eq!(layer.diff_id, Digest::of(expected));
        assert_eq!(
            std::fs::read(store.path(&layer.descriptor.digest)).unwrap(),
            *expected
        );
    }
    assert_eq!(
        store.read_document(&resolved.digest).await.unwrap(),
        resolved.manifest.raw
    );
    let events = recorder.events.lock().unwrap();
    let total: u64 = layers.iter().map(|layer| layer.len() as u64).sum::<u64>() + image.manifest.config.size;
    assert!(
        matches!(&events[0], TransferEvent::Planned { blobs, total: planned } if blobs.len() == 7 && *planned == total)
    );
    let last = events.iter().rev().find_map(|event| match event {
        TransferEvent::Progress { total_done, .. } => Some(*total_done),
        _ => None,
    });
    assert_eq!(last, Some(total));
    let finished = |event: &&TransferEvent| matches!(event, TransferEvent::Finished { reused: false, .. });
    assert_eq!(events.iter().filter(finished).count(), 7);
    for unfinished in ["partial", "tmp", "uploads"] {
        assert_eq!(std::fs::read_dir(dir.path().join(unfinished)).unwrap().count(), 0);
    }
    let sources = layer_sources(&store, &image.manifest, &image.config);
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut (sources[2].open)().unwrap(), &mut bytes).unwrap();
    assert_eq!(bytes, layers[2]);
}

#[tokio::test]
async fn what_is_in_the_store_is_not_fetched_again() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "amd64", &[noise(1, 1000), noise(2, 1000)]);
    let (_dir, store) = store().await;
    let reference = registry.reference("app:v1");
    let client = client();
    let resolved = client.resolve(&reference, &amd64(), None).await.unwrap();
    client
        .pull(&reference, &resolved, None, &store, &())
        .await
        .unwrap();
    let before = registry.seen().len();
    client
        .pull(&reference, &resolved, None, &store, &())
        .await
        .unwrap();
    assert_eq!(registry.seen().len(), before);
}

#[tokio::test]
async fn two_pulls_of_one_image_at_once_fetch_each_blob_once() {
    let registry = Registry::start().await;
    let manifest = registry.add_image(&["v1"], "amd64", &[noise(1, 2_000_000)]);
    let (_dir, store) = store().await;
    let reference = registry.reference("app:v1");
    let client = client();
    let resolved = client.resolve(&reference, &amd64(), None).await.unwrap();
    let pull = || client.pull(&reference, &resolved, None, &store, &());
    let (first, second) = tokio::join!(pull(), pull());
    first.unwrap();
    second.unwrap();
    let layer = manifest.layers[0].digest.to_string();
    assert_eq!(registry.count(|seen| seen.is_get_of(&layer)), 1);
}

#[tokio::test]
async fn the_platform_is_chosen_from_an_index_and_a_missing_one_is_told_with_what_exists() {
    let registry = Registry::start().await;
    let amd = registry.add_image(&[], "amd64", &[noise(1, 10)]);
    let arm = registry.add_image(&[], "arm64", &[noise(2, 10)]);
    let entry = |manifest: &hypeman_images::Manifest, platform: &str| Descriptor {
        platform: Some(Platform::parse(platform).unwrap()),
        ..Descriptor::of(media_type::OCI_MANIFEST, &manifest.raw)
    };
    let index = |entries: Vec<Descriptor>| {
        let kind = media_type::OCI_INDEX;
        serde_json::to_vec(&serde_json::json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries}))
            .unwrap()
    };
    let both = index(vec![entry(&arm, "linux/arm64/v8"), entry(&amd, "linux/amd64")]);
    let digest = registry.add_manifest(&["both"], media_type::OCI_INDEX, both);
    registry.add_manifest(
        &["arm"],
        media_type::OCI_INDEX,
        index(vec![entry(&arm, "linux/arm64/v8")]),
    );
    let client = client();

    let resolved = client
        .resolve(&registry.reference("app:both"), &amd64(), None)
        .await
        .unwrap();
    assert_eq!(
        (resolved.digest, resolved.index_digest),
        (amd.digest, Some(digest))
    );
    let resolved = client
        .resolve(&registry.reference("app:both"), &Platform::linux("arm64"), None)
        .await
        .unwrap();
    assert_eq!(resolved.digest, arm.digest);
    let error = client
        .resolve(&registry.reference("app:arm"), &amd64(), None)
        .await
        .unwrap_err();
    assert_eq!(error.code(), "platform_not_available");
    assert!(error.to_string().contains("linux/arm64/v8"), "{error}");
}

#[tokio::test]
async fn a_plain_image_of_another_platform_is_refused_before_it_is_pulled() {
    let registry = Registry::start().await;
    registry.add_image(&["v1"], "riscv64", &[noise(1, 10)]);
    let error = client()
        .resolve(&registry.reference("app:v1"), &amd64(), None)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("linux/riscv64"), "{error}");
}

#[tokio::test]
async fn a_missing_image_is_not_found() {
    let registry = Registry::start().await;
    let error = client()
        .resolve(&registry.reference("app:nope"), &amd64(), None)
        .await
        .unwrap_err();
    assert!(matches!(error, ImageError::NotFound(_)), "{error}");
}

#[tokio::test]
async fn head_tells_the_digest_without_fetching_the_manifest() {
    let registry = Registry::start().await;
    let manifest = registry.add_image(&["v1"], "amd64", &[noise(1, 10)]);
    assert_eq!(
        client().head(&registry.reference("app:v1"), None).await.unwrap(),
        manifest.digest
    );
    assert_eq!(registry.count(|seen| seen.is_get_of("/manifests/")), 0);
}
