//! Directories: sorted entries in blocks, each block a table of fixed entries followed by their names.

use crate::BLOCK_SIZE;

const ENTRY_SIZE: usize = 12;

/// The type of a node as a directory entry tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum EntryType {
    Regular = 1,
    Directory = 2,
    CharacterDevice = 3,
    BlockDevice = 4,
    Fifo = 5,
    Socket = 6,
    Symlink = 7,
}

/// One name in a directory.
pub(crate) struct Entry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) nid: u64,
    pub(crate) entry_type: EntryType,
}

/// Size in bytes of a directory with these names, given in order.
pub(crate) fn size(names: impl Iterator<Item = usize>) -> u64 {
    let mut full = 0;
    let mut used = 0;
    for name in names {
        let entry = ENTRY_SIZE + name;
        if used + entry > BLOCK_SIZE {
            full += BLOCK_SIZE as u64;
            used = 0;
        }
        used += entry;
    }
    full + used as u64
}

/// The content of a directory; the entries are in the byte order of their names.
pub(crate) fn encode(entries: &[Entry<'_>], into: &mut Vec<u8>) {
    let mut rest = entries;
    while !rest.is_empty() {
        into.resize(into.len().next_multiple_of(BLOCK_SIZE), 0);
        let mut used = 0;
        let fitting = rest
            .iter()
            .take_while(|entry| {
                used += ENTRY_SIZE + entry.name.len();
                used <= BLOCK_SIZE
            })
            .count();
        let (block, later) = rest.split_at(fitting);
        let mut name_offset = block.len() * ENTRY_SIZE;
        for entry in block {
            into.extend(entry.nid.to_le_bytes());
            into.extend((name_offset as u16).to_le_bytes());
            into.push(entry.entry_type as u8);
            into.push(0);
            name_offset += entry.name.len();
        }
        for entry in block {
            into.extend_from_slice(entry.name);
        }
        rest = later;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_that_of_the_encoding() {
        for count in [0, 1, 2, 200, 271, 272, 273, 5000] {
            let names: Vec<String> = (0..count)
                .map(|number| format!("{number:0width$}", width = 1 + number % 200))
                .collect();
            let entries: Vec<Entry<'_>> = names
                .iter()
                .map(|name| Entry {
                    name: name.as_bytes(),
                    nid: 7,
                    entry_type: EntryType::Regular,
                })
                .collect();
            let mut bytes = Vec::new();
            encode(&entries, &mut bytes);
            assert_eq!(
                bytes.len() as u64,
                size(names.iter().map(String::len)),
                "{count} entries"
            );
        }
    }
}
