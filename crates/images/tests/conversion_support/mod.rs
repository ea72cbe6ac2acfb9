//! Archives written byte by byte, and a look at what became of them.
#![allow(
    dead_code,
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout
)]

pub mod corpus;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use hypeman_images::layers::{
    Compression, ConvertError, ConvertObserver, ConvertOptions, Converted, LayerSource, Limits, convert,
};
use sha2::{Digest, Sha256};

pub const MTIME: i64 = 1_700_000_000;

/// One tar header, to be changed at will before it is written.
#[derive(Clone)]
pub struct Header(pub [u8; 512]);

impl Header {
    pub fn new(kind: u8, name: &[u8]) -> Self {
        let mut header = Self([0; 512]);
        header.field(0, &name[..name.len().min(100)]);
        header.octal(100, 8, 0o644);
        header.octal(108, 8, 0);
        header.octal(116, 8, 0);
        header.octal(124, 12, 0);
        header.octal(136, 12, MTIME as u64);
        header.0[156] = kind;
        header.field(257, b"ustar\x0000");
        header.octal(329, 8, 0);
        header.octal(337, 8, 0);
        header
    }

    pub fn field(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub fn octal(&mut self, at: usize, width: usize, value: u64) -> &mut Self {
        let text = format!("{value:0digits$o}\0", digits = width - 1);
        self.field(at, text.as_bytes())
    }

    /// A number in GNU's binary form.
    pub fn binary(&mut self, at: usize, width: usize, value: i64) -> &mut Self {
        let mut bytes = vec![if value < 0 { 0xff } else { 0 }; width];
        bytes[width - 8..].copy_from_slice(&value.to_be_bytes());
        bytes[0] |= 0x80;
        self.field(at, &bytes)
    }

    pub fn mode(&mut self, mode: u64) -> &mut Self {
        self.octal(100, 8, mode)
    }

    pub fn size(&mut self, size: u64) -> &mut Self {
        self.octal(124, 12, size)
    }

    pub fn link(&mut self, target: &str) -> &mut Self {
        self.field(157, target.as_bytes())
    }

    fn sealed(&self) -> [u8; 512] {
        let mut bytes = self.0;
        bytes[148..156].fill(b' ');
        let sum: u64 = bytes.iter().map(|byte| u64::from(*byte)).sum();
        bytes[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        bytes
    }
}

/// An archive in the making.
#[derive(Default, Clone)]
pub struct Tar(pub Vec<u8>);

impl Tar {
    pub fn raw(&mut self, header: &Header, data: &[u8]) -> &mut Self {
        self.0.extend(header.sealed());
        self.0.extend(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn entry(&mut self, header: &mut Header, data: &[u8]) -> &mut Self {
        header.size(data.len() as u64);
        self.raw(header, data)
    }

    pub fn file(&mut self, name: &str, data: &[u8]) -> &mut Self {
        self.entry(&mut Header::new(b'0', name.as_bytes()), data)
    }

    pub fn directory(&mut self, name: &str) -> &mut Self {
        self.entry(Header::new(b'5', name.as_bytes()).mode(0o755), b"")
    }

    pub fn symlink(&mut self, name: &str, target: &str) -> &mut Self {
        self.entry(Header::new(b'2', name.as_bytes()).mode(0o777).link(target), b"")
    }

    pub fn hard_link(&mut self, name: &str, target: &str) -> &mut Self {
        self.entry(Header::new(b'1', name.as_bytes()).link(target), b"")
    }

    pub fn pax(&mut self, records: &[(&str, &[u8])]) -> &mut Self {
        self.extended(b'x', records)
    }

    pub fn extended(&mut self, kind: u8, records: &[(&str, &[u8])]) -> &mut Self {
        let body: Vec<u8> = records
            .iter()
            .flat_map(|(key, value)| pax_record(key, value))
            .collect();
        self.entry(&mut Header::new(kind, b"PaxHeaders/x"), &body)
    }

    pub fn end(&self) -> Vec<u8> {
        let mut bytes = self.0.clone();
        bytes.resize((bytes.len() + 1024).next_multiple_of(10240), 0);
        bytes
    }
}

pub fn pax_record(key: &str, value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let digits = (1..)
        .find(|digits| (body + digits).to_string().len() == *digits)
        .unwrap();
    [
        (body + digits).to_string().as_bytes(),
        b" ",
        key.as_bytes(),
        b"=",
        value,
        b"\n",
    ]
    .concat()
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    format!(
        "sha256:{}",
        hash.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    )
}

/// A layer of these stored bytes, with nothing known of its digests.
pub fn layer(stored: Vec<u8>) -> LayerSource {
    let size = stored.len() as u64;
    let stored: Arc<[u8]> = stored.into();
    LayerSource {
        media_type: "application/vnd.oci.image.layer.v1.tar".into(),
        digest: None,
        size,
        diff_id: None,
        open: Box::new(move || {
            let reader: Box<dyn Read + Send> = Box::new(std::io::Cursor::new(Arc::clone(&stored)));
            Ok(reader)
        }),
    }
}

pub struct Silent;

impl ConvertObserver for Silent {
    fn progress(&self, _bytes_read: u64, _total: u64) {}
    fn cancelled(&self) -> bool {
        false
    }
}

pub fn convert_with(
    layers: &[LayerSource],
    image: &Path,
    options: &ConvertOptions,
) -> Result<Converted, ConvertError> {
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(image)
        .unwrap();
    convert(layers, &file, options, &Silent)
}

pub fn options(compression: Compression) -> ConvertOptions {
    ConvertOptions {
        compression,
        limits: Limits::default(),
        threads: 2,
    }
}

/// Runs `fsck.erofs` over every byte, or says why not.
pub fn fsck(image: &Path) {
    match Command::new("fsck.erofs").arg("--extract").arg(image).output() {
        Ok(output) => assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        ),
        Err(error) => println!("SKIPPED: fsck.erofs: {error}"),
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A kernel mount that goes away with the value.
pub struct Mounted {
    pub path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Mounted {
    /// Mounts an image, or prints why this host cannot.
    pub fn new(image: &Path) -> Option<Self> {
        let known = std::fs::read_to_string("/proc/filesystems")
            .unwrap_or_default()
            .contains("erofs");
        if !is_root() || !known {
            println!("SKIPPED: a kernel mount needs root and a kernel with EROFS");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mnt");
        std::fs::create_dir(&path).unwrap();
        let output = Command::new("mount")
            .args(["-t", "erofs", "-o", "loop,ro"])
            .arg(image)
            .arg(&path)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "mount: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Some(Self {
            path,
            _directory: directory,
        })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.path).status();
    }
}

/// Everything that can be seen of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, i64),
    pub size: u64,
    pub device: u64,
    pub names: u64,
    /// Digest of the content, or target of a symbolic link.
    pub content: String,
    pub xattrs: BTreeMap<String, Vec<u8>>,
    /// The first of the names of the same inode.
    pub same_as: String,
}

/// All nodes below a directory by path.
pub fn look(root: &Path) -> BTreeMap<String, Seen> {
    let mut seen = BTreeMap::new();
    let mut first_names: BTreeMap<u64, String> = BTreeMap::new();
    let mut waiting = vec![PathBuf::new()];
    let mut all = Vec::new();
    while let Some(relative) = waiting.pop() {
        let metadata = std::fs::symlink_metadata(root.join(&relative)).unwrap();
        if metadata.is_dir() {
            for entry in std::fs::read_dir(root.join(&relative)).unwrap() {
                waiting.push(relative.join(entry.unwrap().file_name()));
            }
        }
        all.push((relative, metadata));
    }
    all.sort_by(|one, other| one.0.cmp(&other.0));
    for (relative, metadata) in all {
        let path = root.join(&relative);
        let name = String::from_utf8_lossy(relative.as_os_str().as_bytes()).into_owned();
        let content = if metadata.is_file() {
            let mut hasher = Sha256::new();
            std::io::copy(&mut File::open(&path).unwrap(), &mut hasher).unwrap();
            format!("{:x}", hasher.finalize())
        } else if metadata.is_symlink() {
            std::fs::read_link(&path).unwrap().to_string_lossy().into_owned()
        } else {
            String::new()
        };
        let directory = metadata.is_dir();
        seen.insert(
            name.clone(),
            Seen {
                mode: metadata.mode(),
                owner: (metadata.uid(), metadata.gid()),
                mtime: (metadata.mtime(), metadata.mtime_nsec()),
                size: if directory { 0 } else { metadata.size() },
                device: metadata.rdev(),
                names: if directory { 0 } else { metadata.nlink() },
                content,
                xattrs: xattrs(&path),
                same_as: first_names.entry(metadata.ino()).or_insert(name).clone(),
            },
        );
    }
    seen
}

fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| {
            let name = String::from_utf8_lossy(name).into_owned();
            let mut value = vec![0; 65536];
            let length = rustix::fs::lgetxattr(path, &*name, &mut value[..]).unwrap();
            value.truncate(length);
            (name, value)
        })
        .collect()
}

/// Shows where two trees differ, briefly.
pub fn assert_same(actual: &BTreeMap<String, Seen>, expected: &BTreeMap<String, Seen>) {
    for (name, expected) in expected {
        assert_eq!(actual.get(name), Some(expected), "{name}");
    }
    let extra: Vec<_> = actual
        .keys()
        .filter(|name| !expected.contains_key(*name))
        .collect();
    assert!(extra.is_empty(), "only in the image: {extra:?}");
}
