//! Images that come and go at the same time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use hypeman_images::{Digest, Manifest, Platform};
use hypeman_store::Store;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Catalog, ImageStatus};
use crate::layout::Layout;
use crate::{EngineError, ImageOptions, Limits};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const NAME: &str = "localhost:1/app:latest";

/// As much of the disk as there is.
const WHOLE_DISK: Limits = Limits {
    max_vcpus_per_instance: 1,
    max_memory_per_instance: 1 << 30,
    max_overlay_size: 1 << 30,
    max_concurrent_builds: 1,
    max_image_storage: 1.0,
    min_free_disk: 0,
};

async fn catalog(directory: &tempfile::TempDir) -> Arc<Catalog> {
    catalog_with(directory, WHOLE_DISK).await
}

async fn catalog_with(directory: &tempfile::TempDir, limits: Limits) -> Arc<Catalog> {
    let layout = Layout::create(directory.path()).unwrap();
    let options = ImageOptions::default();
    let (tasks, closing) = (TaskTracker::new(), CancellationToken::new());
    let store = Store::open(&layout.database()).unwrap();
    Catalog::open(store, layout, options, limits, tasks, closing)
        .await
        .unwrap()
}

/// Uploads a small image; the answer is its manifest.
async fn upload(catalog: &Catalog, platform: &Platform) -> Bytes {
    let layer = Bytes::from(vec![0; 1024]);
    let config = serde_json::json!({
        "os": platform.os, "architecture": platform.architecture,
        "config": { "Cmd": ["/bin/true"] },
        "rootfs": { "type": "layers", "diff_ids": [Digest::of(&layer).to_string()] },
    });
    let config = Bytes::from(serde_json::to_vec(&config).unwrap());
    let describe = |media_type: &str, bytes: &Bytes| {
        serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.{media_type}"),
            "digest": Digest::of(bytes).to_string(), "size": bytes.len(),
        })
    };
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": describe("config.v1+json", &config),
        "layers": [describe("layer.v1.tar", &layer)],
    });
    for blob in [config, layer] {
        catalog.blobs().put_bytes(blob).await.unwrap();
    }
    Bytes::from(serde_json::to_vec(&manifest).unwrap())
}

async fn push(catalog: &Arc<Catalog>) -> Result<Digest, EngineError> {
    let manifest = upload(catalog, &Platform::host()).await;
    catalog
        .put_manifest("localhost:1", "app", "latest", MANIFEST, manifest)
        .await
}

async fn ready(catalog: &Arc<Catalog>) {
    let image = catalog
        .ensure_ready(NAME, None, Duration::from_secs(60))
        .await
        .unwrap();
    assert_eq!(image.status, ImageStatus::Ready);
    assert!(catalog.layout.root_disk(&image.digest).exists());
}

#[tokio::test]
async fn an_image_beyond_the_budget_fails_with_the_reason_and_leaves_no_root_disk() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits {
        max_image_storage: 0.0,
        ..WHOLE_DISK
    };
    let catalog = catalog_with(&directory, limits).await;
    push(&catalog).await.unwrap();
    let failed = catalog
        .ensure_ready(NAME, None, Duration::from_secs(60))
        .await
        .unwrap_err();
    assert!(
        failed.to_string().contains("limits.max_image_storage"),
        "{failed}"
    );
    let image = catalog.get(NAME).unwrap();
    assert_eq!(image.status, ImageStatus::Failed);
    assert!(!catalog.layout.root_disk(&image.digest).exists());
    assert_eq!(std::fs::read_dir(catalog.layout.image_work()).unwrap().count(), 0);
}

#[tokio::test]
async fn nothing_is_pushed_into_the_reserve_of_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits {
        min_free_disk: u64::MAX,
        ..WHOLE_DISK
    };
    let catalog = catalog_with(&directory, limits).await;
    let refused = catalog
        .blobs()
        .put_bytes(Bytes::from_static(b"layer"))
        .await
        .unwrap_err();
    assert_eq!(refused.code(), "no_space");
    assert!(refused.to_string().contains("limits.min_free_disk"), "{refused}");
    assert!(catalog.blobs().list().await.unwrap().is_empty());
}

#[tokio::test]
async fn an_image_deleted_while_it_is_made_can_be_had_again_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let catalog = catalog(&directory).await;
    for pause in 0..20 {
        push(&catalog).await.unwrap();
        tokio::time::sleep(Duration::from_millis(pause / 2)).await;
        catalog.delete(NAME).await.unwrap();
        assert!(matches!(catalog.get(NAME), Err(EngineError::NotFound { .. })));
        push(&catalog).await.unwrap();
        ready(&catalog).await;
        catalog.delete(NAME).await.unwrap();
    }
    // Jobs that were given up end in their own time.
    catalog.tasks.close();
    catalog.tasks.wait().await;
    assert!(catalog.state().jobs.is_empty());
    assert!(catalog.blobs().list().await.unwrap().is_empty());
    assert_eq!(std::fs::read_dir(catalog.layout.image_work()).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn pushing_and_deleting_one_name_at_once_leaves_it_whole_or_gone() {
    let directory = tempfile::tempdir().unwrap();
    let catalog = catalog(&directory).await;
    for _ in 0..20 {
        let other = Arc::clone(&catalog);
        let deleting = tokio::spawn(async move { other.delete(NAME).await });
        // Blobs may go between their upload and the manifest: then the push is refused whole.
        let pushed = push(&catalog).await;
        let _ = deleting.await.unwrap();
        if pushed.is_ok() && catalog.get(NAME).is_ok() {
            ready(&catalog).await;
        }
        let stored: Vec<(String, String, serde_json::Value)> =
            catalog.store.read(hypeman_store::images::references).unwrap();
        assert_eq!(stored.len(), catalog.list(&BTreeMap::new()).len());
    }
}

#[tokio::test]
async fn blobs_behind_an_index_outlive_their_own_manifests() {
    let directory = tempfile::tempdir().unwrap();
    let catalog = catalog(&directory).await;
    let foreign = Platform::parse_supported(if Platform::host().architecture == "amd64" {
        "linux/arm64"
    } else {
        "linux/amd64"
    })
    .unwrap();
    let manifest = upload(&catalog, &foreign).await;
    let digest = Digest::of(&manifest).to_string();
    let index = serde_json::json!({
        "schemaVersion": 2, "mediaType": INDEX,
        "manifests": [{ "mediaType": MANIFEST, "digest": digest, "size": manifest.len(),
            "platform": { "os": foreign.os, "architecture": foreign.architecture } }],
    });
    catalog
        .put_manifest("localhost:1", "app", &digest, MANIFEST, manifest)
        .await
        .unwrap();
    let index = Bytes::from(serde_json::to_vec(&index).unwrap());
    catalog
        .put_manifest("localhost:1", "app", "latest", INDEX, index)
        .await
        .unwrap();
    assert!(catalog.delete_manifest("app", &digest).await.unwrap());
    let blobs = catalog.blobs().list().await.unwrap();
    let needed = catalog.needed_blobs().await.unwrap();
    assert_eq!(blobs.len(), 4);
    assert!(blobs.iter().all(|blob| needed.contains(&blob.digest.to_string())));
}

#[tokio::test]
async fn a_blob_that_a_client_was_told_of_stays_until_its_manifest_comes() {
    let directory = tempfile::tempdir().unwrap();
    let catalog = catalog(&directory).await;
    let manifest = upload(&catalog, &Platform::host()).await;
    let put = async |tag: &str| {
        catalog
            .put_manifest("localhost:1", "app", tag, MANIFEST, manifest.clone())
            .await
    };
    put("latest").await.unwrap();
    ready(&catalog).await;
    let blobs = Manifest::parse(manifest.clone(), None).unwrap();
    let layer = blobs.layers[0].digest;
    assert_eq!(
        catalog.promise_blob(&layer).await.unwrap(),
        Some(blobs.layers[0].size)
    );
    assert_eq!(
        catalog.promise_blob(&blobs.config.digest).await.unwrap(),
        Some(blobs.config.size)
    );
    assert_eq!(catalog.promise_blob(&Digest::of(b"absent")).await.unwrap(), None);

    // The only image that has them goes, and whatever is old is collected: the client can still finish.
    catalog.delete(NAME).await.unwrap();
    for blob in [layer, blobs.config.digest] {
        let path = catalog.blobs().path(&blob);
        let old = std::time::SystemTime::now() - Duration::from_secs(7200);
        std::fs::File::open(path).unwrap().set_modified(old).unwrap();
    }
    catalog.collect_blobs().await.unwrap();
    put("latest").await.unwrap();
    ready(&catalog).await;

    // From then on they are the image's, and go with it.
    catalog.delete(NAME).await.unwrap();
    assert!(catalog.blobs().list().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_push_in_another_registrys_name_is_refused_and_leaves_no_image() {
    let directory = tempfile::tempdir().unwrap();
    let catalog = catalog(&directory).await;
    let manifest = upload(&catalog, &Platform::host()).await;
    for host in ["docker.io", "ghcr.io"] {
        let refused = catalog
            .put_manifest(host, "library/alpine", "latest", MANIFEST, manifest.clone())
            .await;
        assert!(
            matches!(
                refused,
                Err(EngineError::Invalid {
                    code: "invalid_name",
                    ..
                })
            ),
            "{refused:?}"
        );
    }
    assert!(catalog.list(&BTreeMap::new()).is_empty());
}

#[tokio::test]
async fn an_instance_on_a_foreign_platform_is_refused_before_anything_is_pulled() {
    let directory = tempfile::tempdir().unwrap();
    let catalog = catalog(&directory).await;
    let foreign = if cfg!(target_arch = "aarch64") {
        "linux/amd64"
    } else {
        "linux/arm64"
    };
    for platform in [foreign, "linux/riscv64", "windows/amd64", "nonsense"] {
        // No such registry exists: a pull would say so.
        let refused = catalog
            .ensure_ready("registry.invalid/app:1", Some(platform), Duration::from_secs(60))
            .await;
        let is_told = match &refused {
            Err(EngineError::Invalid { code, .. }) => *code == "invalid_platform",
            Err(EngineError::Image(error)) => error.code() == "invalid_platform",
            _ => false,
        };
        assert!(is_told, "{platform}: {refused:?}");
    }
}
