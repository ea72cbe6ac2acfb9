//! Names that arrive from a guest or an archive, believed only in one form.
//!
//! A [`RelativePath`] has at least one part; no part is empty, `.`, `..`, or holds a slash, a backslash or a zero
//! byte. Every write goes through one of these, so a name can never leave the destination.

use std::fmt;

/// Longest part that file systems take.
const LONGEST_PART: usize = 255;

/// Longest path that systems take.
const LONGEST_PATH: usize = 4096;

/// A checked relative path.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct RelativePath {
    parts: Vec<String>,
}

/// Why a name is not believed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unsafe path {path:?}: {reason}")]
pub struct UnsafePath {
    path: String,
    reason: &'static str,
}

impl RelativePath {
    /// Checks a path.
    ///
    /// # Errors
    /// When any part could leave the destination or cannot be a name.
    pub fn parse(text: &str) -> Result<Self, UnsafePath> {
        let refuse = |reason| UnsafePath {
            path: text.chars().take(200).collect(),
            reason,
        };
        if text.is_empty() {
            return Err(refuse("it is empty"));
        }
        if text.starts_with('/') {
            return Err(refuse("it is absolute"));
        }
        if text.len() > LONGEST_PATH {
            return Err(refuse("it is too long"));
        }
        let mut parts = Vec::new();
        for part in text.split('/') {
            parts.push(match part {
                "" => return Err(refuse("a part is empty")),
                "." | ".." => return Err(refuse("a part is . or ..")),
                part if part.len() > LONGEST_PART => return Err(refuse("a part is too long")),
                part if part.contains('\\') => return Err(refuse("it has a backslash")),
                part if part.contains('\0') => return Err(refuse("it has a zero byte")),
                part => part.to_owned(),
            });
        }
        Ok(Self { parts })
    }

    /// The parts, at least one.
    pub fn parts(&self) -> &[String] {
        &self.parts
    }

    /// The first part: the name of what was asked for.
    pub fn top(&self) -> &str {
        self.parts.first().map_or("", String::as_str)
    }

    /// The parts below the first.
    pub fn below(&self) -> &[String] {
        self.parts.get(1..).unwrap_or_default()
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.parts.join("/"))
    }
}

/// Checks that a link made at `link` stays inside the tree that it came with.
///
/// `..` is only allowed at the front: there it counts real directories, further in it could go through another
/// link and end anywhere.
///
/// # Errors
/// When the target is absolute or could lead out of the tree.
pub fn check_link(link: &RelativePath, target: &str) -> Result<(), UnsafePath> {
    let refuse = |reason| UnsafePath {
        path: format!("{link} -> {}", target.chars().take(200).collect::<String>()),
        reason,
    };
    if target.is_empty() || target.contains('\0') || target.len() > LONGEST_PATH {
        return Err(refuse("the link target is not a path"));
    }
    if target.starts_with('/') {
        return Err(refuse("the link target is absolute"));
    }
    if target.contains('\\') {
        return Err(refuse("the link target has a backslash"));
    }
    let mut climb = link.parts.len().saturating_sub(2);
    let mut descending = false;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." if descending => return Err(refuse("the link target climbs after it descends")),
            ".." => {
                climb = climb
                    .checked_sub(1)
                    .ok_or_else(|| refuse("the link target leaves the tree"))?
            }
            _ => descending = true,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hostile_names_are_refused() {
        for wrong in [
            "",
            "/",
            "/etc/passwd",
            "..",
            ".",
            "a/..",
            "a/../b",
            "../a",
            "a//b",
            "a/",
            "./a",
            "a\\b",
            "a\0b",
            "a/./b",
        ] {
            assert!(RelativePath::parse(wrong).is_err(), "{wrong:?}");
        }
        assert!(RelativePath::parse(&"x".repeat(256)).is_err());
        assert!(RelativePath::parse(&"ab/".repeat(2000)).is_err());
        for right in ["a", "a/b", "...", "a/..b/c..", "ä/ö", "a b/-c", "a:b"] {
            assert_eq!(RelativePath::parse(right).unwrap().to_string(), right);
        }
    }

    #[test]
    fn links_stay_in_their_tree() {
        let check =
            |link: &str, target: &str| check_link(&RelativePath::parse(link).unwrap(), target).is_ok();
        let cases = [
            ("base/link", "file", true),
            ("base/link", "sub/file", true),
            ("base/link", "../outside", false),
            ("base/sub/link", "../file", true),
            ("base/sub/link", "../../outside", false),
            ("base/sub/link", ".././file", true),
            ("base/link", "/etc/passwd", false),
            ("base/link", "sub/../../../outside", false),
            ("base/link", "sub/../file", false),
            ("base/link", "", false),
            ("base/link", "a\\b", false),
            ("link", "neighbour", true),
            ("link", "../x", false),
        ];
        for (link, target, expected) in cases {
            assert_eq!(check(link, target), expected, "{link} -> {target}");
        }
    }

    proptest! {
        #[test]
        fn what_is_believed_never_leaves_the_destination(text in "[a./\\\\\u{0}-é ]{0,40}") {
            if let Ok(path) = RelativePath::parse(&text) {
                let joined = Path::new("/destination").join(path.to_string());
                prop_assert!(joined.starts_with("/destination"));
                let normal = Path::new(&path.to_string()).components().all(|part| matches!(part, Component::Normal(_)));
                prop_assert!(normal);
                prop_assert_eq!(path.to_string(), text);
            }
        }

        #[test]
        fn a_believed_link_resolves_below_its_tree(
            depth in 1usize..5,
            target in "(\\.\\./){0,5}[a./]{0,12}",
        ) {
            let link = format!("base/{}link", "d/".repeat(depth - 1));
            let path = RelativePath::parse(&link).unwrap();
            if check_link(&path, &target).is_ok() {
                let mut level = i64::try_from(depth).unwrap() - 1;
                for part in target.split('/') {
                    match part { "" | "." => {}, ".." => level -= 1, _ => level += 1 }
                    prop_assert!(level >= 0, "{} leaves from {}", target, link);
                }
            }
        }
    }
}
