//! Why a conversion failed: always which layer, which entry, and what about it.

use std::io;

/// Why layers could not be turned into a root disk.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The observer asked to stop.
    #[error("the conversion was cancelled")]
    Cancelled,
    /// The compressed bytes of a layer could not be read from where they are kept.
    #[error("layer {layer} could not be read: {source}")]
    Source {
        /// Index of the layer, the bottom one being 0.
        layer: usize,
        /// What the reader said.
        source: io::Error,
    },
    /// A layer as a whole is not acceptable.
    #[error("layer {layer} is not acceptable: {problem}")]
    Layer {
        /// Index of the layer, the bottom one being 0.
        layer: usize,
        /// What is wrong with it.
        problem: LayerProblem,
    },
    /// One entry of a layer is not acceptable.
    #[error("layer {layer}, entry {entry:?}: {problem}")]
    Entry {
        /// Index of the layer, the bottom one being 0.
        layer: usize,
        /// Name of the entry as the archive tells it, shortened; bytes that are not UTF-8 are replaced.
        entry: String,
        /// What is wrong with it.
        problem: EntryProblem,
    },
    /// The root disk could not be written; a full disk arrives here as `StorageFull`.
    #[error("the root disk could not be written: {0}")]
    Output(#[source] io::Error),
    /// The merged tree is something the root disk's format cannot hold.
    #[error("the root disk cannot hold this image: {0}")]
    Image(#[source] hypeman_erofs::Error),
}

impl ConvertError {
    /// Whether the image is to blame, so that trying again cannot help.
    pub fn is_permanent(&self) -> bool {
        matches!(self, Self::Layer { .. } | Self::Entry { .. } | Self::Image(_))
    }
}

impl From<hypeman_erofs::Error> for ConvertError {
    fn from(error: hypeman_erofs::Error) -> Self {
        match error {
            hypeman_erofs::Error::Output(error) => Self::Output(error),
            other => Self::Image(other),
        }
    }
}

/// What can be wrong with a layer as a whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayerProblem {
    /// The media type is not that of a layer.
    #[error("media type {0:?} is not a layer this server can read")]
    MediaType(String),
    /// The stream begins like a compression that is not supported.
    #[error("{0} compression is not supported (gzip, zstd and none are)")]
    Compression(&'static str),
    /// A digest is not of the form `sha256:` and 64 hexadecimal digits.
    #[error("digest {0:?} is not a sha256 digest")]
    DigestForm(String),
    /// The compressed bytes are not those announced.
    #[error("the compressed layer has digest {actual}, not {expected}")]
    Digest {
        /// Digest of the descriptor.
        expected: String,
        /// Digest of what was read.
        actual: String,
    },
    /// The uncompressed bytes are not those announced.
    #[error("the uncompressed layer has digest {actual}, not {expected}")]
    DiffId {
        /// Digest of the image configuration.
        expected: String,
        /// Digest of what was read.
        actual: String,
    },
    /// The compressed stream has another length than its descriptor says.
    #[error("the compressed layer is {} than the {announced} bytes announced", if *.longer { "longer" } else { "shorter" })]
    Size {
        /// Bytes according to the descriptor.
        announced: u64,
        /// Whether there were more.
        longer: bool,
    },
    /// The decompressor refused the stream.
    #[error("the compressed stream is corrupt: {0}")]
    Corrupt(String),
    /// The stream ends in the middle.
    #[error("the stream ends in the middle")]
    Truncated,
    /// Something other than zeros follows the end of the archive.
    #[error("data follows the end of the archive")]
    TrailingData,
    /// The layers are larger than allowed when uncompressed.
    #[error("the uncompressed layers are larger than {limit} bytes")]
    TooManyBytes {
        /// The limit in bytes.
        limit: u64,
    },
    /// The layers grow more than allowed when uncompressed.
    #[error("the layers expand more than {limit} times")]
    Ratio {
        /// The limit.
        limit: u64,
    },
    /// The layers have more entries than allowed.
    #[error("the layers have more than {limit} entries")]
    TooManyEntries {
        /// The limit.
        limit: u64,
    },
    /// Names, link targets and attributes together take more memory than allowed.
    #[error("names and attributes take more than {limit} bytes")]
    TooMuchMetadata {
        /// The limit in bytes.
        limit: u64,
    },
    /// The second reading of a layer gave something else than the first.
    #[error("the layer changed while it was read")]
    Changed,
}

/// What can be wrong with one entry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryProblem {
    /// The header block's checksum does not match; not a tar archive, or a lying size before it.
    #[error("the header's checksum is wrong (not a tar archive, or a wrong size before this point)")]
    Checksum,
    /// A number in the header is malformed or out of range.
    #[error("the field {0} is not a valid number")]
    Number(&'static str),
    /// An extended header is malformed.
    #[error("the extended header is not valid: {0}")]
    ExtendedHeader(&'static str),
    /// A sparse map is malformed, or does not match the data.
    #[error("the sparse map is not valid: {0}")]
    SparseMap(&'static str),
    /// The entry's type is not one that a layer can have.
    #[error("entries of type {0:?} are not supported")]
    Type(char),
    /// The stream ends within the entry.
    #[error("the archive ends within this entry")]
    Truncated,
    /// A name contains `..`.
    #[error("the name contains \"..\"")]
    ParentComponent,
    /// A name contains a NUL byte.
    #[error("a name contains a NUL byte")]
    Nul,
    /// The entry has no name.
    #[error("the entry has no name")]
    Unnamed,
    /// A component of a name is too long.
    #[error("a component of the name is longer than {0} bytes")]
    NameTooLong(usize),
    /// A whole name is too long.
    #[error("the name is longer than {0} bytes")]
    PathTooLong(usize),
    /// The entry is too deep in the tree.
    #[error("the entry is more than {0} directories deep")]
    TooDeep(usize),
    /// The root is given as something other than a directory.
    #[error("the root directory cannot be replaced")]
    ReplacesRoot,
    /// A name with the prefix of whiteouts means nothing here.
    #[error("the name is reserved for whiteouts")]
    ReservedName,
    /// The entry is larger than allowed.
    #[error("the entry is larger than {0} bytes")]
    TooLarge(u64),
    /// A directory on the way to the entry is something else.
    #[error("a parent of the entry is not a directory")]
    ParentNotDirectory,
    /// The symbolic links on the way to the entry do not end.
    #[error("there are too many symbolic links on the way to the entry")]
    TooManySymlinks,
    /// The target of a hard link does not exist.
    #[error("the hard link's target {0:?} does not exist in the image")]
    LinkTargetMissing(String),
    /// The target of a hard link is a directory.
    #[error("the hard link's target {0:?} is a directory")]
    LinkTargetDirectory(String),
    /// A hard link to itself.
    #[error("the hard link's target is the link itself")]
    LinkToItself,
    /// The target of a link is empty or too long.
    #[error("the target of the link is empty or too long")]
    LinkTarget,
    /// A device number is beyond what Linux can represent.
    #[error("device number {0}:{1} is out of range")]
    Device(u64, u64),
    /// Extended attributes are too large or too many.
    #[error("the extended attribute {0:?} is too large, or all of the entry together are")]
    XattrTooLarge(String),
    /// An access control list is malformed.
    #[error("the access control list in {0:?} is malformed")]
    AccessControlList(String),
}
