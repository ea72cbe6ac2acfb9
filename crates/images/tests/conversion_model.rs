//! Random stacks of layers mean what a simple model of overlay semantics says.
#![allow(
    missing_docs,
    dropping_references,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout
)]

mod conversion_support;

use std::collections::{BTreeMap, BTreeSet};

use conversion_support::*;
use hypeman_images::layers::{Compression, ConvertError};
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Operation {
    Directory(String, u32),
    File(String, u16),
    HardLink(String, String),
    Symlink(String, u8),
    Whiteout(String),
    Opaque(String),
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    Directory(u32),
    File(u16),
    Symlink(u8),
}

/// Every path with the node it leads to; the slow, obvious way.
#[derive(Default)]
struct Model {
    paths: BTreeMap<String, usize>,
    nodes: Vec<Node>,
    /// Paths that the current layer brought, with their parents.
    added: BTreeSet<String>,
    /// Directories that the current layer described.
    described: BTreeSet<String>,
}

fn parents(path: &str) -> impl Iterator<Item = &str> {
    path.match_indices('/').map(|(slash, _)| &path[..slash])
}

fn below(path: &str, directory: &str) -> bool {
    directory.is_empty()
        || path
            .strip_prefix(directory)
            .is_some_and(|rest| rest.starts_with('/'))
}

impl Model {
    fn is_directory(&self, path: &str) -> Option<bool> {
        self.paths
            .get(path)
            .map(|node| matches!(self.nodes[*node], Node::Directory(_)))
    }

    fn insert(&mut self, path: &str, node: Node) {
        self.nodes.push(node);
        self.paths.insert(path.into(), self.nodes.len() - 1);
    }

    fn remove(&mut self, path: &str) {
        self.paths.retain(|other, _| other != path && !below(other, path));
        self.described
            .retain(|other| other != path && !below(other, path));
    }

    /// Makes the parents, or says that one is in the way.
    fn prepare(&mut self, path: &str) -> Result<(), ()> {
        for parent in parents(path) {
            match self.is_directory(parent) {
                Some(false) => return Err(()),
                Some(true) => {}
                None => self.insert(parent, Node::Directory(0o755)),
            }
            self.added.insert(parent.into());
        }
        Ok(())
    }

    fn hide(&mut self, directory: &str, itself: bool) {
        let added = &self.added;
        self.paths.retain(|path, _| {
            !(below(path, directory) || itself && path == directory) || added.contains(path)
        });
        let kept: Vec<String> = self
            .paths
            .keys()
            .filter(|path| below(path, directory) || itself && *path == directory)
            .cloned()
            .collect();
        for path in kept {
            if self.is_directory(&path) == Some(true) && !self.described.contains(&path) {
                let node = self.paths[&path];
                self.nodes[node] = Node::Directory(0o755);
            }
        }
    }

    fn apply(&mut self, operation: &Operation) -> Result<(), ()> {
        match operation {
            Operation::Directory(path, mode) => {
                self.prepare(path)?;
                if self.is_directory(path) == Some(true) {
                    let node = self.paths[path];
                    self.nodes[node] = Node::Directory(*mode);
                } else {
                    self.remove(path);
                    self.insert(path, Node::Directory(*mode));
                }
                self.described.insert(path.clone());
                self.added.insert(path.clone());
            }
            Operation::File(path, seed) => {
                self.prepare(path)?;
                self.remove(path);
                self.insert(path, Node::File(*seed));
                self.added.insert(path.clone());
            }
            Operation::Symlink(path, seed) => {
                self.prepare(path)?;
                self.remove(path);
                self.insert(path, Node::Symlink(*seed));
                self.added.insert(path.clone());
            }
            Operation::HardLink(path, target) => {
                self.prepare(path)?;
                if path == target {
                    return Err(());
                }
                self.remove(path);
                if self.is_directory(target) != Some(false) {
                    return Err(());
                }
                self.paths.insert(path.clone(), self.paths[target]);
                self.added.insert(path.clone());
            }
            Operation::Whiteout(path) => {
                if parents(path).all(|parent| self.is_directory(parent) == Some(true)) {
                    self.hide(path, true);
                }
            }
            Operation::Opaque(path) => {
                if self.is_directory(path) == Some(true) {
                    self.hide(path, false);
                }
            }
        }
        Ok(())
    }
}

/// Content of a length that uses all layouts: inline, with blocks, with holes.
fn content(seed: u16) -> Vec<u8> {
    let length = [0, 10, 3000, 4096, 9000, 70_000, 200_000][usize::from(seed) % 7];
    let mut content: Vec<u8> = (0..length as u32)
        .map(|index| (index.wrapping_mul(2_654_435_761 ^ u32::from(seed)) >> 17) as u8)
        .collect();
    if seed.is_multiple_of(3) {
        content.iter_mut().skip(1000).for_each(|byte| *byte = 0);
    }
    content
}

fn archive(operations: &[Operation]) -> Vec<u8> {
    let mut tar = Tar::default();
    for operation in operations {
        match operation {
            Operation::Directory(path, mode) => {
                tar.entry(Header::new(b'5', path.as_bytes()).mode(u64::from(*mode)), b"");
            }
            Operation::File(path, seed) => drop(tar.file(path, &content(*seed))),
            Operation::HardLink(path, target) => drop(tar.hard_link(path, target)),
            Operation::Symlink(path, seed) => drop(tar.symlink(path, &format!("t{seed}"))),
            Operation::Whiteout(path) => {
                let (parent, name) = path
                    .rsplit_once('/')
                    .map_or(("", &**path), |(parent, name)| (parent, name));
                tar.file(&format!("{parent}/.wh.{name}"), b"");
            }
            Operation::Opaque(path) => drop(tar.file(&format!("{path}/.wh..wh..opq"), b"")),
        }
    }
    tar.end()
}

fn path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof!["a", "b", "c"], 1..4).prop_map(|parts| parts.join("/"))
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        3 => (path(), prop_oneof![Just(0o700u32), Just(0o1777), Just(0o755)]).prop_map(|(path, mode)| Operation::Directory(path, mode)),
        4 => (path(), any::<u16>()).prop_map(|(path, seed)| Operation::File(path, seed)),
        2 => (path(), path()).prop_map(|(path, target)| Operation::HardLink(path, target)),
        // Symbolic links are leaves here: the model does not follow them.
        1 => (path(), any::<u8>()).prop_map(|(path, seed)| Operation::Symlink(format!("{path}-s"), seed)),
        2 => path().prop_map(Operation::Whiteout),
        1 => path().prop_map(Operation::Opaque),
    ]
}

fn check(layers: &[Vec<Operation>], compression: Compression) {
    let mut model = Model::default();
    // An operation that cannot be is left out, save for one that ends the stack.
    let mut fails = false;
    let mut tars = Vec::new();
    for operations in layers {
        model.added.clear();
        model.described.clear();
        let mut kept = Vec::new();
        for operation in operations {
            let doomed = matches!(operation, Operation::HardLink(path, target) if path == target);
            let in_the_way =
                |path: &String| parents(path).any(|parent| model.is_directory(parent) == Some(false));
            let skip = match operation {
                Operation::Directory(path, _) | Operation::File(path, _) | Operation::Symlink(path, _) => {
                    in_the_way(path)
                }
                Operation::HardLink(path, target) => {
                    doomed
                        || in_the_way(path)
                        || below(target, path)
                        || model.is_directory(target) != Some(false)
                }
                _ => false,
            };
            if !skip {
                fails |= model.apply(operation).is_err();
                kept.push(operation.clone());
            }
        }
        tars.push(layer(gzip(&archive(&kept))));
    }
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    let result = convert_with(&tars, &image, &options(compression));
    if fails {
        assert!(matches!(result, Err(ConvertError::Entry { .. })), "{result:?}");
        return;
    }
    let converted = result.unwrap();
    let reachable: BTreeSet<usize> = model.paths.values().copied().collect();
    assert_eq!(converted.inodes, reachable.len() as u64 + 1);
    fsck(&image);
    let Some(mounted) = Mounted::new(&image) else {
        return;
    };
    let mut seen = look(&mounted.path);
    seen.remove("");
    let mut first_names = BTreeMap::new();
    let hash = |content: &[u8]| digest(content)["sha256:".len()..].to_owned();
    assert_eq!(
        seen.keys().collect::<Vec<_>>(),
        model.paths.keys().collect::<Vec<_>>()
    );
    // Names come in the order of their components, as the look at the mount has them.
    let mut names: Vec<&String> = model.paths.keys().collect();
    names.sort_by(|one, other| one.split('/').cmp(other.split('/')));
    for name in names {
        let node = model.paths[name];
        let first = first_names.entry(node).or_insert_with(|| name.clone()).clone();
        let (mode, content) = match &model.nodes[node] {
            Node::Directory(mode) => (0o040_000 | mode, String::new()),
            Node::File(seed) => (0o100_644, hash(&content(*seed))),
            Node::Symlink(seed) => (0o120_777, format!("t{seed}")),
        };
        let actual = &seen[name];
        assert_eq!(
            (actual.mode, &actual.content, &actual.same_as),
            (mode, &content, &first),
            "{name}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 120, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_stacks_equal_the_model(
        layers in proptest::collection::vec(proptest::collection::vec(operation(), 1..14), 1..5),
        compressed in any::<bool>(),
    ) {
        check(&layers, if compressed { Compression::Lz4 } else { Compression::None });
    }
}

#[test]
fn contents_that_only_a_second_reading_finds() {
    use Operation::{File, HardLink, Whiteout};
    let text = |text: &str| text.to_owned();
    // The bottom layer's files are hidden by name, and still needed through links.
    check(
        &[
            vec![
                File(text("a"), 5),
                HardLink(text("b"), text("a")),
                File(text("c"), 6),
            ],
            vec![HardLink(text("d/e"), text("c"))],
            vec![File(text("a"), 4), Whiteout(text("c"))],
        ],
        Compression::None,
    );
}
