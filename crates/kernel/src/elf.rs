//! As much of ELF (64 bit, little endian) as is needed to judge a kernel and to read a module's own description.

/// Note type by which a kernel names its PVH entry.
const PVH_NOTE: u32 = 18;
const PROGRAM_NOTE: u32 = 4;

/// A 64-bit little-endian ELF file.
#[derive(Clone, Copy)]
pub(crate) struct Elf<'a> {
    bytes: &'a [u8],
}

impl<'a> Elf<'a> {
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        (bytes.starts_with(b"\x7fELF\x02\x01") && bytes.len() >= 64).then_some(Self { bytes })
    }

    /// True when a VMM can start it without firmware in between.
    pub(crate) fn has_pvh_entry(self) -> bool {
        self.table(32, 54, 56).any(|header| {
            number(header, 0, 4) == Some(u64::from(PROGRAM_NOTE))
                && self
                    .slice(number(header, 8, 8), number(header, 32, 8))
                    .is_some_and(names_pvh_entry)
        })
    }

    /// The content of a section.
    pub(crate) fn section(self, wanted: &str) -> Option<&'a [u8]> {
        let names_index = usize::try_from(number(self.bytes, 62, 2)?).ok()?;
        let content = |header: &[u8]| self.slice(number(header, 24, 8), number(header, 32, 8));
        let names = content(self.table(40, 58, 60).nth(names_index)?)?;
        let header = self.table(40, 58, 60).find(|header| {
            let start = number(header, 0, 4).and_then(|at| usize::try_from(at).ok());
            let name = start
                .and_then(|at| names.get(at..))
                .and_then(|rest| rest.split(|byte| *byte == 0).next());
            name == Some(wanted.as_bytes())
        })?;
        content(header)
    }

    /// Headers of a table whose offset, entry size and count stand at these places of the file header.
    fn table(self, offset_at: usize, size_at: usize, count_at: usize) -> impl Iterator<Item = &'a [u8]> {
        let offset = number(self.bytes, offset_at, 8).unwrap_or(0);
        let size = number(self.bytes, size_at, 2).unwrap_or(0);
        let count = number(self.bytes, count_at, 2).unwrap_or(0);
        (0..count).filter_map(move |index| self.slice(offset.checked_add(index * size), Some(size)))
    }

    fn slice(self, offset: Option<u64>, length: Option<u64>) -> Option<&'a [u8]> {
        let offset = usize::try_from(offset?).ok()?;
        let end = offset.checked_add(usize::try_from(length?).ok()?)?;
        self.bytes.get(offset..end)
    }
}

fn names_pvh_entry(mut notes: &[u8]) -> bool {
    let padded = |length: u64| usize::try_from(length.div_ceil(4) * 4).unwrap_or(usize::MAX);
    while let (Some(name), Some(description), Some(kind)) =
        (number(notes, 0, 4), number(notes, 4, 4), number(notes, 8, 4))
    {
        if kind == u64::from(PVH_NOTE) && notes.get(12..16) == Some(b"Xen\0") {
            return true;
        }
        let length = padded(name)
            .saturating_add(padded(description))
            .saturating_add(12);
        notes = notes.get(length..).unwrap_or_default();
    }
    false
}

fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(length)?)?;
    Some(
        field
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)),
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 58..400)) {
            let mut bytes = b"\x7fELF\x02\x01".to_vec();
            bytes.extend(noise);
            let elf = Elf::parse(&bytes).unwrap();
            elf.has_pvh_entry();
            elf.section(".modinfo");
        }
    }
}
