//! Layers become root disks that equal what `umoci unpack` makes of them.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod conversion_support;

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::process::Command;

use conversion_support::*;
use hypeman_images::layers::{
    Compression, ConvertError, ConvertObserver, LayerProblem, LayerSource, convert,
};

const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const ACL: &[u8] = &[
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 7, 0, 232, 3, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16,
    0, 7, 0, 255, 255, 255, 255, 32, 0, 4, 0, 255, 255, 255, 255,
];

fn bytes(length: usize, seed: u32) -> Vec<u8> {
    (0..length as u32)
        .map(|index| (index.wrapping_mul(2_654_435_761).wrapping_add(seed) >> (index % 24)) as u8)
        .collect()
}

/// GNU's first sparse format: four parts in the header, the rest in one extension block.
fn old_sparse(tar: &mut Tar, name: &str, dense: bool) {
    let parts: Vec<(u64, u64)> = (0..6).map(|index| (index * 100_000, 700)).collect();
    if dense {
        let mut content = vec![0; 600_000];
        for (stored, (offset, _)) in bytes(4200, 5).chunks(700).zip(&parts) {
            content[*offset as usize..][..700].copy_from_slice(stored);
        }
        tar.file(name, &content);
        return;
    }
    let mut header = Header::new(b'S', name.as_bytes());
    header.field(257, b"ustar  \0");
    for (index, (offset, length)) in parts[..4].iter().enumerate() {
        header
            .octal(386 + 24 * index, 12, *offset)
            .octal(398 + 24 * index, 12, *length);
    }
    header.0[482] = 1;
    header.octal(483, 12, 600_000).size(parts.len() as u64 * 700);
    let mut extension = [0u8; 512];
    for (index, (offset, length)) in parts[4..].iter().enumerate() {
        extension[24 * index..][..11].copy_from_slice(format!("{offset:011o}").as_bytes());
        extension[24 * index + 12..][..11].copy_from_slice(format!("{length:011o}").as_bytes());
    }
    let mut data = extension.to_vec();
    data.extend(bytes(4200, 5));
    tar.raw(&header, &data);
}

/// Three layers with all that archives can hold. `dense` is for readers that do not know GNU's first sparse format.
fn corpus(dense: bool) -> Vec<Vec<u8>> {
    let mut bottom = Tar::default();
    bottom.entry(Header::new(b'5', b"./").mode(0o755), b"");
    for name in [
        "etc/",
        "usr/",
        "usr/lib/",
        "var/",
        "var/cache/",
        "swap-dir/",
        "opaque/",
        "opaque/sub/",
        "gone-dir/",
    ] {
        bottom.directory(name);
    }
    bottom
        .symlink("lib", "usr/lib")
        .symlink("abs", "/var/cache")
        .symlink("dangling", "no/where");
    bottom
        .file("etc/passwd", b"root:x:0:0::/:/bin/sh\n")
        .file("etc/empty", b"")
        .file("usr/lib/big", &bytes(300_000, 1));
    bottom
        .entry(Header::new(b'0', b"usr/lib/suid").mode(0o4755), b"suid")
        .entry(Header::new(b'5', b"tmp").mode(0o1777), b"");
    bottom
        .file("a", b"shared")
        .hard_link("a-link", "a")
        .hard_link("./usr/a-link2", "/a-link");
    bottom.symlink("s", "t").hard_link("s-link", "s");
    bottom.entry(
        Header::new(b'3', b"null")
            .mode(0o666)
            .octal(329, 8, 1)
            .octal(337, 8, 3),
        b"",
    );
    bottom.entry(
        Header::new(b'4', b"disk")
            .mode(0o660)
            .octal(329, 8, 259)
            .octal(337, 8, 70_000),
        b"",
    );
    bottom.entry(Header::new(b'6', b"fifo").mode(0o600), b"");
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(180));
    bottom
        .entry(
            &mut Header::new(b'L', b"././@LongLink"),
            format!("{}/\0", "d".repeat(120)).as_bytes(),
        )
        .directory("cut");
    bottom
        .entry(
            &mut Header::new(b'L', b"././@LongLink"),
            format!("{long}\0").as_bytes(),
        )
        .file("cut", b"long name");
    let target = format!("{}t", "x/".repeat(100));
    bottom
        .entry(
            &mut Header::new(b'K', b"././@LongLink"),
            format!("{target}\0").as_bytes(),
        )
        .symlink("long-target", "cut");
    let mut prefixed = Header::new(b'0', b"by-prefix");
    bottom.entry(prefixed.field(345, b"var/cache"), b"prefix");
    let mut wide = Header::new(b'0', b"wide-ids");
    bottom.entry(
        wide.binary(108, 8, 100_000)
            .binary(116, 8, 3_000_000_000)
            .binary(136, 12, -12345),
        b"wide",
    );
    bottom.pax(&[
        ("uid", b"70000"),
        ("gid", b"70001"),
        ("mtime", b"1700000001.987654321"),
        ("path", "pax/ünï".as_bytes()),
        ("SCHILY.xattr.user.note", b"a\0=b\n"),
        ("SCHILY.xattr.security.capability", CAPABILITY),
        ("SCHILY.xattr.trusted.t", b"v"),
    ]);
    bottom.file("placeholder", b"pax file");
    // The group bits of a file with a list are the list's mask.
    bottom.pax(&[("SCHILY.xattr.system.posix_acl_access", ACL)]);
    bottom.entry(Header::new(b'0', b"with-acl").mode(0o674), b"acl");
    bottom
        .pax(&[("size", b"11")])
        .raw(Header::new(b'0', b"pax-size").size(0), b"eleven byte");
    old_sparse(&mut bottom, "sparse-old", dense);
    bottom.pax(&[
        ("GNU.sparse.major", b"0"),
        ("GNU.sparse.minor", b"1"),
        ("GNU.sparse.name", b"sparse-01"),
        ("GNU.sparse.size", b"1000000"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.map", b"5000,100,900000,50"),
    ]);
    bottom.file("GNUSparseFile.0/x", &bytes(150, 6));
    bottom.pax(&[
        ("GNU.sparse.size", b"9000"),
        ("GNU.sparse.numblocks", b"2"),
        ("GNU.sparse.offset", b"0"),
        ("GNU.sparse.numbytes", b"10"),
        ("GNU.sparse.offset", b"8000"),
        ("GNU.sparse.numbytes", b"20"),
    ]);
    bottom.file("sparse-00", &bytes(30, 7));
    bottom.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"sparse-10"),
        ("GNU.sparse.realsize", b"2000000"),
    ]);
    let mut body = b"2\n4096\n1000\n1999000\n1000\n".to_vec();
    body.resize(512, 0);
    body.extend(bytes(2000, 8));
    bottom.file("GNUSparseFile.0/y", &body);
    bottom.file("twice", b"first").file("twice", b"second");
    bottom
        .file("swap-dir/inside", b"1")
        .file("swap-file", b"2")
        .file("opaque/old", b"3")
        .file("opaque/sub/old", b"4");
    bottom
        .file("gone", b"5")
        .file("gone-dir/x", b"6")
        .file("kept-by-link", b"7")
        .file("linked-later", b"8");

    let mut middle = Tar::default();
    middle
        .file("swap-dir", b"now a file")
        .directory("swap-file")
        .file("swap-file/in", b"now a directory");
    middle.file(".wh.gone", b"").file(".wh.gone-dir", b"");
    middle
        .directory("opaque")
        .file("opaque/.wh..wh..opq", b"")
        .file("opaque/new", b"new");
    middle
        .file("lib/through-symlink", b"lands in usr/lib")
        .file("abs/through-absolute", b"lands in var/cache");
    middle
        .hard_link("other-name", "kept-by-link")
        .file("kept-by-link", b"replaced");
    middle
        .file("middle", b"of the middle layer")
        .hard_link("middle-link", "middle");
    middle.file("usr/.wh.nothing", b"").symlink("null", "etc/empty");

    let mut top = Tar::default();
    // The middle layer's file is hidden under one name and seen under the other.
    top.file("middle", b"of the top layer")
        .file(".wh.linked-later", b"");
    top.file("usr/lib/through-symlink", b"again, by its true name")
        .directory("gone-dir")
        .file("gone-dir/y", b"back");
    top.entry(Header::new(b'5', b"etc").mode(0o700).octal(136, 12, 5), b"");
    vec![bottom.end(), middle.end(), top.end()]
}

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
