//! Extended attributes, encoded behind their inode.
//!
//! The format stores the namespace as a number; only the five that Linux itself has can be told.

use crate::error::Error;
use crate::format::{MAXIMUM_XATTR_BODY, XATTR_HEADER_SIZE};
use crate::tree::Xattr;

/// Longest name behind the namespace, in bytes.
pub const MAXIMUM_XATTR_NAME: usize = 255;

/// Largest value in bytes.
pub const MAXIMUM_XATTR_VALUE: usize = u16::MAX as usize;

const PREFIXES: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];

/// The number of the namespace and the rest of the name.
fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => Some((2, b"")),
        b"system.posix_acl_default" => Some((3, b"")),
        _ => PREFIXES.iter().find_map(|(prefix, index)| {
            let rest = name.strip_prefix(*prefix)?;
            (!rest.is_empty() && rest.len() <= MAXIMUM_XATTR_NAME && !rest.contains(&0))
                .then_some((*index, rest))
        }),
    }
}

/// Whether the format has a place for an attribute of this full name.
pub fn is_supported_xattr(name: &[u8]) -> bool {
    split(name).is_some()
}

/// The attributes of one inode, in the order of their names; empty if there are none.
pub(crate) fn encode(xattrs: &[Xattr]) -> Result<Vec<u8>, Error> {
    if xattrs.is_empty() {
        return Ok(Vec::new());
    }
    let mut sorted: Vec<&Xattr> = xattrs.iter().collect();
    sorted.sort();
    let mut body = vec![0; XATTR_HEADER_SIZE];
    for xattr in sorted {
        let invalid = || Error::InvalidXattr(String::from_utf8_lossy(&xattr.name).into_owned());
        let (index, name) = split(&xattr.name).ok_or_else(invalid)?;
        let size = u16::try_from(xattr.value.len()).map_err(|_| invalid())?;
        body.push(name.len() as u8);
        body.push(index);
        body.extend(size.to_le_bytes());
        body.extend_from_slice(name);
        body.extend_from_slice(&xattr.value);
        body.resize(body.len().next_multiple_of(4), 0);
    }
    if body.len() > MAXIMUM_XATTR_BODY {
        return Err(Error::XattrsTooLarge(body.len()));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_that_linux_has_are_known_and_others_are_not() {
        for name in [
            &b"user.a"[..],
            b"trusted.x",
            b"security.capability",
            b"system.posix_acl_access",
        ] {
            assert!(is_supported_xattr(name), "{}", String::from_utf8_lossy(name));
        }
        for name in [
            &b"com.apple.provenance"[..],
            b"user.",
            b"system.nfs4_acl",
            b"",
            b"user.a\0b",
        ] {
            assert!(!is_supported_xattr(name), "{}", String::from_utf8_lossy(name));
        }
    }

    #[test]
    fn entries_are_padded_to_four_bytes() {
        let xattrs = [Xattr {
            name: (*b"user.abc").into(),
            value: (*b"12").into(),
        }];
        let body = encode(&xattrs).unwrap();
        assert_eq!(body.len(), 12 + 4 + 3 + 2 + 3);
        assert_eq!(&body[12..21], b"\x03\x01\x02\x00abc12");
    }
}
