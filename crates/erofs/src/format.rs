//! The on-disk structures of EROFS, encoded. All numbers are little-endian.

use crate::error::Error;
use crate::tree::Attributes;
use crate::{BLOCK_SIZE, MAXIMUM_DEVICE_MAJOR, MAXIMUM_DEVICE_MINOR};

pub(crate) const SUPERBLOCK_OFFSET: usize = 1024;
const SUPERBLOCK_SIZE: usize = 128;
const SUPERBLOCK_MAGIC: u32 = 0xE0F5_E1E2;

/// The compression configuration follows the superblock: a 16-bit length and 14 bytes for LZ4.
const COMPRESSION_CONFIG_SIZE: usize = 16;

/// First byte of block 0 that is free for the root inode, on an inode slot boundary.
pub(crate) const ROOT_OFFSET: usize =
    (SUPERBLOCK_OFFSET + SUPERBLOCK_SIZE + COMPRESSION_CONFIG_SIZE).next_multiple_of(SLOT);

/// Inodes lie on multiples of this many bytes; their number is the offset divided by it.
pub(crate) const SLOT: usize = 32;

const FEATURE_COMPAT_CHECKSUM: u32 = 0x1;
const FEATURE_COMPAT_MTIME: u32 = 0x2;

pub(crate) const FEATURE_ZERO_PADDING: u32 = 0x1;
pub(crate) const FEATURE_COMPRESSION_CONFIG_AND_BIG_PCLUSTER: u32 = 0x2;
pub(crate) const FEATURE_CHUNKED_FILE: u32 = 0x4;

/// How the data of an inode is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// Contiguous blocks.
    FlatPlain = 0,
    /// Compressed, one 8-byte index for each logical cluster.
    CompressedFull = 1,
    /// Contiguous blocks, the last partial block behind the inode.
    FlatInline = 2,
    /// A table of chunk addresses behind the inode.
    ChunkBased = 4,
}

/// `raw_blkaddr` of an inode without data blocks, and the address of a chunk that is a hole.
pub(crate) const NULL_ADDRESS: u32 = u32::MAX;

pub(crate) const TYPE_FIFO: u16 = 0o010_000;
pub(crate) const TYPE_CHARACTER_DEVICE: u16 = 0o020_000;
pub(crate) const TYPE_DIRECTORY: u16 = 0o040_000;
pub(crate) const TYPE_BLOCK_DEVICE: u16 = 0o060_000;
pub(crate) const TYPE_REGULAR: u16 = 0o100_000;
pub(crate) const TYPE_SYMLINK: u16 = 0o120_000;
pub(crate) const TYPE_SOCKET: u16 = 0o140_000;

/// A point in time as inodes record it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timestamp {
    pub(crate) seconds: i64,
    pub(crate) nanoseconds: u32,
}

/// Everything an inode says about itself, before it is encoded.
pub(crate) struct Inode<'a> {
    pub(crate) attributes: &'a Attributes,
    /// One of the `TYPE_` constants.
    pub(crate) file_type: u16,
    pub(crate) layout: Layout,
    pub(crate) size: u64,
    pub(crate) nlink: u32,
    /// Block address, device number, chunk format or compressed block count, by layout and type.
    pub(crate) union_word: u32,
    /// Number for `stat` in 32-bit programs.
    pub(crate) serial: u32,
    /// Encoded extended attributes.
    pub(crate) xattrs: &'a [u8],
}

impl Inode<'_> {
    /// Whether the 32-byte form can hold it; such an inode has the time of the superblock.
    pub(crate) fn is_compact(&self, build_time: Timestamp) -> bool {
        let attributes = self.attributes;
        attributes.uid <= u32::from(u16::MAX)
            && attributes.gid <= u32::from(u16::MAX)
            && self.nlink <= u32::from(u16::MAX)
            && self.size <= u64::from(u32::MAX)
            && Timestamp::of(attributes) == build_time
    }

    /// Bytes of the inode and its extended attributes.
    pub(crate) fn encoded_size(&self, build_time: Timestamp) -> usize {
        (if self.is_compact(build_time) { 32 } else { 64 }) + self.xattrs.len()
    }

    /// Appends the inode and its extended attributes.
    pub(crate) fn encode(&self, build_time: Timestamp, into: &mut Vec<u8>) {
        let compact = self.is_compact(build_time);
        let format = u16::from(!compact) | (self.layout as u16) << 1;
        let mode = self.file_type | (self.attributes.mode & 0o7777);
        into.extend(format.to_le_bytes());
        into.extend(xattr_count(self.xattrs.len()).to_le_bytes());
        into.extend(mode.to_le_bytes());
        if compact {
            into.extend((self.nlink as u16).to_le_bytes());
            into.extend((self.size as u32).to_le_bytes());
            into.extend([0; 4]);
            into.extend(self.union_word.to_le_bytes());
            into.extend(self.serial.to_le_bytes());
            into.extend((self.attributes.uid as u16).to_le_bytes());
            into.extend((self.attributes.gid as u16).to_le_bytes());
            into.extend([0; 4]);
        } else {
            into.extend([0; 2]);
            into.extend(self.size.to_le_bytes());
            into.extend(self.union_word.to_le_bytes());
            into.extend(self.serial.to_le_bytes());
            into.extend(self.attributes.uid.to_le_bytes());
            into.extend(self.attributes.gid.to_le_bytes());
            into.extend(self.attributes.mtime.to_le_bytes());
            into.extend(self.attributes.mtime_nanoseconds.to_le_bytes());
            into.extend(self.nlink.to_le_bytes());
            into.extend([0; 16]);
        }
        into.extend_from_slice(self.xattrs);
    }
}

impl Timestamp {
    pub(crate) fn of(attributes: &Attributes) -> Self {
        Self {
            seconds: attributes.mtime,
            nanoseconds: attributes.mtime_nanoseconds,
        }
    }
}

/// Offset of the link count within an inode and its width in bytes.
pub(crate) fn nlink_field(compact: bool) -> (u64, usize) {
    if compact { (6, 2) } else { (44, 4) }
}

/// The count of the inode header that stands for `size` bytes of encoded extended attributes.
fn xattr_count(size: usize) -> u16 {
    if size == 0 {
        0
    } else {
        ((size - XATTR_HEADER_SIZE) / 4 + 1) as u16
    }
}

/// Bytes before the first inline extended attribute.
pub(crate) const XATTR_HEADER_SIZE: usize = 12;

/// Most bytes of encoded extended attributes that the inode header can count.
pub(crate) const MAXIMUM_XATTR_BODY: usize = XATTR_HEADER_SIZE + (u16::MAX as usize - 1) * 4;

/// The kernel's encoding of a device number.
pub(crate) fn encode_device(major: u32, minor: u32) -> Result<u32, Error> {
    if major > MAXIMUM_DEVICE_MAJOR || minor > MAXIMUM_DEVICE_MINOR {
        return Err(Error::InvalidDevice { major, minor });
    }
    Ok((minor & 0xff) | (major << 8) | ((minor & !0xff) << 12))
}

/// What the superblock says.
pub(crate) struct Superblock {
    pub(crate) root_nid: u16,
    pub(crate) inodes: u64,
    pub(crate) build_time: Timestamp,
    pub(crate) blocks: u32,
    pub(crate) uuid: [u8; 16],
    pub(crate) features: u32,
    /// Largest physical cluster in blocks; zero in an uncompressed image.
    pub(crate) maximum_pcluster_blocks: u16,
}

impl Superblock {
    /// Writes the superblock into block 0, which already holds the root inode, and seals it with its checksum.
    pub(crate) fn seal(&self, block: &mut [u8; BLOCK_SIZE]) {
        let compressed = self.features & FEATURE_COMPRESSION_CONFIG_AND_BIG_PCLUSTER != 0;
        let mut bytes = Vec::with_capacity(SUPERBLOCK_SIZE + COMPRESSION_CONFIG_SIZE);
        bytes.extend(SUPERBLOCK_MAGIC.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend((FEATURE_COMPAT_CHECKSUM | FEATURE_COMPAT_MTIME).to_le_bytes());
        bytes.push(BLOCK_SIZE.trailing_zeros() as u8);
        bytes.push(0);
        bytes.extend(self.root_nid.to_le_bytes());
        bytes.extend(self.inodes.to_le_bytes());
        bytes.extend(self.build_time.seconds.to_le_bytes());
        bytes.extend(self.build_time.nanoseconds.to_le_bytes());
        bytes.extend(self.blocks.to_le_bytes());
        bytes.extend([0; 8]);
        bytes.extend(self.uuid);
        bytes.extend([0; 16]);
        bytes.extend(self.features.to_le_bytes());
        // Bitmap of algorithms: bit 0 is LZ4. Without a configuration record it is LZ4's window, zero by default.
        bytes.extend(u16::from(compressed).to_le_bytes());
        bytes.resize(SUPERBLOCK_SIZE, 0);
        if compressed {
            bytes.extend(14u16.to_le_bytes());
            bytes.extend(0u16.to_le_bytes());
            bytes.extend(self.maximum_pcluster_blocks.to_le_bytes());
            bytes.extend([0; 10]);
        }
        block[SUPERBLOCK_OFFSET..SUPERBLOCK_OFFSET + bytes.len()].copy_from_slice(&bytes);
        let checksum = crc32c(&block[SUPERBLOCK_OFFSET..]);
        block[SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
    }
}

/// CRC-32C as the superblock has it: all ones to begin with, no inversion at the end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_of_the_standard_check_string() {
        assert_eq!(!crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn device_numbers_are_encoded_like_the_kernel_does() {
        assert_eq!(encode_device(1, 3).unwrap(), 0x103);
        assert_eq!(encode_device(8, 0x1_2345).unwrap(), 0x1230_0845);
        assert!(encode_device(4096, 0).is_err());
        assert!(encode_device(0, 0x10_0000).is_err());
    }
}
