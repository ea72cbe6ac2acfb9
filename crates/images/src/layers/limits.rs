//! How much a conversion takes in.

/// Caps on what the layers of one image may be. The compressed size of a layer is capped by its descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Uncompressed bytes of all layers together.
    pub uncompressed_bytes: u64,
    /// Uncompressed bytes for each compressed byte, of all layers together beyond [`Limits::ratio_floor`].
    pub ratio: u64,
    /// Uncompressed bytes of all layers together below which the ratio is not looked at.
    pub ratio_floor: u64,
    /// Entries of all layers together, and directories made for want of an entry.
    pub entries: u64,
    /// Bytes of one file, holes included.
    pub entry_bytes: u64,
    /// Directories above an entry.
    pub depth: usize,
    /// Bytes of one component of a name; at most 255.
    pub name_bytes: usize,
    /// Bytes of a whole name.
    pub path_bytes: usize,
    /// Bytes of one extended header or long name.
    pub header_bytes: usize,
    /// Parts of one sparse file.
    pub sparse_parts: usize,
    /// Bytes of the value of one extended attribute; at most 65,535.
    pub xattr_bytes: usize,
    /// Bytes of the names and values of all extended attributes of one entry.
    pub xattrs_bytes: usize,
    /// Bytes of memory for names, targets and attributes of all entries.
    pub metadata_bytes: u64,
    /// Binary logarithm of the largest window of a zstd stream.
    pub zstd_window_log: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            uncompressed_bytes: 64 << 30,
            // Programs and texts stay below 20; zeros reach 1032 with deflate, and far more with zstd. A file of zeros
            // among others is welcome, an image of little else is not.
            ratio: 200,
            // Zeros cost only the time to read them: some go into the smallest image.
            ratio_floor: 2 << 30,
            entries: 2_000_000,
            entry_bytes: 1 << 40,
            depth: 256,
            name_bytes: 255,
            path_bytes: 4096,
            header_bytes: 1 << 20,
            sparse_parts: 1 << 18,
            xattr_bytes: 65_535,
            xattrs_bytes: 128 << 10,
            metadata_bytes: 512 << 20,
            zstd_window_log: 26,
        }
    }
}
