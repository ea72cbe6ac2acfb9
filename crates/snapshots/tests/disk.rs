//! Disks: copied without their holes being filled, and recognised whatever their holes are.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod support;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use hypeman_snapshots::disk::{check, copy, seal};
use hypeman_snapshots::{DiskDigest, Error};
use support::{flip, names, page};

static NEVER: AtomicBool = AtomicBool::new(false);

/// A disk of 10 MiB and a bit, most of it holes, with a stretch of written zeros.
fn disk(directory: &Path) -> PathBuf {
    let path = directory.join("disk");
    let file = File::create_new(&path).unwrap();
    file.set_len((10 << 20) + 1000).unwrap();
    file.write_all_at(&page(700), 4096).unwrap();
    file.write_all_at(&vec![0; 2 << 20], 3 << 20).unwrap();
    file.write_all_at(&page(701), 7 << 20).unwrap();
    file.write_all_at(b"the end", (10 << 20) + 993).unwrap();
    path
}

#[test]
fn a_copy_is_equal_and_as_sparse() {
    let directory = tempfile::tempdir().unwrap();
    let source = disk(directory.path());
    let target = directory.path().join("copy");
    let copied = copy(&source, &target, &NEVER).unwrap();
    assert_eq!(std::fs::read(&source).unwrap(), std::fs::read(&target).unwrap());
    if !copied.reflinked {
        assert_eq!(copied.bytes, 2 * 4096 + 1000);
        assert!(target.metadata().unwrap().blocks() * 512 <= 64 << 10);
    }
    assert!(
        matches!(copy(&source, &target, &NEVER), Err(Error::Invalid(_))),
        "nothing is overwritten"
    );
}

#[test]
fn a_failed_copy_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let source = disk(directory.path());
    let cancelled = copy(&source, &directory.path().join("copy"), &AtomicBool::new(true));
    // A reflink is done before it could be cancelled.
    assert!(cancelled.is_ok_and(|copied| copied.reflinked) || names(directory.path()) == ["disk"]);
    assert!(
        copy(
            &directory.path().join("nothing"),
            &directory.path().join("other"),
            &NEVER
        )
        .is_err()
    );
    assert!(!directory.path().join("other").exists());
}

#[test]
fn holes_do_not_matter_to_a_digest_and_bytes_do() {
    let directory = tempfile::tempdir().unwrap();
    let source = disk(directory.path());
    let digest = seal(&source, &NEVER).unwrap();
    assert_eq!(DiskDigest::parse(&digest.to_bytes()).unwrap(), digest);
    let target = directory.path().join("dense");
    std::fs::write(&target, std::fs::read(&source).unwrap()).unwrap();
    assert_eq!(seal(&target, &NEVER).unwrap().seal(), digest.seal());
    check(&target, &digest, None, &NEVER).unwrap();

    for (at, range) in [
        (4097, "0x0 to 0x100000"),
        (5 << 20, "0x500000 to 0x600000"),
        ((10 << 20) + 999, "0xa00000 to 0xa003e8"),
    ] {
        flip(&target, at);
        let error = check(&target, &digest, None, &NEVER).unwrap_err();
        assert!(error.is_damage() && error.to_string().contains(range), "{error}");
        flip(&target, at);
    }
    check(&target, &digest, None, &NEVER).unwrap();
    File::options()
        .write(true)
        .open(&target)
        .unwrap()
        .set_len(10 << 20)
        .unwrap();
    assert!(check(&target, &digest, None, &NEVER).unwrap_err().is_damage());
}

#[test]
fn an_unchanged_disk_is_read_once_a_boot() {
    let directory = tempfile::tempdir().unwrap();
    let source = disk(directory.path());
    let digest = seal(&source, &NEVER).unwrap();
    let memo = directory.path().join("memo");
    check(&source, &digest, Some(&memo), &NEVER).unwrap();
    // Cancelled before the first byte: only a memo can answer.
    let cancelled = AtomicBool::new(true);
    check(&source, &digest, Some(&memo), &cancelled).unwrap();
    flip(&source, 4096);
    assert!(matches!(
        check(&source, &digest, Some(&memo), &cancelled),
        Err(Error::Cancelled)
    ));
    assert!(
        check(&source, &digest, Some(&memo), &NEVER)
            .unwrap_err()
            .is_damage()
    );
}
