//! The 512-byte header block.

use super::super::error::EntryProblem;

pub(super) const BLOCK: usize = 512;

/// One header block whose checksum was right.
pub(super) struct Header<'a>(&'a [u8; BLOCK]);

/// Which extension of the first format a header follows.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dialect {
    /// Nothing behind the link name counts.
    V7,
    /// With a name prefix of 155 bytes.
    Ustar,
    /// With a name prefix of 131 bytes.
    Star,
    /// Without a name prefix.
    Gnu,
}

impl<'a> Header<'a> {
    /// Checks the checksum.
    pub(super) fn parse(block: &'a [u8; BLOCK]) -> Result<Self, EntryProblem> {
        let field = 148..156;
        let expected = number(&block[field.clone()], "checksum").map_err(|_| EntryProblem::Checksum)?;
        let spaces = field.len() as i64 * i64::from(b' ');
        let outside = || block[..148].iter().chain(&block[156..]);
        let unsigned = spaces + outside().map(|byte| i64::from(*byte)).sum::<i64>();
        // Some old archivers summed signed bytes.
        let signed = spaces + outside().map(|byte| i64::from(*byte as i8)).sum::<i64>();
        if expected != unsigned && expected != signed {
            return Err(EntryProblem::Checksum);
        }
        Ok(Self(block))
    }

    fn dialect(&self) -> Dialect {
        match (&self.0[257..263], &self.0[263..265], &self.0[508..512]) {
            (b"ustar\0", _, b"tar\0") => Dialect::Star,
            (b"ustar\0", _, _) => Dialect::Ustar,
            (b"ustar ", b" \0", _) => Dialect::Gnu,
            _ => Dialect::V7,
        }
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    /// The name with its prefix.
    pub(super) fn name(&self) -> Vec<u8> {
        let prefix = match self.dialect() {
            Dialect::Ustar => text(&self.0[345..500]),
            Dialect::Star => text(&self.0[345..476]),
            Dialect::Gnu | Dialect::V7 => b"",
        };
        let name = text(&self.0[..100]);
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    pub(super) fn link_name(&self) -> &'a [u8] {
        text(&self.0[157..257])
    }

    pub(super) fn size(&self) -> Result<u64, EntryProblem> {
        size(&self.0[124..136], "size")
    }

    pub(super) fn mode(&self) -> Result<u16, EntryProblem> {
        // Type bits that some archivers leave in are not wanted.
        number(&self.0[100..108], "mode").map(|mode| (mode & 0o7777) as u16)
    }

    pub(super) fn uid(&self) -> Result<u32, EntryProblem> {
        identity(number(&self.0[108..116], "uid")?, "uid")
    }

    pub(super) fn gid(&self) -> Result<u32, EntryProblem> {
        identity(number(&self.0[116..124], "gid")?, "gid")
    }

    pub(super) fn mtime(&self) -> Result<i64, EntryProblem> {
        number(&self.0[136..148], "mtime")
    }

    pub(super) fn device(&self) -> Result<(u64, u64), EntryProblem> {
        if self.dialect() == Dialect::V7 {
            return Ok((0, 0));
        }
        Ok((
            size(&self.0[329..337], "device number")?,
            size(&self.0[337..345], "device number")?,
        ))
    }

    /// The parts of GNU's first sparse format that the header itself has, whether more follow, and the full size.
    pub(super) fn old_sparse(&self) -> (&'a [u8], bool, Result<u64, EntryProblem>) {
        (
            &self.0[386..482],
            self.0[482] != 0,
            size(&self.0[483..495], "real size"),
        )
    }
}

/// A user or group id; -1 means "none" to the kernel and cannot be one.
pub(super) fn identity(value: i64, field: &'static str) -> Result<u32, EntryProblem> {
    u32::try_from(value)
        .ok()
        .filter(|id| *id != u32::MAX)
        .ok_or(EntryProblem::Number(field))
}

/// A number that cannot be negative.
pub(super) fn size(bytes: &[u8], field: &'static str) -> Result<u64, EntryProblem> {
    u64::try_from(number(bytes, field)?).map_err(|_| EntryProblem::Number(field))
}

/// Up to the first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number in octal digits, or in binary if the first bit is set; blank is zero.
pub(super) fn number(bytes: &[u8], field: &'static str) -> Result<i64, EntryProblem> {
    let invalid = EntryProblem::Number(field);
    if bytes[0] & 0x80 != 0 {
        let negative = bytes[0] & 0x40 != 0;
        // Bit 7 is the mark; bit 6 is the sign of a two's complement number.
        let mut value: i128 = if negative { -1 } else { 0 };
        for (index, byte) in bytes.iter().enumerate() {
            let byte = match (index, negative) {
                (0, false) => byte & 0x7f,
                _ => *byte,
            };
            value = value << 8 | i128::from(byte);
        }
        return i64::try_from(value).map_err(|_| invalid);
    }
    let is_blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = bytes
        .iter()
        .position(|byte| !is_blank(byte))
        .unwrap_or(bytes.len());
    let end = bytes
        .iter()
        .rposition(|byte| !is_blank(byte))
        .map_or(start, |last| last + 1);
    bytes[start..end].iter().try_fold(0i64, |value, byte| match byte {
        b'0'..=b'7' => Ok(value << 3 | i64::from(byte - b'0')),
        _ => Err(EntryProblem::Number(field)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_all_their_forms() {
        let parse = |bytes: &[u8]| number(bytes, "n");
        assert_eq!(parse(b"0000644\0"), Ok(0o644));
        assert_eq!(parse(b"   644 \0"), Ok(0o644));
        assert_eq!(parse(b"\0\0\0\0\0\0\0\0"), Ok(0));
        assert_eq!(parse(b"77777777777\0"), Ok(0o77777777777));
        assert_eq!(parse(b"\x80\0\0\0\0\0\0\0\0\0\x01\0"), Ok(256));
        assert_eq!(parse(b"\x80\0\0\0\0\x01\0\0"), Ok(65536));
        assert_eq!(parse(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xfe"), Ok(-2));
        for bad in [
            &b"0000648\0"[..],
            b"-1\0",
            b"12 34\0",
            b"0x10\0",
            b"\x80\x01\0\0\0\0\0\0\0\0\0\0",
        ] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert!(size(b"\xff\xff\xff\xff\xff\xff\xff\xff", "n").is_err());
        assert!(identity(-1, "uid").is_err() && identity(i64::from(u32::MAX), "uid").is_err());
        assert_eq!(identity(4_294_967_294, "uid"), Ok(4_294_967_294));
    }
}
