//! A tree in memory, and what the oracles need.
#![allow(dead_code, missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use hypeman_erofs::{
    Attributes, Builder, Compression, Content, FileHandle, NodeId, Options, Summary, Tree, Xattr,
};

pub enum Kind {
    Directory(BTreeMap<Vec<u8>, NodeId>),
    File(FileHandle),
    Symlink(Vec<u8>),
    Other(Content<'static>),
}

pub struct MemoryTree {
    pub nodes: Vec<(Attributes, Kind)>,
}

impl Default for MemoryTree {
    fn default() -> Self {
        Self {
            nodes: vec![(attributes(0o755), Kind::Directory(BTreeMap::new()))],
        }
    }
}

impl MemoryTree {
    pub fn add(&mut self, parent: NodeId, name: &str, attributes: Attributes, kind: Kind) -> NodeId {
        let node = self.nodes.len() as NodeId;
        self.nodes.push((attributes, kind));
        self.link(parent, name, node);
        node
    }

    pub fn directory(&mut self, parent: NodeId, name: &str, attributes: Attributes) -> NodeId {
        self.add(parent, name, attributes, Kind::Directory(BTreeMap::new()))
    }

    pub fn link(&mut self, parent: NodeId, name: &str, node: NodeId) {
        match &mut self.nodes[parent as usize].1 {
            Kind::Directory(children) => children.insert(name.as_bytes().to_vec(), node),
            _ => panic!("not a directory"),
        };
    }
}

impl Tree for MemoryTree {
    fn node_count(&self) -> usize {
        self.nodes.len()
    }
    fn root(&self) -> NodeId {
        0
    }
    fn attributes(&self, node: NodeId) -> &Attributes {
        &self.nodes[node as usize].0
    }
    fn content(&self, node: NodeId) -> Content<'_> {
        match &self.nodes[node as usize].1 {
            Kind::Directory(_) => Content::Directory,
            Kind::File(handle) => Content::File(*handle),
            Kind::Symlink(target) => Content::Symlink(target),
            Kind::Other(content) => *content,
        }
    }
    fn children<'a>(&'a self, directory: NodeId, visit: &mut dyn FnMut(&'a [u8], NodeId)) {
        if let Kind::Directory(children) = &self.nodes[directory as usize].1 {
            children.iter().for_each(|(name, node)| visit(name, *node));
        }
    }
}

pub fn attributes(mode: u16) -> Attributes {
    Attributes {
        mode,
        mtime: 1_700_000_000,
        mtime_nanoseconds: 123_456_789,
        ..Attributes::default()
    }
}

pub fn xattrs(list: &[(&str, &[u8])]) -> Box<[Xattr]> {
    list.iter()
        .map(|(name, value)| Xattr {
            name: name.as_bytes().into(),
            value: (*value).into(),
        })
        .collect()
}

pub fn write_file(builder: &mut Builder<'_>, attributes: &Attributes, content: &[u8]) -> FileHandle {
    let mut file = builder
        .begin_file(attributes, content.len() as u64, false)
        .unwrap();
    // Odd pieces, as a tar stream delivers them.
    for piece in content.chunks(10_007) {
        file.write(piece).unwrap();
    }
    file.finish().unwrap()
}

/// Builds an image in a directory and returns its path.
pub fn image(
    directory: &Path,
    compression: Compression,
    fill: impl FnOnce(&mut Builder<'_>, &mut MemoryTree),
) -> (PathBuf, Summary) {
    let path = directory.join(format!("{compression:?}.erofs"));
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .unwrap();
    let mut builder = Builder::new(
        &file,
        Options {
            compression,
            ..Options::default()
        },
    )
    .unwrap();
    let mut tree = MemoryTree::default();
    fill(&mut builder, &mut tree);
    let summary = builder.finish(&tree).unwrap();
    assert_eq!(file.metadata().unwrap().len(), summary.size_bytes);
    (path, summary)
}

/// Runs `fsck.erofs --extract` (which reads every byte), or says why not.
pub fn fsck(image: &Path) {
    match Command::new("fsck.erofs").arg("--extract").arg(image).output() {
        Ok(output) => assert!(
            output.status.success(),
            "fsck.erofs refuses {}: {}{}",
            image.display(),
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
        Err(error) => println!("SKIPPED: fsck.erofs: {error}"),
    }
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
        if !rustix::process::geteuid().is_root() || !known {
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
