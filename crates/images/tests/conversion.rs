//! Layers become root disks that equal what `umoci unpack` makes of them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod conversion_support;

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::Command;

use conversion_support::corpus::corpus;
use conversion_support::*;
use hypeman_images::layers::{
    Compression, ConvertError, ConvertObserver, LayerProblem, LayerSource, convert,
};

/// Writes an OCI layout and lets `umoci` unpack it; `None` where that cannot be done.
fn unpack_with_umoci(directory: &Path, tars: &[Vec<u8>]) -> Option<BTreeMap<String, Seen>> {
    if !is_root() || Command::new("umoci").arg("--version").output().is_err() {
        println!("SKIPPED: the comparison needs root and umoci");
        return None;
    }
    let layout = directory.join("layout");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let put = |media_type: &str, bytes: &[u8]| {
        let digest = digest(bytes);
        std::fs::write(layout.join("blobs").join(digest.replace(':', "/")), bytes).unwrap();
        serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    };
    let kind = |kind: &str| format!("application/vnd.oci.image.{kind}");
    let layers: Vec<_> = tars
        .iter()
        .map(|tar| put(&kind("layer.v1.tar+gzip"), &gzip(tar)))
        .collect();
    let diff_ids: Vec<_> = tars.iter().map(|tar| digest(tar)).collect();
    let config = serde_json::json!({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let config = put(&kind("config.v1+json"), config.to_string().as_bytes());
    let manifest = serde_json::json!({"schemaVersion": 2, "mediaType": kind("manifest.v1+json"), "config": config, "layers": layers});
    let mut manifest = put(&kind("manifest.v1+json"), manifest.to_string().as_bytes());
    manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "t"});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let bundle = directory.join("bundle");
    let image = format!("{}:t", layout.display());
    let output = Command::new("umoci")
        .args(["unpack", "--image", &image])
        .arg(&bundle)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "umoci: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(look(&bundle.join("rootfs")))
}

fn sources(tars: &[Vec<u8>]) -> Vec<LayerSource> {
    tars.iter()
        .enumerate()
        .map(|(index, tar)| {
            let stored = match index % 3 {
                0 => gzip(tar),
                1 => zstd::encode_all(&tar[..], 3).unwrap(),
                _ => tar.clone(),
            };
            LayerSource {
                digest: Some(digest(&stored)),
                diff_id: Some(digest(tar)),
                ..layer(stored)
            }
        })
        .collect()
}

#[test]
fn a_rich_image_equals_what_umoci_unpacks() {
    let directory = tempfile::tempdir().unwrap();
    let tars = corpus(false);
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let started = (now.as_secs() as i64, 0);
    let expected = unpack_with_umoci(directory.path(), &corpus(true));
    for compression in [Compression::None, Compression::Lz4] {
        let image = directory.path().join(format!("{compression:?}"));
        let converted = convert_with(&sources(&tars), &image, &options(compression)).unwrap();
        assert_eq!(converted.size_bytes, std::fs::metadata(&image).unwrap().len());
        assert_eq!(
            converted.uncompressed_bytes,
            tars.iter().map(|tar| tar.len() as u64).sum::<u64>()
        );
        fsck(&image);
        let Some(mounted) = Mounted::new(&image) else {
            continue;
        };
        let actual = look(&mounted.path);
        assert_eq!(
            std::fs::read(mounted.path.join("usr/lib/through-symlink")).unwrap(),
            b"again, by its true name"
        );
        assert_eq!(
            std::fs::read(mounted.path.join("middle-link")).unwrap(),
            b"of the middle layer"
        );
        assert_eq!(std::fs::read(mounted.path.join("other-name")).unwrap(), b"7");
        assert!(!mounted.path.join("opaque/sub").exists() && !mounted.path.join("gone-dir/x").exists());
        let Some(mut expected) = expected.clone() else {
            continue;
        };
        // umoci leaves the time of the unpacking on directories that a later layer changed, or that have no entry.
        for (name, expected) in &mut expected {
            if expected.mode & 0o170_000 == 0o040_000 && expected.mtime >= started {
                expected.mtime = actual[name].mtime;
            }
        }
        assert_same(&actual, &expected);
    }
}

#[test]
fn the_image_depends_on_the_layers_alone() {
    let directory = tempfile::tempdir().unwrap();
    let tars = corpus(false);
    let build = |name: &str, threads: usize| {
        let image = directory.path().join(name);
        let options = hypeman_images::layers::ConvertOptions {
            threads,
            ..options(Compression::Lz4)
        };
        convert_with(&sources(&tars), &image, &options).unwrap();
        std::fs::read(image).unwrap()
    };
    let one = build("one", 1);
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o777));
    let other = std::panic::catch_unwind(|| build("other", 8));
    rustix::process::umask(before);
    assert!(one == other.unwrap());
}

#[test]
fn missing_parents_are_made_and_told_apart_from_described_ones() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let mut tar = Tar::default();
    tar.file("new/parents/file", b"x");
    convert_with(&[layer(tar.end())], &image, &options(Compression::None)).unwrap();
    fsck(&image);
    if let Some(mounted) = Mounted::new(&image) {
        let seen = look(&mounted.path);
        assert_eq!(
            (
                seen["new/parents"].mode,
                seen["new/parents"].owner,
                seen["new/parents"].mtime
            ),
            (0o040_755, (0, 0), (0, 0))
        );
    }
}

#[test]
fn global_headers_hold_until_an_entry_says_otherwise() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let mut tar = Tar::default();
    tar.extended(
        b'g',
        &[("comment", b"made by a test"), ("uid", b"7"), ("mtime", b"5.25")],
    )
    .file("one", b"1");
    tar.pax(&[("uid", b"8")]).file("two", b"2");
    convert_with(&[layer(tar.end())], &image, &options(Compression::None)).unwrap();
    if let Some(mounted) = Mounted::new(&image) {
        let seen = look(&mounted.path);
        assert_eq!((seen["one"].owner.0, seen["one"].mtime), (7, (5, 250_000_000)));
        assert_eq!((seen["two"].owner.0, seen["two"].mtime), (8, (5, 250_000_000)));
    }
}

#[test]
fn a_hundred_thousand_entries() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let mut tar = Tar::default();
    for index in 0..100_000 {
        tar.file(
            &format!("d{}/e{}/file-{index}", index % 50, index % 500),
            index.to_string().as_bytes(),
        );
    }
    let converted = convert_with(&[layer(gzip(&tar.end()))], &image, &options(Compression::None)).unwrap();
    assert_eq!(converted.inodes, 100_000 + 50 + 500 + 1);
    fsck(&image);
    if let Some(mounted) = Mounted::new(&image) {
        for index in (0..100_000).step_by(997) {
            let path = mounted
                .path
                .join(format!("d{}/e{}/file-{index}", index % 50, index % 500));
            assert_eq!(std::fs::read_to_string(path).unwrap(), index.to_string());
        }
    }
}

#[test]
fn a_sparse_file_over_four_gibibytes() {
    const SIZE: u64 = (6 << 30) + 7;
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let mut tar = Tar::default();
    let size = SIZE.to_string();
    let map = format!("0,5,{},4", SIZE - 4);
    tar.pax(&[
        ("GNU.sparse.major", b"0"),
        ("GNU.sparse.minor", b"1"),
        ("GNU.sparse.size", size.as_bytes()),
        ("GNU.sparse.map", map.as_bytes()),
    ]);
    tar.file("big", b"startend!");
    let converted = convert_with(&[layer(tar.end())], &image, &options(Compression::Lz4)).unwrap();
    assert!(converted.size_bytes < 4 << 20, "{converted:?}");
    fsck(&image);
    if let Some(mounted) = Mounted::new(&image) {
        let mut file = std::fs::File::open(mounted.path.join("big")).unwrap();
        assert_eq!(file.metadata().unwrap().len(), SIZE);
        let mut end = [0; 6];
        file.seek(SeekFrom::Start(SIZE - 6)).unwrap();
        file.read_exact(&mut end).unwrap();
        assert_eq!(&end, b"\0\0end!");
    }
}

#[test]
fn a_conversion_can_be_cancelled_and_reports_progress() {
    struct StopAtHalf(std::sync::atomic::AtomicU64);
    impl ConvertObserver for StopAtHalf {
        fn progress(&self, bytes_read: u64, total: u64) {
            assert!(bytes_read <= total);
            self.0.fetch_max(bytes_read, std::sync::atomic::Ordering::Relaxed);
        }
        fn cancelled(&self) -> bool {
            self.0.load(std::sync::atomic::Ordering::Relaxed) > 1 << 20
        }
    }
    let mut tar = Tar::default();
    tar.file("large", &vec![1; 8 << 20]);
    let observer = StopAtHalf(0.into());
    let result = convert(
        &[layer(tar.end())],
        &tempfile::tempfile().unwrap(),
        &options(Compression::None),
        &observer,
    );
    assert!(matches!(result, Err(ConvertError::Cancelled)));
}

#[test]
fn an_output_that_cannot_be_written_is_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("read-only");
    std::fs::write(&path, b"").unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let mut tar = Tar::default();
    tar.file("x", &vec![1; 4 << 20]);
    let result = convert(&[layer(tar.end())], &file, &options(Compression::None), &Silent);
    assert!(matches!(result, Err(ConvertError::Output(_))), "{result:?}");
}

#[test]
fn a_source_that_fails_is_not_the_images_fault() {
    let broken = LayerSource {
        open: Box::new(|| {
            struct Broken;
            impl Read for Broken {
                fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                    Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
                }
            }
            Ok(Box::new(Broken))
        }),
        ..layer(vec![0; 100])
    };
    let error = convert(
        &[broken],
        &tempfile::tempfile().unwrap(),
        &options(Compression::None),
        &Silent,
    )
    .unwrap_err();
    assert!(
        matches!(&error, ConvertError::Source { layer: 0, source } if source.kind() == std::io::ErrorKind::ConnectionReset)
    );
    assert!(!error.is_permanent());
    let mut tar = Tar::default();
    tar.file("x", b"");
    let wrong = LayerSource {
        digest: Some(digest(b"other")),
        ..layer(tar.end())
    };
    let error = convert(
        &[wrong],
        &tempfile::tempfile().unwrap(),
        &options(Compression::None),
        &Silent,
    )
    .unwrap_err();
    assert!(
        matches!(
            error,
            ConvertError::Layer {
                problem: LayerProblem::Digest { .. },
                ..
            }
        ) && error.is_permanent()
    );
}
