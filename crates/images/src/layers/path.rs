//! Names of entries: made plain, and told apart from whiteouts.
//!
//! A plain path has no leading slash, no empty or `.` components and never `..`; the root is the empty path.

use super::error::EntryProblem;
use super::limits::Limits;

const WHITEOUT: &[u8] = b".wh.";
const WHITEOUT_INTERNAL: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What the name of an entry asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Name {
    /// An entry at this path.
    Entry(Vec<u8>),
    /// Nothing that lower layers have at this path.
    Whiteout(Vec<u8>),
    /// Nothing that lower layers have below this path.
    Opaque(Vec<u8>),
    /// Bookkeeping of another storage driver.
    Ignored,
}

/// Makes a name plain.
pub(crate) fn plain(raw: &[u8], limits: &Limits) -> Result<Vec<u8>, EntryProblem> {
    if raw.contains(&0) {
        return Err(EntryProblem::Nul);
    }
    if raw.is_empty() {
        return Err(EntryProblem::Unnamed);
    }
    if raw.len() > limits.path_bytes {
        return Err(EntryProblem::PathTooLong(limits.path_bytes));
    }
    let mut path = Vec::with_capacity(raw.len());
    let mut depth = 0;
    for component in raw.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => continue,
            b".." => return Err(EntryProblem::ParentComponent),
            _ if component.len() > limits.name_bytes => {
                return Err(EntryProblem::NameTooLong(limits.name_bytes));
            }
            _ => {}
        }
        depth += 1;
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(component);
    }
    if depth > limits.depth {
        return Err(EntryProblem::TooDeep(limits.depth));
    }
    Ok(path)
}

/// Parent and last component of a plain path that is not the root.
pub(crate) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (&path[..slash], &path[slash + 1..]),
        None => (b"", path),
    }
}

/// Tells what a plain path asks for.
pub(crate) fn classify(path: Vec<u8>) -> Result<Name, EntryProblem> {
    let (parent, last) = split(&path);
    if parent
        .split(|byte| *byte == b'/')
        .any(|component| component.starts_with(WHITEOUT_INTERNAL))
    {
        return Ok(Name::Ignored);
    }
    if parent
        .split(|byte| *byte == b'/')
        .any(|component| component.starts_with(WHITEOUT))
    {
        return Err(EntryProblem::ReservedName);
    }
    if last == OPAQUE {
        return Ok(Name::Opaque(parent.to_vec()));
    }
    if last.starts_with(WHITEOUT_INTERNAL) {
        return Ok(Name::Ignored);
    }
    let Some(hidden) = last.strip_prefix(WHITEOUT) else {
        return Ok(Name::Entry(path));
    };
    if matches!(hidden, b"" | b"." | b"..") {
        return Err(EntryProblem::ReservedName);
    }
    let mut target = parent.to_vec();
    if !target.is_empty() {
        target.push(b'/');
    }
    target.extend_from_slice(hidden);
    Ok(Name::Whiteout(target))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plainly(raw: &str) -> Result<String, EntryProblem> {
        plain(raw.as_bytes(), &Limits::default()).map(|path| String::from_utf8(path).unwrap())
    }

    #[test]
    fn names_become_relative_and_plain() {
        for (raw, expected) in [
            ("./", ""),
            ("/", ""),
            (".", ""),
            ("a", "a"),
            ("./a/./b//c/", "a/b/c"),
            ("/etc/passwd", "etc/passwd"),
            ("...", "..."),
        ] {
            assert_eq!(plainly(raw).as_deref(), Ok(expected), "{raw}");
        }
    }

    #[test]
    fn names_that_mean_harm_are_refused() {
        use EntryProblem as Problem;
        let long_name = "n".repeat(256);
        let long_path = "p/".repeat(2050);
        let deep = "d/".repeat(257);
        for (raw, problem) in [
            ("", Problem::Unnamed),
            ("..", Problem::ParentComponent),
            ("a/../b", Problem::ParentComponent),
            ("/../etc", Problem::ParentComponent),
            ("a/..", Problem::ParentComponent),
            ("a\0b", Problem::Nul),
            (&*long_name, Problem::NameTooLong(255)),
            (&*long_path, Problem::PathTooLong(4096)),
            (&*deep, Problem::TooDeep(256)),
        ] {
            assert_eq!(plainly(raw), Err(problem), "{raw:?}");
        }
    }

    #[test]
    fn whiteouts_are_told_apart() {
        let classified = |path: &str| classify(path.as_bytes().to_vec());
        let path = |path: &str| path.as_bytes().to_vec();
        assert_eq!(classified("a/b"), Ok(Name::Entry(path("a/b"))));
        assert_eq!(classified("a/.wh.b"), Ok(Name::Whiteout(path("a/b"))));
        assert_eq!(classified(".wh.b"), Ok(Name::Whiteout(path("b"))));
        assert_eq!(classified("a/.wh..wh..opq"), Ok(Name::Opaque(path("a"))));
        assert_eq!(classified(".wh..wh..opq"), Ok(Name::Opaque(path(""))));
        assert_eq!(classified(".wh..wh.plnk/17.4"), Ok(Name::Ignored));
        assert_eq!(classified(".wh..wh.aufs"), Ok(Name::Ignored));
        for name in [".wh.", "a/.wh..", "a/.wh...", ".wh.a/b"] {
            assert_eq!(classified(name), Err(EntryProblem::ReservedName), "{name}");
        }
    }
}
