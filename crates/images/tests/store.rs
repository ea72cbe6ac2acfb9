//! The blob store: commits, upload sessions, restarts and full disks.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on should panic"
)]

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures::stream;
use hypeman_images::blobs::{ContentRange, UploadId};
use hypeman_images::{BlobStore, BlobStoreOptions, Digest, ImageError};

type Chunk = Result<Bytes, std::io::Error>;

async fn open(dir: &Path) -> BlobStore {
    BlobStore::open(dir, BlobStoreOptions::default()).await.unwrap()
}

fn whole(bytes: &[u8]) -> impl futures::Stream<Item = Chunk> + use<> {
    let pieces: Vec<Chunk> = bytes
        .chunks(1000)
        .map(|chunk| Ok(Bytes::copy_from_slice(chunk)))
        .collect();
    stream::iter(pieces)
}

fn broken(bytes: &[u8]) -> impl futures::Stream<Item = Chunk> + use<> {
    stream::iter([
        Ok(Bytes::copy_from_slice(bytes)),
        Err(std::io::Error::other("cable cut")),
    ])
}

fn sample(size: usize) -> Vec<u8> {
    (0..size).map(|index| (index * 7 % 251) as u8).collect()
}

/// Names of all files of a store, wherever they are.
fn files(dir: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for sub in ["blobs/sha256", "partial", "uploads", "tmp"] {
        for entry in std::fs::read_dir(dir.join(sub)).unwrap() {
            names.push(format!("{sub}/{}", entry.unwrap().file_name().to_string_lossy()));
        }
    }
    names
}

#[tokio::test]
async fn a_blob_is_stored_listed_read_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let bytes = sample(1_500_000);
    let digest = Digest::of(&bytes);
    assert_eq!(
        store
            .put_stream(whole(&bytes), &digest, Some(1_500_000))
            .await
            .unwrap(),
        1_500_000
    );
    assert_eq!(store.size(&digest).await.unwrap(), Some(1_500_000));
    assert_eq!(std::fs::read(store.path(&digest)).unwrap(), bytes);
    assert_eq!(
        store.path(&digest),
        dir.path().join("blobs/sha256").join(digest.hex())
    );
    let listed = store.list().await.unwrap();
    assert_eq!(
        (listed.len(), listed[0].digest, listed[0].size),
        (1, digest, 1_500_000)
    );
    assert!(matches!(
        store.read_document(&Digest::of(b"x")).await,
        Err(ImageError::NotFound(_))
    ));
    assert!(store.delete(&digest).await.unwrap());
    assert!(!store.delete(&digest).await.unwrap());
    assert_eq!(files(dir.path()), [""; 0]);
}

#[tokio::test]
async fn storing_the_same_blob_twice_is_storing_it_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let bytes = Bytes::from_static(b"same");
    assert_eq!(
        store.put_bytes(bytes.clone()).await.unwrap(),
        store.put_bytes(bytes.clone()).await.unwrap()
    );
    store
        .put_stream(whole(&bytes), &Digest::of(&bytes), None)
        .await
        .unwrap();
    assert_eq!(files(dir.path()).len(), 1);
}

#[tokio::test]
async fn a_blob_that_is_found_again_is_young_again() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let digest = store.put_bytes(Bytes::from_static(b"old")).await.unwrap();
    let old = std::time::SystemTime::now() - Duration::from_secs(7200);
    let age = || {
        std::fs::File::options()
            .write(true)
            .open(store.path(&digest))
            .unwrap()
            .set_modified(old)
            .unwrap()
    };
    age();
    assert_eq!(store.list().await.unwrap()[0].modified, old);
    assert_eq!(store.touch(&digest).await.unwrap(), Some(3));
    assert!(store.list().await.unwrap()[0].modified > old);
    age();
    store.put_bytes(Bytes::from_static(b"old")).await.unwrap();
    assert!(store.list().await.unwrap()[0].modified > old);
    assert_eq!(store.touch(&Digest::of(b"absent")).await.unwrap(), None);
}

#[tokio::test]
async fn what_does_not_match_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let bytes = sample(2_000_000);
    let digest = Digest::of(&bytes);
    let wrong = Digest::of(b"other");
    assert!(matches!(
        store.put_stream(whole(&bytes), &wrong, None).await,
        Err(ImageError::DigestMismatch { .. })
    ));
    for size in [1_999_999, 2_000_001] {
        let outcome = store.put_stream(whole(&bytes), &digest, Some(size)).await;
        assert!(
            matches!(outcome, Err(ImageError::SizeMismatch { .. })),
            "{outcome:?}"
        );
    }
    assert!(store.put_stream(broken(&bytes), &digest, None).await.is_err());
    assert_eq!(files(dir.path()), [""; 0]);
}

#[tokio::test]
async fn a_damaged_document_is_not_returned() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let digest = store.put_bytes(Bytes::from_static(b"{}")).await.unwrap();
    std::fs::write(store.path(&digest), b"[]").unwrap();
    assert!(matches!(
        store.read_document(&digest).await,
        Err(ImageError::DigestMismatch { .. })
    ));
}

#[tokio::test]
async fn an_upload_arrives_in_chunks_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let bytes = sample(1_200_000);
    let id = store.start_upload().await.unwrap();
    assert_eq!(store.upload_offset(&id).await.unwrap(), 0);
    let first = ContentRange {
        start: 0,
        end: 699_999,
    };
    assert_eq!(
        store
            .append_upload(&id, Some(first), whole(&bytes[..700_000]))
            .await
            .unwrap(),
        700_000
    );
    assert_eq!(store.upload_offset(&id).await.unwrap(), 700_000);
    drop(store);

    let store = open(dir.path()).await;
    assert_eq!(store.upload_offset(&id).await.unwrap(), 700_000);
    assert_eq!(
        store
            .append_upload(&id, None, whole(&bytes[700_000..]))
            .await
            .unwrap(),
        1_200_000
    );
    let digest = Digest::of(&bytes);
    assert_eq!(store.finish_upload(&id, &digest).await.unwrap(), 1_200_000);
    assert_eq!(std::fs::read(store.path(&digest)).unwrap(), bytes);
    assert!(matches!(
        store.upload_offset(&id).await,
        Err(ImageError::NotFound(_))
    ));
    assert!(matches!(
        store.finish_upload(&id, &digest).await,
        Err(ImageError::NotFound(_))
    ));
    assert_eq!(files(dir.path()).len(), 1);
}

#[tokio::test]
async fn a_chunk_must_start_where_the_last_one_ended() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let id = store.start_upload().await.unwrap();
    store.append_upload(&id, None, whole(&sample(100))).await.unwrap();
    for start in [0, 99, 101] {
        let range = ContentRange {
            start,
            end: start + 9,
        };
        let outcome = store.append_upload(&id, Some(range), whole(&sample(10))).await;
        assert!(
            matches!(outcome, Err(ImageError::RangeNotSatisfiable { offset: 100 })),
            "{outcome:?}"
        );
    }
    let range = ContentRange { start: 100, end: 109 };
    let outcome = store.append_upload(&id, Some(range), whole(&sample(11))).await;
    assert!(
        matches!(outcome, Err(ImageError::SizeMismatch { .. })),
        "{outcome:?}"
    );
}

#[tokio::test]
async fn a_broken_request_keeps_what_came_and_is_continued() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let bytes = sample(900_000);
    let id = store.start_upload().await.unwrap();
    assert!(
        store
            .append_upload(&id, None, broken(&bytes[..600_000]))
            .await
            .is_err()
    );
    let offset = store.upload_offset(&id).await.unwrap();
    assert_eq!(offset, 600_000);
    store
        .append_upload(&id, None, whole(&bytes[offset as usize..]))
        .await
        .unwrap();
    store.finish_upload(&id, &Digest::of(&bytes)).await.unwrap();
}

#[tokio::test]
async fn a_dropped_request_leaves_an_upload_that_can_be_continued() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let bytes = sample(2_000_000);
    let id = store.start_upload().await.unwrap();
    let all_taken = tokio::sync::Notify::new();
    let silence = stream::poll_fn(|_| {
        all_taken.notify_one();
        std::task::Poll::Pending
    });
    let endless = futures::StreamExt::chain(whole(&bytes[..1_500_000]), silence);
    tokio::select! {
        ended = store.append_upload(&id, None, endless) => panic!("it cannot end: {ended:?}"),
        () = all_taken.notified() => {}
    }
    // The bytes that were still gathered are lost; the offset says so.
    let offset = store.upload_offset(&id).await.unwrap();
    assert!(offset <= 1_500_000);
    let range = ContentRange {
        start: offset,
        end: 1_999_999,
    };
    store
        .append_upload(&id, Some(range), whole(&bytes[offset as usize..]))
        .await
        .unwrap();
    store.finish_upload(&id, &Digest::of(&bytes)).await.unwrap();
}

#[tokio::test]
async fn only_one_request_writes_an_upload() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let id = store.start_upload().await.unwrap();
    let slow = store.append_upload(&id, None, stream::pending::<Chunk>());
    let mut slow = std::pin::pin!(slow);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), &mut slow)
            .await
            .is_err()
    );
    assert!(matches!(
        store.append_upload(&id, None, whole(b"x")).await,
        Err(ImageError::Busy(_))
    ));
    assert!(matches!(store.cancel_upload(&id).await, Err(ImageError::Busy(_))));
}

#[tokio::test]
async fn a_wrong_digest_ends_an_upload_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let id = store.start_upload().await.unwrap();
    store.append_upload(&id, None, whole(b"bytes")).await.unwrap();
    let outcome = store.finish_upload(&id, &Digest::of(b"other")).await;
    assert!(
        matches!(outcome, Err(ImageError::DigestMismatch { .. })),
        "{outcome:?}"
    );
    assert_eq!(files(dir.path()), [""; 0]);
    let id = store.start_upload().await.unwrap();
    store.cancel_upload(&id).await.unwrap();
    assert!(matches!(
        store.cancel_upload(&id).await,
        Err(ImageError::NotFound(_))
    ));
    assert_eq!(files(dir.path()), [""; 0]);
}

#[tokio::test]
async fn uploads_are_bounded_in_size_and_number() {
    let dir = tempfile::tempdir().unwrap();
    let options = BlobStoreOptions {
        max_blob_bytes: 10_000,
        max_pending_upload_bytes: 15_000,
        max_uploads: 3,
        ..BlobStoreOptions::default()
    };
    let store = BlobStore::open(dir.path(), options).await.unwrap();
    let (first, second) = (
        store.start_upload().await.unwrap(),
        store.start_upload().await.unwrap(),
    );
    let outcome = store.append_upload(&first, None, whole(&sample(10_001))).await;
    assert!(matches!(outcome, Err(ImageError::TooLarge { .. })), "{outcome:?}");
    let outcome = store.append_upload(&second, None, whole(&sample(9_000))).await;
    assert!(matches!(outcome, Err(ImageError::TooLarge { .. })), "{outcome:?}");
    store.cancel_upload(&first).await.unwrap();
    let offset = store.upload_offset(&second).await.unwrap();
    store
        .append_upload(&second, None, whole(&sample(9_000 - offset as usize)))
        .await
        .unwrap();
    store.start_upload().await.unwrap();
    store.start_upload().await.unwrap();
    assert!(matches!(store.start_upload().await, Err(ImageError::Busy(_))));
}

#[tokio::test]
async fn opening_the_store_removes_what_was_abandoned() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path()).await;
    let kept = store.start_upload().await.unwrap();
    drop(store);
    let old = std::time::SystemTime::now() - Duration::from_secs(48 * 3600);
    for name in [
        "tmp/fresh",
        "tmp/old",
        "partial/fresh",
        "partial/old",
        "uploads/old",
    ] {
        let file = std::fs::File::create(dir.path().join(name)).unwrap();
        if name.ends_with("old") {
            file.set_modified(old).unwrap();
        }
    }
    let store = open(dir.path()).await;
    let mut left = files(dir.path());
    left.sort();
    assert_eq!(left, ["partial/fresh".to_owned(), format!("uploads/{kept}")]);
    drop(store);
    let none = BlobStoreOptions {
        partial_max_age: Duration::ZERO,
        ..BlobStoreOptions::default()
    };
    BlobStore::open(dir.path(), none).await.unwrap();
    assert_eq!(files(dir.path()).len(), 1);
}

#[test]
fn upload_ids_and_ranges_are_strict() {
    for text in [
        "",
        "../../etc/passwd",
        "00000000-0000-4000-8000-00000000000",
        "0000000-00000-4000-8000-000000000000",
        "+0000000-0000-4000-8000-000000000000",
        "00000000-0000-4000-8000-00000000000G",
    ] {
        assert!(text.parse::<UploadId>().is_err(), "{text}");
    }
    let id = "01234567-89ab-4def-8123-456789abcdef";
    assert_eq!(id.parse::<UploadId>().unwrap().to_string(), id);
    assert_eq!(
        "0-9".parse::<ContentRange>().unwrap(),
        ContentRange { start: 0, end: 9 }
    );
    assert_eq!(
        "bytes 5-9/10".parse::<ContentRange>().unwrap(),
        ContentRange { start: 5, end: 9 }
    );
    for text in [
        "",
        "-",
        "1",
        "9-1",
        "a-b",
        "0-",
        "-9",
        "0x1-2",
        "0-18446744073709551616",
    ] {
        assert!(text.parse::<ContentRange>().is_err(), "{text}");
    }
}

/// A small file system of its own, unmounted in the end.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// `None` without the privilege to mount.
    fn mount() -> Option<Self> {
        use rustix::mount::{MountFlags, mount};
        let dir = tempfile::tempdir().unwrap();
        let options = c"size=4m";
        match mount(
            "none",
            dir.path(),
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV,
            Some(options),
        ) {
            Ok(()) => Some(Self(dir)),
            Err(error) => {
                println!("SKIPPED: cannot mount a small file system: {error}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_is_told_as_such_leaves_nothing_and_passes() {
    let Some(disk) = SmallDisk::mount() else { return };
    let dir = disk.0.path().join("store");
    let store = open(&dir).await;
    let (large, small) = (sample(8 << 20), sample(1 << 20));

    let outcome = store.put_stream(whole(&large), &Digest::of(&large), None).await;
    assert!(matches!(outcome, Err(ImageError::NoSpace(_))), "{outcome:?}");
    assert_eq!(files(&dir), [""; 0]);

    let id = store.start_upload().await.unwrap();
    let outcome = store.append_upload(&id, None, whole(&large)).await;
    assert!(matches!(outcome, Err(ImageError::NoSpace(_))), "{outcome:?}");
    assert!(matches!(
        store.upload_offset(&id).await,
        Err(ImageError::NotFound(_))
    ));
    assert_eq!(files(&dir), [""; 0]);

    let outcome = store
        .download_writer(&Digest::of(&large), 8 << 20)
        .await
        .map(|_| ());
    assert!(matches!(outcome, Err(ImageError::NoSpace(_))), "{outcome:?}");
    let mut writer = store.download_writer(&Digest::of(&large), 3 << 20).await.unwrap();
    let outcome = async {
        loop {
            writer.write(Bytes::from(small.clone())).await?;
        }
    };
    let outcome: Result<(), ImageError> = outcome.await;
    assert!(matches!(outcome, Err(ImageError::NoSpace(_))), "{outcome:?}");
    drop(writer);
    assert_eq!(files(&dir), [""; 0]);

    store
        .put_stream(whole(&small), &Digest::of(&small), None)
        .await
        .unwrap();
    assert_eq!(files(&dir).len(), 1);
}
