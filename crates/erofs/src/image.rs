//! The end of an image: directories, special files, link counts, superblock.
//!
//! Three walks over the directories in one order, that of their names from the root down:
//! 1. find all nodes, count names, take a place for each directory;
//! 2. write what is neither a directory nor a file, and the link counts of files;
//! 3. write the directories, whose entries now all have numbers.

use crate::builder::{Builder, Compression};
use crate::directory::{self, Entry, EntryType};
use crate::error::Error;
use crate::extents::LARGEST_CLUSTER;
use crate::format::{
    self, FEATURE_COMPRESSION_CONFIG_AND_BIG_PCLUSTER, FEATURE_ZERO_PADDING, Inode, Layout, NULL_ADDRESS,
    ROOT_OFFSET, SLOT, Superblock,
};
use crate::tree::{Content, NodeId, Tree};
use crate::{BLOCK_SIZE, MAXIMUM_NAME, MAXIMUM_SYMLINK, xattr};

/// What an image came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Length of the image file in bytes, a multiple of the block size.
    pub size_bytes: u64,
    /// Inodes that can be reached from the root.
    pub inodes: u64,
}

struct Directory {
    node: NodeId,
    parent: NodeId,
    inode_offset: u64,
    first_block: u32,
    size: u64,
    nlink: u32,
    layout: Layout,
    serial: u32,
}

/// What the walks share.
struct Plan {
    directories: Vec<Directory>,
    /// By node: offset of the inode; zero while it has none.
    offsets: Vec<u64>,
    /// By node: how many names lead to it.
    names: Vec<u32>,
}

impl Builder<'_> {
    /// Writes the tree and ends the image. Files that the tree does not name are dropped and their blocks given
    /// back to the host's file system where it can take them. The file is not synced.
    ///
    /// # Errors
    /// When the tree is malformed or has something the format cannot hold, or the output cannot be written.
    pub fn finish(mut self, tree: &impl Tree) -> Result<Summary, Error> {
        let nodes = tree.node_count();
        let mut plan = Plan {
            directories: Vec::new(),
            offsets: vec![0; nodes],
            names: vec![0; nodes],
        };
        let mut first_block = Box::new([0; BLOCK_SIZE]);
        self.lay_out_directories(tree, &mut plan)?;
        let mut inodes = plan.directories.len() as u64;
        inodes += self.write_others(tree, &mut plan)?;
        self.write_directories(tree, &plan, &mut first_block)?;
        self.metadata.finish(&mut self.output)?;
        self.output.align()?;

        let mut features = self.features;
        if self.options.compression == Compression::Lz4 {
            features |= FEATURE_ZERO_PADDING | FEATURE_COMPRESSION_CONFIG_AND_BIG_PCLUSTER;
        }
        let build_time = self.build_time_or(tree.attributes(tree.root()));
        let superblock = Superblock {
            root_nid: (ROOT_OFFSET / SLOT) as u16,
            inodes,
            build_time,
            blocks: self.output.block()?,
            uuid: self.options.uuid,
            features,
            maximum_pcluster_blocks: LARGEST_CLUSTER,
        };
        superblock.seal(&mut first_block);
        self.output.write_at(&first_block[..], 0)?;
        self.output.finish()?;
        Ok(Summary {
            size_bytes: self.output.position(),
            inodes,
        })
    }

    fn lay_out_directories(&mut self, tree: &impl Tree, plan: &mut Plan) -> Result<(), Error> {
        let root = tree.root();
        if !matches!(tree.content(root), Content::Directory) {
            return Err(Error::MalformedTree("the root is not a directory"));
        }
        let mut waiting = vec![(root, root)];
        while let Some((node, parent)) = waiting.pop() {
            if plan.offsets[node as usize] != 0 {
                return Err(Error::MalformedTree("a directory has two parents"));
            }
            let children = sorted_children(tree, node)?;
            let mut nlink = 2;
            for (_, child) in children.iter().rev() {
                if matches!(tree.content(*child), Content::Directory) {
                    nlink += 1;
                    waiting.push((*child, node));
                } else {
                    plan.names[*child as usize] += 1;
                }
            }
            let size = directory::size(with_dots(&children, node, parent).map(|(name, _)| name.len()));
            let directory = self.reserve_directory(tree, node, parent, size, nlink)?;
            plan.offsets[node as usize] = directory.inode_offset;
            plan.directories.push(directory);
        }
        Ok(())
    }

    fn reserve_directory(
        &mut self,
        tree: &impl Tree,
        node: NodeId,
        parent: NodeId,
        size: u64,
        nlink: u32,
    ) -> Result<Directory, Error> {
        let attributes = tree.attributes(node);
        let xattrs = xattr::encode(&attributes.xattrs)?;
        let build_time = self.build_time_or(attributes);
        let mut directory = Directory {
            node,
            parent,
            inode_offset: 0,
            first_block: NULL_ADDRESS,
            size,
            nlink,
            layout: Layout::FlatPlain,
            serial: self.take_serial(),
        };
        let inode_size = directory.inode(tree, &xattrs).encoded_size(build_time);
        let tail = (size % BLOCK_SIZE as u64) as usize;
        let is_root = node == tree.root();
        let room = if is_root {
            BLOCK_SIZE - ROOT_OFFSET
        } else {
            BLOCK_SIZE
        };
        let inline = tail > 0 && inode_size + tail <= room;
        if inline {
            directory.layout = Layout::FlatInline;
        }
        let data_blocks = if inline {
            size / BLOCK_SIZE as u64
        } else {
            size.div_ceil(BLOCK_SIZE as u64)
        };
        if data_blocks > 0 {
            directory.first_block = self.output.block()?;
            self.output.skip(data_blocks * BLOCK_SIZE as u64)?;
        }
        let unit = inode_size + if inline { tail } else { 0 };
        directory.inode_offset = if is_root {
            if unit > room {
                return Err(Error::RootXattrsTooLarge(xattrs.len()));
            }
            ROOT_OFFSET as u64
        } else if unit <= BLOCK_SIZE {
            self.metadata.reserve(&mut self.output, unit)?
        } else {
            let offset = self.output.position();
            self.output.skip(unit as u64)?;
            self.output.align()?;
            offset
        };
        Ok(directory)
    }

    /// Returns how many inodes are not directories.
    fn write_others(&mut self, tree: &impl Tree, plan: &mut Plan) -> Result<u64, Error> {
        let mut count = 0;
        let mut named = vec![false; self.files.len()];
        let mut children = Vec::new();
        for index in 0..plan.directories.len() {
            children.clear();
            tree.children(plan.directories[index].node, &mut |name, child| {
                children.push((name, child))
            });
            children.sort_unstable();
            for (_, child) in &children {
                let content = tree.content(*child);
                if matches!(content, Content::Directory) || plan.offsets[*child as usize] != 0 {
                    continue;
                }
                count += 1;
                let nlink = plan.names[*child as usize];
                plan.offsets[*child as usize] = match content {
                    Content::File(handle) => {
                        let index = handle.0 as usize;
                        if index >= named.len() || std::mem::replace(&mut named[index], true) {
                            return Err(Error::MalformedTree("a written file belongs to no or two nodes"));
                        }
                        if nlink > 1 {
                            self.set_link_count(handle, nlink)?;
                        }
                        self.files[index].inode_offset
                    }
                    _ => self.write_special(tree, *child, nlink)?,
                };
            }
        }
        for (file, named) in self.files.iter().zip(named) {
            if !named && file.blocks > 0 {
                let block_size = BLOCK_SIZE as u64;
                let (offset, length) = (u64::from(file.first_block), u64::from(file.blocks));
                self.output.discard(offset * block_size, length * block_size)?;
            }
        }
        Ok(count)
    }

    /// Writes a symbolic link, device, pipe or socket.
    fn write_special(&mut self, tree: &impl Tree, node: NodeId, nlink: u32) -> Result<u64, Error> {
        let attributes = tree.attributes(node);
        let xattrs = xattr::encode(&attributes.xattrs)?;
        let build_time = self.build_time_or(attributes);
        let (file_type, union_word, target) = match tree.content(node) {
            Content::Symlink(target) => (format::TYPE_SYMLINK, NULL_ADDRESS, target),
            Content::CharacterDevice { major, minor } => (
                format::TYPE_CHARACTER_DEVICE,
                format::encode_device(major, minor)?,
                &[][..],
            ),
            Content::BlockDevice { major, minor } => (
                format::TYPE_BLOCK_DEVICE,
                format::encode_device(major, minor)?,
                &[][..],
            ),
            Content::Socket => (format::TYPE_SOCKET, 0, &[][..]),
            _ => (format::TYPE_FIFO, 0, &[][..]),
        };
        if file_type == format::TYPE_SYMLINK
            && (target.is_empty() || target.len() > MAXIMUM_SYMLINK || target.contains(&0))
        {
            return Err(Error::InvalidSymlink);
        }
        let mut inode = Inode {
            attributes,
            file_type,
            layout: Layout::FlatPlain,
            size: target.len() as u64,
            nlink,
            union_word,
            serial: self.take_serial(),
            xattrs: &xattrs,
        };
        let inline = !target.is_empty() && inode.encoded_size(build_time) + target.len() <= BLOCK_SIZE;
        if inline {
            inode.layout = Layout::FlatInline;
        } else if !target.is_empty() {
            inode.union_word = self.output.block()?;
            self.output.append(target)?;
            self.output.align()?;
        }
        let mut unit = Vec::with_capacity(256);
        inode.encode(build_time, &mut unit);
        if inline {
            unit.extend_from_slice(target);
        }
        let offset = self.place_unit(&unit)?;
        self.output.align()?;
        Ok(offset)
    }

    fn write_directories(
        &mut self,
        tree: &impl Tree,
        plan: &Plan,
        first_block: &mut [u8; BLOCK_SIZE],
    ) -> Result<(), Error> {
        let mut bytes = Vec::new();
        let mut unit = Vec::new();
        for directory in &plan.directories {
            let children = sorted_children(tree, directory.node)?;
            let entries: Vec<Entry<'_>> = with_dots(&children, directory.node, directory.parent)
                .map(|(name, node)| Entry {
                    name,
                    nid: plan.offsets[node as usize] / SLOT as u64,
                    entry_type: entry_type(tree.content(node)),
                })
                .collect();
            bytes.clear();
            directory::encode(&entries, &mut bytes);
            let xattrs = xattr::encode(&tree.attributes(directory.node).xattrs)?;
            let build_time = self.build_time_or(tree.attributes(directory.node));
            unit.clear();
            directory.inode(tree, &xattrs).encode(build_time, &mut unit);
            let in_blocks = match directory.layout {
                Layout::FlatInline => bytes.len() - bytes.len() % BLOCK_SIZE,
                _ => bytes.len(),
            };
            if in_blocks > 0 {
                let offset = u64::from(directory.first_block) * BLOCK_SIZE as u64;
                self.output.write_at(&bytes[..in_blocks], offset)?;
            }
            unit.extend_from_slice(&bytes[in_blocks..]);
            if directory.inode_offset < BLOCK_SIZE as u64 {
                first_block[ROOT_OFFSET..ROOT_OFFSET + unit.len()].copy_from_slice(&unit);
            } else {
                self.metadata
                    .write_at(&mut self.output, &unit, directory.inode_offset)?;
            }
        }
        Ok(())
    }
}

impl Directory {
    fn inode<'t>(&self, tree: &'t impl Tree, xattrs: &'t [u8]) -> Inode<'t> {
        Inode {
            attributes: tree.attributes(self.node),
            file_type: format::TYPE_DIRECTORY,
            layout: self.layout,
            size: self.size,
            nlink: self.nlink,
            union_word: self.first_block,
            serial: self.serial,
            xattrs,
        }
    }
}

fn sorted_children(tree: &impl Tree, directory: NodeId) -> Result<Vec<(&[u8], NodeId)>, Error> {
    let mut children = Vec::new();
    tree.children(directory, &mut |name, child| children.push((name, child)));
    children.sort_unstable();
    let invalid = |name: &[u8]| {
        name.is_empty()
            || name.len() > MAXIMUM_NAME
            || name == b"."
            || name == b".."
            || name.iter().any(|byte| matches!(byte, 0 | b'/'))
    };
    if children.iter().any(|(name, _)| invalid(name)) {
        return Err(Error::InvalidName);
    }
    if !children.is_sorted_by(|(one, _), (other, _)| one < other) {
        return Err(Error::MalformedTree("a directory has the same name twice"));
    }
    Ok(children)
}

/// The entries of a directory with `.` and `..` in their places.
fn with_dots<'c, 't>(
    children: &'c [(&'t [u8], NodeId)],
    directory: NodeId,
    parent: NodeId,
) -> impl Iterator<Item = (&'t [u8], NodeId)> + use<'c, 't> {
    let dots: [(&[u8], NodeId); 2] = [(b".", directory), (b"..", parent)];
    let before_one = children.partition_point(|(name, _)| *name < &b"."[..]);
    let before_two = children.partition_point(|(name, _)| *name < &b".."[..]);
    let slices = [
        &children[..before_one],
        &children[before_one..before_two],
        &children[before_two..],
    ];
    let [first, second, third] = slices.map(|slice| slice.iter().copied());
    first.chain([dots[0]]).chain(second).chain([dots[1]]).chain(third)
}

fn entry_type(content: Content<'_>) -> EntryType {
    match content {
        Content::Directory => EntryType::Directory,
        Content::File(_) => EntryType::Regular,
        Content::Symlink(_) => EntryType::Symlink,
        Content::CharacterDevice { .. } => EntryType::CharacterDevice,
        Content::BlockDevice { .. } => EntryType::BlockDevice,
        Content::Fifo => EntryType::Fifo,
        Content::Socket => EntryType::Socket,
    }
}
