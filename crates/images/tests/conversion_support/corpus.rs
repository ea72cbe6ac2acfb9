//! Layers with all that archives can hold.

use super::{Header, Tar};

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
pub fn corpus(dense: bool) -> Vec<Vec<u8>> {
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

/// A small layer with an entry of each kind that needs care.
pub fn sample() -> Vec<u8> {
    let mut tar = Tar::default();
    tar.directory("d")
        .file("d/f", &[7; 3000])
        .symlink("s", "d")
        .hard_link("h", "d/f");
    tar.pax(&[("mtime", b"5.5"), ("SCHILY.xattr.user.a", b"b")])
        .file("p", b"pax");
    tar.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.realsize", b"9000"),
    ]);
    let mut body = b"1\n4096\n10\n".to_vec();
    body.resize(512, 0);
    body.extend([3; 10]);
    tar.file("sparse", &body)
        .file("d/.wh..wh..opq", b"")
        .file(".wh.gone", b"");
    tar.end()
}
