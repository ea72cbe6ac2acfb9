//! Images are read back by `fsck.erofs` and by the kernel.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

mod common;

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use common::{Kind, Mounted, attributes, fsck, image, write_file, xattrs};
use hypeman_erofs::{Attributes, Builder, Compression, Content, Error, Options};

const BOTH: [Compression; 2] = [Compression::None, Compression::Lz4];

/// Bytes that compress about as well as text.
fn text(length: usize) -> Vec<u8> {
    (0u32..)
        .flat_map(|line| format!("line {} of a file {}\n", line, line.wrapping_mul(2654435761)).into_bytes())
        .take(length)
        .collect()
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(length)
    .collect()
}

#[test]
fn an_empty_root_is_an_image() {
    let directory = tempfile::tempdir().unwrap();
    for compression in BOTH {
        let (path, summary) = image(directory.path(), compression, |_, _| {});
        assert_eq!((summary.size_bytes, summary.inodes), (4096, 1));
        fsck(&path);
        if let Some(mounted) = Mounted::new(&path) {
            assert_eq!(std::fs::read_dir(&mounted.path).unwrap().count(), 0);
        }
    }
}

#[test]
fn files_of_every_size_class_come_back() {
    let sizes = [
        0,
        1,
        100,
        4000,
        4032,
        4033,
        4095,
        4096,
        4097,
        8191,
        8192,
        12_000,
        65_535,
        65_536,
        65_537,
        69_632,
        69_700,
        131_072,
        200_000,
        1_000_000,
        3 << 20,
    ];
    let contents: Vec<(String, Vec<u8>)> = sizes
        .iter()
        .flat_map(|size| {
            let mut mixed = text(*size);
            mixed
                .iter_mut()
                .skip(size / 2)
                .zip(noise(*size))
                .for_each(|(byte, random)| *byte = random);
            let mut holed = noise(*size);
            holed
                .iter_mut()
                .skip(size / 5)
                .take(size / 2)
                .for_each(|byte| *byte = 0);
            [
                ("text", text(*size)),
                ("noise", noise(*size)),
                ("zero", vec![0; *size]),
                ("mixed", mixed),
                ("holed", holed),
            ]
            .map(|(kind, content)| (format!("{kind}-{size}"), content))
        })
        .collect();
    let directory = tempfile::tempdir().unwrap();
    for compression in BOTH {
        let (path, _) = image(directory.path(), compression, |builder, tree| {
            for (name, content) in &contents {
                let handle = write_file(builder, &attributes(0o644), content);
                tree.add(0, name, attributes(0o644), Kind::File(handle));
            }
        });
        fsck(&path);
        let Some(mounted) = Mounted::new(&path) else {
            continue;
        };
        for (name, content) in &contents {
            let read = std::fs::read(mounted.path.join(name)).unwrap();
            assert!(read == *content, "{name} differs ({compression:?})");
        }
        // Single reads in the middle decompress part of an extent.
        let mut file = std::fs::File::open(mounted.path.join("text-3145728")).unwrap();
        file.seek(SeekFrom::Start(1_234_567)).unwrap();
        let mut some = [0; 100];
        file.read_exact(&mut some).unwrap();
        assert_eq!(some[..], text(3 << 20)[1_234_567..][..100]);
    }
}

#[test]
fn every_type_and_attribute_comes_back() {
    let directory = tempfile::tempdir().unwrap();
    for compression in BOTH {
        let long_target = format!("/{}", "t".repeat(4094));
        let (path, summary) = image(directory.path(), compression, |builder, tree| {
            let owner = Attributes {
                uid: 100_000,
                gid: 4_000_000_000,
                mtime: -5,
                ..attributes(0o4751)
            };
            let handle = write_file(builder, &owner, b"owned");
            let owned = tree.add(0, "owned", owner, Kind::File(handle));
            tree.link(0, "owned-again", owned);
            let many = Attributes {
                xattrs: xattrs(&[
                    ("user.long", &[b'v'; 60_000]),
                    ("user.empty", b""),
                    (
                        "security.capability",
                        &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                    ),
                    ("trusted.note", b"\0\xff"),
                ]),
                ..attributes(0o644)
            };
            let handle = write_file(builder, &many, &text(10_000));
            tree.add(0, "many-xattrs", many.clone(), Kind::File(handle));
            let sub = tree.directory(
                0,
                "dir",
                Attributes {
                    xattrs: many.xattrs,
                    ..attributes(0o1777)
                },
            );
            tree.directory(sub, "inner", attributes(0o2755));
            tree.add(0, "link", attributes(0o777), Kind::Symlink(b"dir/inner".to_vec()));
            tree.add(
                0,
                "long-link",
                attributes(0o777),
                Kind::Symlink(long_target.clone().into_bytes()),
            );
            let device = Kind::Other(Content::CharacterDevice {
                major: 10,
                minor: 0x12_345,
            });
            tree.add(0, "char", attributes(0o600), device);
            let device = Kind::Other(Content::BlockDevice {
                major: 0xfff,
                minor: 0xf_ffff,
            });
            tree.add(0, "block", attributes(0o660), device);
            tree.add(0, "fifo", attributes(0o600), Kind::Other(Content::Fifo));
            tree.add(0, "socket", attributes(0o600), Kind::Other(Content::Socket));
        });
        assert_eq!(summary.inodes, 11);
        fsck(&path);
        let Some(mounted) = Mounted::new(&path) else {
            continue;
        };
        let stat = |name: &str| std::fs::symlink_metadata(mounted.path.join(name)).unwrap();
        let owned = stat("owned");
        assert_eq!(
            (owned.mode(), owned.uid(), owned.gid()),
            (0o104751, 100_000, 4_000_000_000)
        );
        assert_eq!(
            (owned.mtime(), owned.mtime_nsec(), owned.nlink()),
            (-5, 123_456_789, 2)
        );
        assert_eq!(owned.ino(), stat("owned-again").ino());
        assert_eq!((stat("dir").mode(), stat("dir").nlink()), (0o041777, 3));
        assert_eq!(
            std::fs::read_link(mounted.path.join("link")).unwrap().to_str(),
            Some("dir/inner")
        );
        assert_eq!(
            std::fs::read_link(mounted.path.join("long-link"))
                .unwrap()
                .to_str(),
            Some(&*long_target)
        );
        assert!(stat("char").file_type().is_char_device());
        assert_eq!(stat("char").rdev(), rustix::fs::makedev(10, 0x12_345));
        assert_eq!(stat("block").rdev(), rustix::fs::makedev(0xfff, 0xf_ffff));
        assert!(stat("fifo").file_type().is_fifo() && stat("socket").file_type().is_socket());
        for name in ["many-xattrs", "dir"] {
            let mut value = vec![0; 65536];
            let size = rustix::fs::lgetxattr(mounted.path.join(name), "user.long", &mut value[..]).unwrap();
            assert_eq!(value[..size], [b'v'; 60_000]);
            let size =
                rustix::fs::lgetxattr(mounted.path.join(name), "trusted.note", &mut value[..]).unwrap();
            assert_eq!(value[..size], *b"\0\xff");
        }
        assert_eq!(
            std::fs::read(mounted.path.join("many-xattrs")).unwrap(),
            text(10_000)
        );
    }
}

#[test]
fn a_directory_of_many_blocks_finds_each_name() {
    let directory = tempfile::tempdir().unwrap();
    let names: Vec<String> = (0..30_000)
        .map(|number| format!("{}{number}", ["!", "a", "é", "zz"][number % 4]))
        .collect();
    let (path, summary) = image(directory.path(), Compression::None, |builder, tree| {
        for name in &names {
            let handle = write_file(builder, &attributes(0o644), name.as_bytes());
            tree.add(0, name, attributes(0o644), Kind::File(handle));
        }
    });
    assert_eq!(summary.inodes, 30_001);
    fsck(&path);
    if let Some(mounted) = Mounted::new(&path) {
        assert_eq!(std::fs::read_dir(&mounted.path).unwrap().count(), names.len());
        for name in &names {
            assert_eq!(std::fs::read_to_string(mounted.path.join(name)).unwrap(), *name);
        }
        assert!(!mounted.path.join("b").exists());
    }
}

#[test]
fn a_file_over_four_gibibytes_costs_what_its_data_costs() {
    const SIZE: u64 = (5 << 30) + 1234;
    let directory = tempfile::tempdir().unwrap();
    for compression in BOTH {
        for sparse in [false, true] {
            let (path, summary) = image(directory.path(), compression, |builder, tree| {
                let mut file = builder.begin_file(&attributes(0o644), SIZE, sparse).unwrap();
                file.write(b"head").unwrap();
                file.hole((4 << 30) + 10 - 4).unwrap();
                file.write(b"middle").unwrap();
                file.hole(SIZE - (4 << 30) - 16 - 4).unwrap();
                file.write(b"tail").unwrap();
                let handle = file.finish().unwrap();
                tree.add(0, "big", attributes(0o644), Kind::File(handle));
            });
            // A compressed extent of zeros still takes a block.
            let limit = if compression == Compression::Lz4 && !sparse {
                SIZE / 15
            } else {
                2 << 20
            };
            assert!(summary.size_bytes < limit, "{} bytes", summary.size_bytes);
            if sparse {
                fsck(&path);
            }
            let Some(mounted) = Mounted::new(&path) else {
                continue;
            };
            let mut file = std::fs::File::open(mounted.path.join("big")).unwrap();
            assert_eq!(file.metadata().unwrap().len(), SIZE);
            for (offset, expected) in [
                (0, &b"head\0\0"[..]),
                ((4 << 30) + 8, b"\0\0middle\0\0"),
                (SIZE - 6, b"\0\0tail"),
            ] {
                let mut read = vec![0; expected.len()];
                file.seek(SeekFrom::Start(offset)).unwrap();
                file.read_exact(&mut read).unwrap();
                assert_eq!(read, expected);
            }
        }
    }
}

#[test]
fn equal_calls_give_equal_bytes_and_unnamed_files_vanish() {
    let directory = tempfile::tempdir().unwrap();
    let build = |place: &str| {
        let place = directory.path().join(place);
        std::fs::create_dir(&place).unwrap();
        let (path, _) = image(&place, Compression::Lz4, |builder, tree| {
            write_file(builder, &attributes(0o644), &noise(500_000));
            let handle = write_file(builder, &attributes(0o644), &text(100_000));
            tree.add(0, "kept", attributes(0o644), Kind::File(handle));
        });
        fsck(&path);
        std::fs::read(path).unwrap()
    };
    let one = build("one");
    assert!(one == build("two"));
    let needle = &noise(500_000)[300_000..300_016];
    assert!(
        !one.windows(16).any(|window| window == needle),
        "the content of an unnamed file is still there"
    );
}

#[test]
fn what_the_format_cannot_hold_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let file = std::fs::File::create(directory.path().join("image")).unwrap();
    let builder = || Builder::new(&file, Options::default()).unwrap();
    let refuses = |kind: Kind, attributes: Attributes, name: &str| {
        let mut tree = common::MemoryTree::default();
        tree.add(0, name, attributes, kind);
        builder().finish(&tree).unwrap_err()
    };
    let plain = || attributes(0o644);
    assert!(matches!(
        refuses(Kind::Other(Content::Fifo), plain(), "a/b"),
        Error::InvalidName
    ));
    assert!(matches!(
        refuses(Kind::Other(Content::Fifo), plain(), ".."),
        Error::InvalidName
    ));
    assert!(matches!(
        refuses(Kind::Other(Content::Fifo), plain(), &"n".repeat(256)),
        Error::InvalidName
    ));
    assert!(matches!(
        refuses(Kind::Symlink(vec![b'x'; 4096]), plain(), "l"),
        Error::InvalidSymlink
    ));
    let device = Content::CharacterDevice {
        major: 5000,
        minor: 0,
    };
    assert!(matches!(
        refuses(Kind::Other(device), plain(), "d"),
        Error::InvalidDevice { .. }
    ));
    let foreign = Attributes {
        xattrs: xattrs(&[("com.apple.x", b"")]),
        ..plain()
    };
    assert!(matches!(
        refuses(Kind::Other(Content::Fifo), foreign, "x"),
        Error::InvalidXattr(_)
    ));
    let mut short = builder();
    let mut writer = short.begin_file(&plain(), 10, false).unwrap();
    assert!(matches!(writer.write(&[0; 11]), Err(Error::SizeMismatch { .. })));
    assert!(matches!(writer.finish(), Err(Error::SizeMismatch { .. })));
    let mut cycle = common::MemoryTree::default();
    let sub = cycle.directory(0, "d", plain());
    cycle.link(sub, "again", sub);
    assert!(matches!(builder().finish(&cycle), Err(Error::MalformedTree(_))));
}
