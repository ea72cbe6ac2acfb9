//! Layers put on one another, from the bottom up, in a tree in memory.
//!
//! What an entry means is decided here and nowhere else, as a container runtime decides it on a real directory:
//! - An entry replaces what is at its path, save that a directory over a directory only changes its attributes.
//! - Symbolic links among the *parents* of an entry are followed, within the tree: `..` and absolute targets end
//!   at its root. Directories missing on the way are made (mode 755, owner 0, time 0).
//! - A hard link is another name for what its target is at that moment.
//! - Whiteouts hide what lower layers brought, never what their own layer brings, before or after them.
//!
//! For the last rule each name remembers the last layer that brought something at it or below it.

use std::collections::{BTreeMap, HashSet};

use hypeman_erofs::{Attributes, Content, FileHandle, NodeId, Tree};

use super::error::EntryProblem;
use super::limits::Limits;
use super::path::{self, Name};
use super::record::{FileContent, Item, Record, shorten};

const ROOT: NodeId = 0;

/// Components walked for one path, with those of symbolic links on the way.
const LONGEST_WALK: usize = 2048;

/// Symbolic links followed for one path, as in the kernel.
const MOST_SYMLINKS: usize = 40;

#[derive(Debug, Clone, Copy)]
struct Child {
    node: NodeId,
    layer: u32,
}

#[derive(Debug)]
enum NodeContent {
    Directory(BTreeMap<Box<[u8]>, Child>),
    File(FileContent),
    Symlink(Box<[u8]>),
    CharacterDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

#[derive(Debug)]
struct Node {
    attributes: Attributes,
    content: NodeContent,
}

/// Why an entry could not be merged.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum MergeError {
    Entry(EntryProblem),
    TooManyNodes,
}

impl From<EntryProblem> for MergeError {
    fn from(problem: EntryProblem) -> Self {
        Self::Entry(problem)
    }
}

/// The merged tree.
pub(crate) struct Merged<'l> {
    nodes: Vec<Node>,
    limits: &'l Limits,
    /// The layer being applied.
    layer: u32,
    /// Directories whose attributes the current layer gave.
    described: HashSet<NodeId>,
}

fn implicit_directory() -> Attributes {
    Attributes {
        mode: 0o755,
        ..Attributes::default()
    }
}

impl<'l> Merged<'l> {
    pub(crate) fn new(limits: &'l Limits) -> Self {
        let root = Node {
            attributes: implicit_directory(),
            content: NodeContent::Directory(BTreeMap::new()),
        };
        Self {
            nodes: vec![root],
            limits,
            layer: 0,
            described: HashSet::new(),
        }
    }

    /// Starts the next layer.
    pub(crate) fn begin_layer(&mut self, layer: u32) {
        self.layer = layer;
        self.described.clear();
    }

    /// Applies one entry of the current layer.
    pub(crate) fn apply(&mut self, record: Record) -> Result<(), MergeError> {
        match record.name {
            Name::Entry(path) if path.is_empty() => {
                self.nodes[ROOT as usize].attributes = record.attributes;
                self.described.insert(ROOT);
                Ok(())
            }
            Name::Entry(path) => self.put(&path, record.attributes, record.item),
            Name::Whiteout(path) => self.whiteout(&path),
            Name::Opaque(path) => {
                if let Some(directory) = self.walk(&path, false)? {
                    self.prune(directory);
                }
                Ok(())
            }
            Name::Ignored => Ok(()),
        }
    }

    fn put(&mut self, path: &[u8], attributes: Attributes, item: Item) -> Result<(), MergeError> {
        let (parent_path, name) = path::split(path);
        // Walking with creation always ends in a directory.
        let Some(parent) = self.walk(parent_path, true)? else {
            return Err(EntryProblem::ParentNotDirectory.into());
        };
        let content = match item {
            Item::Directory => {
                let existing = self
                    .child(parent, name)
                    .filter(|child| self.directory(child.node).is_some());
                if let Some(existing) = existing {
                    self.nodes[existing.node as usize].attributes = attributes;
                    self.described.insert(existing.node);
                    self.set_child(parent, name, existing.node);
                    return Ok(());
                }
                NodeContent::Directory(BTreeMap::new())
            }
            Item::HardLink(target) => {
                let node = self.link_target(parent, name, &target)?;
                self.set_child(parent, name, node);
                return Ok(());
            }
            Item::File(content) => NodeContent::File(content),
            Item::Symlink(target) => NodeContent::Symlink(target),
            Item::CharacterDevice { major, minor } => NodeContent::CharacterDevice { major, minor },
            Item::BlockDevice { major, minor } => NodeContent::BlockDevice { major, minor },
            Item::Fifo => NodeContent::Fifo,
        };
        let node = self.add(Node { attributes, content })?;
        if self.directory(node).is_some() {
            self.described.insert(node);
        }
        self.set_child(parent, name, node);
        Ok(())
    }

    /// What a hard link names, once the place of the link itself is free.
    fn link_target(&mut self, parent: NodeId, name: &[u8], target: &[u8]) -> Result<NodeId, MergeError> {
        let missing = || EntryProblem::LinkTargetMissing(shorten(target));
        if target.is_empty() {
            return Err(EntryProblem::LinkTargetDirectory("/".into()).into());
        }
        let (target_parent, target_name) = path::split(target);
        let directory = self.walk(target_parent, false)?.ok_or_else(missing)?;
        if directory == parent && target_name == name {
            return Err(EntryProblem::LinkToItself.into());
        }
        self.directory_mut(parent).remove(name);
        // The target may have been below what the link replaces.
        let directory = self.walk(target_parent, false)?.ok_or_else(missing)?;
        let node = self.child(directory, target_name).ok_or_else(missing)?.node;
        if self.directory(node).is_some() {
            return Err(EntryProblem::LinkTargetDirectory(shorten(target)).into());
        }
        Ok(node)
    }

    fn whiteout(&mut self, path: &[u8]) -> Result<(), MergeError> {
        let (parent_path, name) = path::split(path);
        let Some(parent) = self.walk(parent_path, false)? else {
            return Ok(());
        };
        match self.child(parent, name) {
            Some(child) if child.layer != self.layer => {
                self.directory_mut(parent).remove(name);
            }
            Some(child) if self.directory(child.node).is_some() => {
                self.forget_attributes(child.node);
                self.prune(child.node);
            }
            _ => {}
        }
        Ok(())
    }

    /// Drops everything below a directory that the current layer did not bring.
    fn prune(&mut self, directory: NodeId) {
        let layer = self.layer;
        let mut waiting = vec![directory];
        while let Some(directory) = waiting.pop() {
            let children = self.directory_mut(directory);
            children.retain(|_, child| child.layer == layer);
            let kept: Vec<NodeId> = children.values().map(|child| child.node).collect();
            for node in kept {
                if self.directory(node).is_some() {
                    self.forget_attributes(node);
                    waiting.push(node);
                }
            }
        }
    }

    /// The attributes of a hidden directory do not shine through to one that the current layer only implies.
    fn forget_attributes(&mut self, directory: NodeId) {
        if !self.described.contains(&directory) {
            self.nodes[directory as usize].attributes = implicit_directory();
        }
    }

    /// Finds a directory, following symbolic links in the tree. With `create`, makes what is missing and marks
    /// the way as touched by this layer; otherwise `None` if there is no such directory.
    fn walk(&mut self, path: &[u8], create: bool) -> Result<Option<NodeId>, MergeError> {
        let mut way = vec![ROOT];
        let mut waiting: Vec<Box<[u8]>> = Vec::new();
        let mut direct = path.split(|byte| *byte == b'/');
        let mut symlinks = 0;
        let mut steps = 0;
        loop {
            let owned = waiting.pop();
            let Some(component) = owned.as_deref().or_else(|| direct.next()) else {
                return Ok(way.last().copied());
            };
            steps += 1;
            if steps > LONGEST_WALK {
                return Err(EntryProblem::TooManySymlinks.into());
            }
            match component {
                b"" | b"." => continue,
                b".." => {
                    way.truncate((way.len() - 1).max(1));
                    continue;
                }
                _ => {}
            }
            let current = way[way.len() - 1];
            let Some(child) = self.child(current, component) else {
                if !create {
                    return Ok(None);
                }
                if component.len() > self.limits.name_bytes {
                    return Err(EntryProblem::NameTooLong(self.limits.name_bytes).into());
                }
                if way.len() > self.limits.depth {
                    return Err(EntryProblem::TooDeep(self.limits.depth).into());
                }
                let content = NodeContent::Directory(BTreeMap::new());
                let node = self.add(Node {
                    attributes: implicit_directory(),
                    content,
                })?;
                self.set_child(current, component, node);
                way.push(node);
                continue;
            };
            match &self.nodes[child.node as usize].content {
                NodeContent::Directory(_) => {
                    if create && child.layer != self.layer {
                        self.set_child(current, component, child.node);
                    }
                    way.push(child.node);
                }
                NodeContent::Symlink(target) => {
                    symlinks += 1;
                    if symlinks > MOST_SYMLINKS || waiting.len() > LONGEST_WALK {
                        return Err(EntryProblem::TooManySymlinks.into());
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    waiting.extend(target.rsplit(|byte| *byte == b'/').map(Box::from));
                }
                _ if create => return Err(EntryProblem::ParentNotDirectory.into()),
                _ => return Ok(None),
            }
        }
    }

    fn add(&mut self, node: Node) -> Result<NodeId, MergeError> {
        // Directories without entries of their own count, too.
        match NodeId::try_from(self.nodes.len()) {
            Ok(id) if u64::from(id) <= self.limits.entries => {
                self.nodes.push(node);
                Ok(id)
            }
            _ => Err(MergeError::TooManyNodes),
        }
    }

    fn directory(&self, node: NodeId) -> Option<&BTreeMap<Box<[u8]>, Child>> {
        match &self.nodes[node as usize].content {
            NodeContent::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// The entries of a node known to be a directory.
    fn directory_mut(&mut self, node: NodeId) -> &mut BTreeMap<Box<[u8]>, Child> {
        match &mut self.nodes[node as usize].content {
            NodeContent::Directory(children) => children,
            _ => unreachable!("only directories are walked into"),
        }
    }

    fn child(&self, directory: NodeId, name: &[u8]) -> Option<Child> {
        self.directory(directory)?.get(name).copied()
    }

    fn set_child(&mut self, directory: NodeId, name: &[u8], node: NodeId) {
        let child = Child {
            node,
            layer: self.layer,
        };
        let children = self.directory_mut(directory);
        match children.get_mut(name) {
            Some(existing) => *existing = child,
            None => {
                children.insert(name.into(), child);
            }
        }
    }

    /// Files that can be reached and whose content is not in the image: layer, ordinal and node.
    pub(crate) fn missing_contents(&self) -> Vec<(u32, u32, NodeId)> {
        let mut missing = Vec::new();
        let mut seen = HashSet::new();
        let mut waiting = vec![ROOT];
        while let Some(node) = waiting.pop() {
            match &self.nodes[node as usize].content {
                NodeContent::Directory(children) => waiting.extend(children.values().map(|child| child.node)),
                NodeContent::File(FileContent::Skipped { layer, ordinal }) if seen.insert(node) => {
                    missing.push((*layer, *ordinal, node));
                }
                _ => {}
            }
        }
        missing.sort_unstable();
        missing
    }

    /// Gives a file its content.
    pub(crate) fn set_content(&mut self, node: NodeId, handle: FileHandle) {
        self.nodes[node as usize].content = NodeContent::File(FileContent::Written(handle));
    }
}

impl Tree for Merged<'_> {
    fn node_count(&self) -> usize {
        self.nodes.len()
    }

    fn root(&self) -> NodeId {
        ROOT
    }

    fn attributes(&self, node: NodeId) -> &Attributes {
        &self.nodes[node as usize].attributes
    }

    fn content(&self, node: NodeId) -> Content<'_> {
        match &self.nodes[node as usize].content {
            NodeContent::Directory(_) => Content::Directory,
            NodeContent::File(FileContent::Written(handle)) => Content::File(*handle),
            NodeContent::File(FileContent::Skipped { .. }) => {
                unreachable!("missing contents are fetched before the tree is written")
            }
            NodeContent::Symlink(target) => Content::Symlink(target),
            NodeContent::CharacterDevice { major, minor } => Content::CharacterDevice {
                major: *major,
                minor: *minor,
            },
            NodeContent::BlockDevice { major, minor } => Content::BlockDevice {
                major: *major,
                minor: *minor,
            },
            NodeContent::Fifo => Content::Fifo,
        }
    }

    fn children<'a>(&'a self, directory: NodeId, visit: &mut dyn FnMut(&'a [u8], NodeId)) {
        if let NodeContent::Directory(children) = &self.nodes[directory as usize].content {
            children.iter().for_each(|(name, child)| visit(name, child.node));
        }
    }
}
