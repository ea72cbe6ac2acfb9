//! PAX extended headers: records `length key=value\n`.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};

use super::super::error::EntryProblem;
use super::super::limits::Limits;
use super::header::identity;
use super::sparse::Part;

/// What extended headers say; absent where they say nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
    /// Seconds and nanoseconds.
    pub(super) mtime: Option<(i64, u32)>,
    /// By full name. An empty value is a value, not an absence.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: Option<PaxSparse>,
}

/// The sparse file formats 0.0, 0.1 and 1.0 that live in extended headers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct PaxSparse {
    pub(super) version: Option<(u64, u64)>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// Parts of formats 0.0 and 0.1; those of 1.0 stand before the data.
    pub(super) parts: Vec<Part>,
    pub(super) announced_parts: Option<u64>,
    /// An offset of format 0.0 that waits for its length.
    pending_offset: Option<u64>,
}

const INVALID: fn(&'static str) -> EntryProblem = EntryProblem::ExtendedHeader;

impl Pax {
    /// Reads the records of one extended header over what is known already.
    pub(super) fn parse(&mut self, mut bytes: &[u8], limits: &Limits) -> Result<(), EntryProblem> {
        while !bytes.is_empty() {
            let space = bytes.iter().take(20).position(|byte| *byte == b' ');
            let space = space.ok_or(INVALID("a record has no length"))?;
            let length = decimal(&bytes[..space]).ok_or(INVALID("a record's length is not a number"))?;
            let length = usize::try_from(length)
                .ok()
                .filter(|length| *length <= bytes.len() && *length > space + 1);
            let length = length.ok_or(INVALID("a record's length is wrong"))?;
            let (record, rest) = bytes.split_at(length);
            let record = record[space + 1..]
                .strip_suffix(b"\n")
                .ok_or(INVALID("a record has no end"))?;
            let equals = record.iter().position(|byte| *byte == b'=').filter(|at| *at > 0);
            let equals = equals.ok_or(INVALID("a record has no key"))?;
            self.record(&record[..equals], &record[equals + 1..], limits)?;
            bytes = rest;
        }
        if self
            .sparse
            .as_ref()
            .is_some_and(|sparse| sparse.pending_offset.is_some())
        {
            return Err(EntryProblem::SparseMap("an offset has no length"));
        }
        Ok(())
    }

    /// Whether it says something that only one entry can have.
    pub(super) fn has_structure(&self) -> bool {
        self.path.is_some() || self.link_path.is_some() || self.size.is_some() || self.sparse.is_some()
    }

    fn record(&mut self, key: &[u8], value: &[u8], limits: &Limits) -> Result<(), EntryProblem> {
        if key.contains(&0) {
            return Err(INVALID("a key contains NUL"));
        }
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.insert(name.to_vec(), value.to_vec());
            return Ok(());
        }
        if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
            let name: Vec<u8> = percent_encoding::percent_decode(name).collect();
            let decoded = STANDARD.decode(value).or_else(|_| STANDARD_NO_PAD.decode(value));
            let decoded = decoded.map_err(|_| INVALID("an attribute is not valid base64"))?;
            // Writers that know both formats write both; that of star needs no decoding.
            self.xattrs.entry(name).or_insert(decoded);
            return Ok(());
        }
        if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
            return self.sparse.get_or_insert_default().record(key, value, limits);
        }
        // An empty value takes back what was said before.
        let present = !value.is_empty();
        match key {
            b"path" => self.path = present.then(|| no_nul(value)).transpose()?,
            b"linkpath" => self.link_path = present.then(|| no_nul(value)).transpose()?,
            b"size" => {
                let size = || decimal(value).ok_or(EntryProblem::Number("size"));
                self.size = present.then(size).transpose()?;
            }
            b"uid" => self.uid = present.then(|| id(value, "uid")).transpose()?,
            b"gid" => self.gid = present.then(|| id(value, "gid")).transpose()?,
            b"mtime" => {
                let mtime = || timestamp(value).ok_or(EntryProblem::Number("mtime"));
                self.mtime = present.then(mtime).transpose()?;
            }
            _ => {}
        }
        Ok(())
    }
}

impl PaxSparse {
    fn record(&mut self, key: &[u8], value: &[u8], limits: &Limits) -> Result<(), EntryProblem> {
        let wrong = EntryProblem::SparseMap("a number is malformed");
        let number = || decimal(value).ok_or(wrong);
        match key {
            b"major" => self.version = Some((number()?, self.version.map_or(0, |version| version.1))),
            b"minor" => self.version = Some((self.version.map_or(0, |version| version.0), number()?)),
            b"name" => self.name = Some(no_nul(value)?),
            b"size" | b"realsize" => self.real_size = Some(number()?),
            b"numblocks" => self.announced_parts = Some(number()?),
            b"offset" => {
                let offset = number()?;
                if self.pending_offset.replace(offset).is_some() {
                    return Err(EntryProblem::SparseMap("an offset has no length"));
                }
            }
            b"numbytes" => {
                let offset = self.pending_offset.take();
                let offset = offset.ok_or(EntryProblem::SparseMap("a length has no offset"))?;
                self.push(
                    Part {
                        offset,
                        length: number()?,
                    },
                    limits,
                )?;
            }
            b"map" => {
                self.parts.clear();
                let mut numbers = value.split(|byte| *byte == b',').filter(|_| !value.is_empty());
                while let Some(offset) = numbers.next() {
                    let length = numbers
                        .next()
                        .ok_or(EntryProblem::SparseMap("an offset has no length"))?;
                    let parse = |text| decimal(text).ok_or(EntryProblem::SparseMap("a number is malformed"));
                    self.push(
                        Part {
                            offset: parse(offset)?,
                            length: parse(length)?,
                        },
                        limits,
                    )?;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn push(&mut self, part: Part, limits: &Limits) -> Result<(), EntryProblem> {
        if self.parts.len() == limits.sparse_parts {
            return Err(EntryProblem::SparseMap("it has too many parts"));
        }
        self.parts.push(part);
        Ok(())
    }
}

fn no_nul(value: &[u8]) -> Result<Vec<u8>, EntryProblem> {
    if value.contains(&0) {
        Err(EntryProblem::Nul)
    } else {
        Ok(value.to_vec())
    }
}

fn id(value: &[u8], field: &'static str) -> Result<u32, EntryProblem> {
    let number = decimal(value).and_then(|number| i64::try_from(number).ok());
    identity(number.ok_or(EntryProblem::Number(field))?, field)
}

/// Digits and nothing else, up to what a file's size can be.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number: u64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    (number <= i64::MAX as u64).then_some(number)
}

/// Seconds with an optional sign and fraction; what is finer than a nanosecond is dropped.
fn timestamp(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let dot = text.iter().position(|byte| *byte == b'.');
    let (whole, fraction) = dot.map_or((text, &b""[..]), |dot| (&text[..dot], &text[dot + 1..]));
    let seconds = i64::try_from(decimal(whole)?).ok()?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let length = (1..)
            .map(|digits| body + digits)
            .find(|length| length.to_string().len() + body == *length)
            .unwrap();
        [
            length.to_string().as_bytes(),
            b" ",
            key.as_bytes(),
            b"=",
            value,
            b"\n",
        ]
        .concat()
    }

    fn parse(bytes: &[u8]) -> Result<Pax, EntryProblem> {
        let mut pax = Pax::default();
        pax.parse(bytes, &Limits::default()).map(|()| pax)
    }

    #[test]
    fn times_keep_nanoseconds_before_and_after_1970() {
        assert_eq!(
            timestamp(b"1700000000.123456789123"),
            Some((1_700_000_000, 123_456_789))
        );
        assert_eq!(timestamp(b"5"), Some((5, 0)));
        assert_eq!(timestamp(b"5."), Some((5, 0)));
        assert_eq!(timestamp(b"-1.5"), Some((-2, 500_000_000)));
        assert_eq!(timestamp(b"-0.000000001"), Some((-1, 999_999_999)));
        for bad in [
            "",
            "-",
            ".5",
            "1e9",
            "+5",
            "1.2.3",
            "1.-5",
            "99999999999999999999",
        ] {
            assert_eq!(timestamp(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn attributes_of_both_writers_are_read() {
        let bytes = [
            record("SCHILY.xattr.user.a", b"\0=\n"),
            record("LIBARCHIVE.xattr.user.b%25", b"AP8"),
            record("path", b"x"),
            record("path", b""),
        ]
        .concat();
        let pax = parse(&bytes).unwrap();
        assert_eq!(pax.xattrs[&b"user.a"[..]], b"\0=\n");
        assert_eq!(pax.xattrs[&b"user.b%"[..]], b"\0\xff");
        assert_eq!(pax.path, None);
    }

    #[test]
    fn malformed_records_are_refused() {
        let no_length = [b"x".repeat(30)].concat();
        for bad in [
            &b"5 a=b"[..],
            b"0 a=b\n",
            b"99 a=b\n",
            b"6 ab\n\n",
            b"a a=b\n",
            b"6 =ab\n",
            b" a=b\n",
            &no_length,
        ] {
            assert!(
                matches!(parse(bad), Err(EntryProblem::ExtendedHeader(_))),
                "{:?}",
                String::from_utf8_lossy(bad)
            );
        }
        assert_eq!(parse(&record("path", b"a\0b")), Err(EntryProblem::Nul));
        assert_eq!(parse(&record("size", b"-1")), Err(EntryProblem::Number("size")));
        assert_eq!(
            parse(&record("uid", b"4294967295")),
            Err(EntryProblem::Number("uid"))
        );
    }
}
