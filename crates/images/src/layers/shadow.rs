//! Which contents of lower layers upper layers certainly hide, known while reading from the top down.
//!
//! It is advice, not truth: paths are compared as text, so links among parents are not seen, and only hashes are
//! kept. A content that is skipped by mistake is fetched by a second reading of its layer; one that is written
//! in vain is dropped at the end. The truth is the merge, from the bottom up (`merge`).

use std::collections::HashSet;

use super::path::Name;

/// FNV-1a: it grows along a path, so that all its prefixes cost one pass.
const HASH_START: u64 = 0xcbf2_9ce4_8422_2325;

fn grow(hash: u64, byte: u8) -> u64 {
    (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
}

fn hash(path: &[u8]) -> u64 {
    path.iter().fold(HASH_START, |hash, byte| grow(hash, *byte))
}

/// What the layers read so far hide.
#[derive(Default)]
pub(crate) struct Shadows {
    /// Paths where a file of a lower layer cannot be seen.
    at: HashSet<u64>,
    /// Paths below which nothing of a lower layer can be seen.
    below: HashSet<u64>,
}

impl Shadows {
    /// Adds what an entry hides in lower layers. Only to be called when its layer has been read to the end.
    pub(crate) fn add(&mut self, name: &Name, is_directory: bool) {
        match name {
            Name::Entry(path) => {
                self.at.insert(hash(path));
                if !is_directory {
                    self.below.insert(hash(path));
                }
            }
            Name::Whiteout(path) => {
                self.at.insert(hash(path));
                self.below.insert(hash(path));
            }
            Name::Opaque(path) => {
                self.below.insert(hash(path));
            }
            Name::Ignored => {}
        }
    }

    /// Whether a file at this path is hidden.
    pub(crate) fn hide(&self, path: &[u8]) -> bool {
        let mut current = HASH_START;
        if self.below.contains(&current) {
            return true;
        }
        for byte in path {
            if *byte == b'/' && self.below.contains(&current) {
                return true;
            }
            current = grow(current, *byte);
        }
        self.at.contains(&current)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_whiteouts_and_opaque_directories_hide_what_they_should() {
        let mut shadows = Shadows::default();
        shadows.add(&Name::Entry(b"a/file".to_vec()), false);
        shadows.add(&Name::Entry(b"a/dir".to_vec()), true);
        shadows.add(&Name::Whiteout(b"gone".to_vec()), false);
        shadows.add(&Name::Opaque(b"opaque".to_vec()), false);
        for hidden in ["a/file", "a/file/x", "a/dir", "gone", "gone/x/y", "opaque/x"] {
            assert!(shadows.hide(hidden.as_bytes()), "{hidden}");
        }
        for seen in ["a", "a/dir/x", "opaque", "gone2", "a/fil", "b"] {
            assert!(!shadows.hide(seen.as_bytes()), "{seen}");
        }
        shadows.add(&Name::Opaque(Vec::new()), false);
        assert!(shadows.hide(b"anything"));
    }
}
