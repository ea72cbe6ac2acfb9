//! Archives that mean harm are refused, each with its reason.
#![allow(missing_docs, dropping_references, clippy::unwrap_used, clippy::expect_used)]

mod conversion_support;

use conversion_support::corpus::sample;
use conversion_support::*;
use hypeman_images::layers::{
    Compression, ConvertError, ConvertOptions, EntryProblem, LayerProblem, LayerSource, Limits,
};
use proptest::prelude::*;

fn attempt(layers: &[LayerSource], limits: Limits) -> Result<(), ConvertError> {
    let directory = tempfile::tempdir().unwrap();
    let options = ConvertOptions {
        compression: Compression::None,
        limits,
        threads: 2,
    };
    convert_with(layers, &directory.path().join("image"), &options).map(drop)
}

fn entry_problem(build: impl FnOnce(&mut Tar)) -> EntryProblem {
    let mut tar = Tar::default();
    build(&mut tar);
    match attempt(&[layer(tar.end())], Limits::default()) {
        Err(ConvertError::Entry {
            layer: 0,
            entry,
            problem,
        }) => {
            assert!(entry.len() < 1000);
            problem
        }
        other => panic!("{other:?}"),
    }
}

fn layer_problem(layers: &[LayerSource], limits: Limits) -> LayerProblem {
    match attempt(layers, limits) {
        Err(ConvertError::Layer { problem, .. }) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_that_lead_elsewhere() {
    use EntryProblem as P;
    for name in ["../escape", "a/../../escape", "/../escape", "a/.."] {
        assert_eq!(
            entry_problem(|tar| drop(tar.file(name, b""))),
            P::ParentComponent,
            "{name}"
        );
    }
    assert_eq!(entry_problem(|tar| drop(tar.file(".", b""))), P::ReplacesRoot);
    assert_eq!(
        entry_problem(|tar| drop(tar.symlink("./", "/etc"))),
        P::ReplacesRoot
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.pax(&[("path", b"/")]).symlink("x", "/etc"))),
        P::ReplacesRoot
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.pax(&[("path", b"a\0b")]).file("x", b""))),
        P::Nul
    );
    assert_eq!(entry_problem(|tar| drop(tar.file("", b""))), P::Unnamed);
    assert_eq!(
        entry_problem(|tar| drop(tar.pax(&[("path", &[b'n'; 256])]).file("x", b""))),
        P::NameTooLong(255)
    );
    let long = "p/".repeat(2100);
    assert_eq!(
        entry_problem(|tar| drop(tar.pax(&[("path", long.as_bytes())]).file("x", b""))),
        P::PathTooLong(4096)
    );
    let deep = "d/".repeat(300);
    assert_eq!(
        entry_problem(|tar| drop(tar.pax(&[("path", deep.as_bytes())]).file("x", b""))),
        P::TooDeep(256)
    );
    for name in [".wh.", "a/.wh...", ".wh.x/y"] {
        assert_eq!(
            entry_problem(|tar| drop(tar.file(name, b""))),
            P::ReservedName,
            "{name}"
        );
    }
    assert_eq!(
        entry_problem(|tar| drop(tar.file("f", b"").file("f/below", b""))),
        P::ParentNotDirectory
    );
}

#[test]
fn links_that_lead_elsewhere() {
    use EntryProblem as P;
    let missing = |name: &str| P::LinkTargetMissing(name.into());
    assert_eq!(
        entry_problem(|tar| drop(tar.hard_link("x", "etc/shadow"))),
        missing("etc/shadow")
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.hard_link("x", "/etc/shadow"))),
        missing("etc/shadow")
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.hard_link("x", "../../etc/shadow"))),
        P::ParentComponent
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.file("x", b"").hard_link("x", "x"))),
        P::LinkToItself
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.directory("d").hard_link("x", "d"))),
        P::LinkTargetDirectory("d".into())
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.hard_link("x", "/"))),
        P::LinkTargetDirectory("/".into())
    );
    assert_eq!(entry_problem(|tar| drop(tar.hard_link("x", ""))), P::LinkTarget);
    assert_eq!(
        entry_problem(|tar| drop(tar.directory("d").file("d/f", b"").hard_link("d", "d/f"))),
        missing("d/f")
    );
    assert_eq!(entry_problem(|tar| drop(tar.symlink("x", ""))), P::LinkTarget);
    assert_eq!(
        entry_problem(|tar| drop(tar.pax(&[("linkpath", &[b'l'; 4096])]).symlink("x", "y"))),
        P::LinkTarget
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.symlink("a", "b").symlink("b", "a").file("a/x", b""))),
        P::TooManySymlinks
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.symlink("a", "a").file("a/x", b""))),
        P::TooManySymlinks
    );
}

#[test]
fn links_among_parents_stay_in_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let canary = directory.path().join("canary");
    std::fs::create_dir(&canary).unwrap();
    let mut tar = Tar::default();
    tar.symlink("out", &format!("../../../../..{}", canary.display()))
        .file("out/file", b"caught");
    tar.symlink("absolute", canary.to_str().unwrap())
        .file("absolute/other", b"caught");
    let image = directory.path().join("image");
    convert_with(&[layer(tar.end())], &image, &options(Compression::None)).unwrap();
    assert_eq!(std::fs::read_dir(&canary).unwrap().count(), 0);
    if let Some(mounted) = Mounted::new(&image) {
        let inside = mounted.path.join(canary.strip_prefix("/").unwrap());
        assert_eq!(std::fs::read(inside.join("file")).unwrap(), b"caught");
        assert_eq!(std::fs::read(inside.join("other")).unwrap(), b"caught");
    }
}

#[test]
fn headers_that_lie() {
    use EntryProblem as P;
    let is_header = |problem: P| matches!(problem, P::ExtendedHeader(_));
    let is_map = |problem: P| matches!(problem, P::SparseMap(_));
    assert_eq!(entry_problem(|tar| tar.0.extend([7; 512])), P::Checksum);
    // A size too small makes content look like a header.
    assert_eq!(
        entry_problem(|tar| drop(tar.raw(Header::new(b'0', b"f").size(512), &[1; 2048]))),
        P::Checksum
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.raw(Header::new(b'0', b"f").size(1 << 30), b"short"))),
        P::Truncated
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.raw(Header::new(b'0', b"f").binary(124, 12, -1), b""))),
        P::Number("size")
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.raw(Header::new(b'0', b"f").field(124, b"99999999999"), b""))),
        P::Number("size")
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.raw(Header::new(b'0', b"f").binary(108, 8, -1), b""))),
        P::Number("uid")
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.raw(Header::new(b'0', b"f").binary(124, 12, 1 << 50), b""))),
        P::TooLarge(1 << 40)
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.raw(&Header::new(b'M', b"f"), b""))),
        P::Type('M')
    );
    assert_eq!(
        entry_problem(|tar| drop(tar.raw(Header::new(b'3', b"d").octal(329, 8, 4096), b""))),
        P::Device(4096, 0)
    );
    assert!(is_header(entry_problem(|tar| drop(
        tar.extended(b'g', &[("path", b"x")])
    ))));
    assert!(is_header(entry_problem(|tar| drop(
        tar.extended(b'g', &[("size", b"1")])
    ))));
    assert!(is_header(entry_problem(|tar| drop(
        tar.pax(&[("uid", b"1")]).pax(&[("uid", b"2")]).file("x", b"")
    ))));
    assert!(is_header(entry_problem(|tar| {
        tar.entry(&mut Header::new(b'L', b"L"), b"one\0")
            .pax(&[("path", b"other")])
            .file("x", b"");
    })));
    assert!(is_header(entry_problem(|tar| drop(
        tar.raw(Header::new(b'x', b"x").size(2 << 20), &[0; 2 << 20])
    ))));
    assert!(is_header(entry_problem(|tar| drop(
        tar.entry(&mut Header::new(b'x', b"x"), b"99 path=a\n")
    ))));
    for map in ["0,5,3,5", "100,10", "0,4", "0", "5,5,0,5"] {
        let records = [
            ("GNU.sparse.major", &b"0"[..]),
            ("GNU.sparse.minor", b"1"),
            ("GNU.sparse.size", b"50"),
            ("GNU.sparse.map", map.as_bytes()),
        ];
        assert!(
            is_map(entry_problem(|tar| drop(tar.pax(&records).file("x", &[1; 10])))),
            "{map}"
        );
    }
    let records = [
        ("GNU.sparse.major", &b"1"[..]),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.realsize", b"50"),
    ];
    assert!(is_map(entry_problem(|tar| drop(
        tar.pax(&records).file("x", b"9999999\n0\n1\n")
    ))));
    let big = vec![1; 65_536];
    assert!(matches!(
        entry_problem(|tar| drop(tar.pax(&[("SCHILY.xattr.user.x", &big)]).file("x", b""))),
        P::XattrTooLarge(_)
    ));
    let name = format!("SCHILY.xattr.user.{}", "n".repeat(256));
    assert!(matches!(
        entry_problem(|tar| drop(tar.pax(&[(&name, b"")]).file("x", b""))),
        P::XattrTooLarge(_)
    ));
    let acl = entry_problem(|tar| {
        drop(
            tar.pax(&[("SCHILY.xattr.system.posix_acl_access", b"junk")])
                .file("x", b""),
        )
    });
    assert!(matches!(acl, P::AccessControlList(_)));
}

#[test]
fn a_size_in_the_extended_header_is_the_one_that_counts() {
    // CVE-2026-33055: a reader that ignores it would find the hidden header in the content.
    let mut hidden = Tar::default();
    hidden.file("smuggled", b"");
    let mut tar = Tar::default();
    tar.pax(&[("size", b"512")])
        .raw(Header::new(b'0', b"carrier").size(0), &hidden.0);
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let converted = convert_with(&[layer(tar.end())], &image, &options(Compression::None)).unwrap();
    assert_eq!(converted.inodes, 2);
}

#[test]
fn streams_that_lie() {
    use LayerProblem as P;
    let mut tar = Tar::default();
    tar.file("f", &[1; 5000]);
    let plain = tar.end();
    let packed = gzip(&plain);
    let default = Limits::default;
    let with_size = |size: usize| LayerSource {
        size: size as u64,
        ..layer(packed.clone())
    };
    let announced = |size: usize, longer| P::Size {
        announced: size as u64,
        longer,
    };
    assert_eq!(
        layer_problem(&[with_size(packed.len() - 1)], default()),
        announced(packed.len() - 1, true)
    );
    assert_eq!(
        layer_problem(&[with_size(packed.len() + 1)], default()),
        announced(packed.len() + 1, false)
    );
    assert_eq!(
        layer_problem(&[layer(packed[..packed.len() / 2].to_vec())], default()),
        P::Truncated
    );
    let zstd = zstd::encode_all(&plain[..], 3).unwrap();
    assert_eq!(
        layer_problem(&[layer(zstd[..zstd.len() - 3].to_vec())], default()),
        P::Truncated
    );
    assert_eq!(
        layer_problem(&[layer([&plain[..], b"garbage"].concat())], default()),
        P::TrailingData
    );
    assert!(matches!(
        layer_problem(&[layer([&packed[..], &[b'g'; 64]].concat())], default()),
        P::Corrupt(_)
    ));
    assert!(matches!(
        layer_problem(&[layer([&zstd[..], &[b'g'; 64]].concat())], default()),
        P::Corrupt(_)
    ));
    let mut flipped = packed.clone();
    let last = flipped.len() - 6;
    flipped[last] ^= 1;
    assert!(matches!(
        layer_problem(&[layer(flipped)], default()),
        P::Corrupt(_)
    ));
    let digested = |wrong: &str| LayerSource {
        diff_id: Some(wrong.into()),
        ..layer(packed.clone())
    };
    assert!(matches!(
        layer_problem(&[digested(&digest(b"x"))], default()),
        P::DiffId { .. }
    ));
    assert!(matches!(
        layer_problem(&[digested("md5:abc")], default()),
        P::DigestForm(_)
    ));
    let typed = |media_type: &str| LayerSource {
        media_type: media_type.into(),
        ..layer(plain.clone())
    };
    assert!(matches!(
        layer_problem(&[typed("application/json")], default()),
        P::MediaType(_)
    ));
    assert!(matches!(
        layer_problem(
            &[typed("application/vnd.oci.image.layer.v1.tar+encrypted")],
            default()
        ),
        P::MediaType(_)
    ));
    assert_eq!(
        layer_problem(&[layer(b"BZh91AY&SY".to_vec())], default()),
        P::Compression("bzip2")
    );
    assert_eq!(
        layer_problem(&[layer(b"\xfd7zXZ\0\0\0".to_vec())], default()),
        P::Compression("xz")
    );
}

#[test]
fn bombs() {
    use LayerProblem as P;
    let zeros = vec![0; 4 << 20];
    let mut tar = Tar::default();
    tar.file("zeros", &zeros);
    let ratio = Limits {
        ratio: 100,
        ratio_floor: 1 << 20,
        ..Limits::default()
    };
    let mut filling = Tar::default();
    filling.file("filling", &zeros[..64 << 10]);
    for packed in [gzip(&tar.end()), zstd::encode_all(&tar.end()[..], 3).unwrap()] {
        assert_eq!(
            layer_problem(&[layer(packed.clone())], ratio.clone()),
            P::Ratio { limit: 100 }
        );
        // What counts is the whole image, whichever layer is read first: zeros among enough else are welcome.
        for zeros_first in [true, false] {
            let mut layers = [layer(packed.clone()), layer(filling.end())];
            if !zeros_first {
                layers.reverse();
            }
            assert!(attempt(&layers, ratio.clone()).is_ok());
        }
        let bytes = Limits {
            uncompressed_bytes: 6 << 20,
            ..Limits::default()
        };
        let twice = [layer(packed.clone()), layer(packed)];
        assert_eq!(layer_problem(&twice, bytes), P::TooManyBytes { limit: 6 << 20 });
    }
    let mut many = Tar::default();
    (0..20).for_each(|index| drop(many.file(&format!("f{index}"), b"")));
    let entries = Limits {
        entries: 19,
        ..Limits::default()
    };
    assert_eq!(
        layer_problem(&[layer(many.end())], entries),
        P::TooManyEntries { limit: 19 }
    );
    // Directories without entries count as well.
    let mut implied = Tar::default();
    implied.file(&"d/".repeat(30), b"");
    let entries = Limits {
        entries: 19,
        ..Limits::default()
    };
    assert_eq!(
        layer_problem(&[layer(implied.end())], entries),
        P::TooManyEntries { limit: 19 }
    );
    let metadata = Limits {
        metadata_bytes: 4096,
        ..Limits::default()
    };
    assert_eq!(
        layer_problem(&[layer(many.end())], metadata),
        P::TooMuchMetadata { limit: 4096 }
    );
    // A frame that wants a window of 128 MiB.
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(27).unwrap();
    std::io::Write::write_all(&mut encoder, &tar.end()).unwrap();
    assert!(matches!(
        layer_problem(&[layer(encoder.finish().unwrap())], Limits::default()),
        P::Corrupt(_)
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_streams_are_refused_or_read_but_never_panic(
        packing in 0usize..3,
        flips in proptest::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..6),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let plain = sample();
        let mut stored = match packing {
            0 => plain,
            1 => gzip(&plain),
            _ => zstd::encode_all(&plain[..], 1).unwrap(),
        };
        for (index, bit) in flips {
            let at = index.index(stored.len());
            stored[at] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            stored.truncate(cut.index(stored.len()));
        }
        let limits = Limits { uncompressed_bytes: 64 << 20, entry_bytes: 1 << 30, ..Limits::default() };
        let _ = attempt(&[layer(stored)], limits);
    }

    #[test]
    fn damaged_headers_with_right_checksums_never_panic(
        entry in 0usize..8,
        changes in proptest::collection::vec((0usize..512, any::<u8>()), 1..5),
    ) {
        let mut bytes = sample();
        let starts: Vec<usize> = (0..bytes.len() / 512)
            .map(|block| block * 512)
            .filter(|start| &bytes[start + 257..start + 262] == b"ustar")
            .collect();
        let start = starts[entry % starts.len()];
        for (at, byte) in changes {
            bytes[start + at] = byte;
        }
        bytes[start + 148..start + 156].fill(b' ');
        let sum: u64 = bytes[start..start + 512].iter().map(|byte| u64::from(*byte)).sum();
        bytes[start + 148..start + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let limits = Limits { entry_bytes: 1 << 30, ..Limits::default() };
        let _ = attempt(&[layer(bytes)], limits);
    }
}
