//! The two arguments of `cp`: `INSTANCE:PATH`, a local path, or `-`.

use std::path::PathBuf;
use std::str::FromStr;

/// One side of a copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A path in an instance.
    Guest {
        /// Id, name or prefix.
        instance: String,
        /// Absolute path as it was written, with its end (`/` or `/.`).
        path: String,
    },
    /// A path on this machine.
    Local(PathBuf),
    /// A tar archive on standard input or output.
    Stream,
}

impl FromStr for Endpoint {
    type Err = String;

    /// A path that begins with `/` or `.` is local. Otherwise what stands before the first colon is the instance,
    /// unless it has a slash (`dir/a:b` is a file).
    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a path cannot be empty".to_owned());
        }
        if text == "-" {
            return Ok(Self::Stream);
        }
        let local = || Ok(Self::Local(PathBuf::from(text)));
        if text.starts_with(['/', '.']) {
            return local();
        }
        let Some((instance, path)) = text.split_once(':') else {
            return local();
        };
        if instance.contains('/') {
            return local();
        }
        if instance.is_empty() {
            return Err(format!("{text:?} has no instance before the colon"));
        }
        if path.contains('\0') {
            return Err("a path cannot contain a zero byte".to_owned());
        }
        // Like docker, a path without a slash in front is taken from the root.
        let path = if path.starts_with('/') {
            path.to_owned()
        } else {
            format!("/{path}")
        };
        Ok(Self::Guest {
            instance: instance.to_owned(),
            path,
        })
    }
}

/// What the end of a written path says, and the path without it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// The path without `/` or `/.` at its end (`/` stays).
    pub path: String,
    /// It ended in `/.`: the content is meant, not the directory.
    pub contents: bool,
    /// It ended in `/` or `/.`: it must be a directory.
    pub directory: bool,
}

impl Written {
    /// Takes a written path apart.
    pub fn of(text: &str) -> Self {
        let contents = text == "." || text.ends_with("/.");
        let directory = contents || text.ends_with('/');
        let mut path = text;
        if path.ends_with("/.") {
            path = &path[..path.len() - 1];
        }
        while path.len() > 1 && path.ends_with('/') {
            path = &path[..path.len() - 1];
        }
        // The root has no name of its own: only its content can be meant.
        Self {
            contents: contents || path == "/",
            directory: directory || path == "/",
            path: path.to_owned(),
        }
    }

    /// The last name of the path, when it has one.
    pub fn name(&self) -> Option<&str> {
        self.path
            .rsplit('/')
            .next()
            .filter(|name| !matches!(*name, "" | "." | ".."))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guest(instance: &str, path: &str) -> Endpoint {
        Endpoint::Guest {
            instance: instance.to_owned(),
            path: path.to_owned(),
        }
    }

    #[test]
    fn arguments_are_read_like_docker_reads_them() {
        let local = |text: &str| Endpoint::Local(PathBuf::from(text));
        let cases = [
            ("web:/etc/hosts", guest("web", "/etc/hosts")),
            ("web:etc/", guest("web", "/etc/")),
            ("web:", guest("web", "/")),
            ("web:/a:b", guest("web", "/a:b")),
            ("./web:/x", local("./web:/x")),
            ("/web:x", local("/web:x")),
            ("dir/a:b", local("dir/a:b")),
            ("file", local("file")),
            ("-", Endpoint::Stream),
        ];
        for (text, expected) in cases {
            assert_eq!(text.parse::<Endpoint>().unwrap(), expected, "{text}");
        }
        for wrong in ["", ":/x", "web:a\0b"] {
            assert!(wrong.parse::<Endpoint>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_end_of_a_path_says_what_is_meant() {
        let cases = [
            ("/a/b", "/a/b", false, false),
            ("/a/b/", "/a/b", false, true),
            ("/a/b/.", "/a/b", true, true),
            ("/", "/", true, true),
            ("/.", "/", true, true),
            (".", ".", true, true),
            ("a//", "a", false, true),
            ("/a/.b", "/a/.b", false, false),
        ];
        for (text, path, contents, directory) in cases {
            assert_eq!(
                Written::of(text),
                Written {
                    path: path.to_owned(),
                    contents,
                    directory
                },
                "{text}"
            );
        }
    }
}
