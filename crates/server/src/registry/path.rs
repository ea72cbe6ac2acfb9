//! Paths of the registry: repository names of any depth in front of a fixed end.

use axum::http::StatusCode;
use hypeman_images::Digest;
use percent_encoding::percent_decode_str;

use super::error::{RegistryFailure, RegistryResult};

/// Longest repository name, bytes.
const MAX_REPOSITORY: usize = 255;

/// What a path names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `/v2/`
    Base,
    /// `/v2/_catalog`
    Catalog,
    /// `/v2/<name>/blobs/<digest>`
    Blob {
        /// Repository.
        repository: String,
        /// Digest.
        digest: Digest,
    },
    /// `/v2/<name>/blobs/uploads/`
    Uploads {
        /// Repository.
        repository: String,
    },
    /// `/v2/<name>/blobs/uploads/<id>`
    Upload {
        /// Repository.
        repository: String,
        /// Upload session, unchecked.
        id: String,
    },
    /// `/v2/<name>/manifests/<tag or digest>`
    Manifest {
        /// Repository.
        repository: String,
        /// Tag or digest, checked.
        reference: String,
    },
    /// `/v2/<name>/tags/list`
    Tags {
        /// Repository.
        repository: String,
    },
}

impl Target {
    /// The repository that it belongs to.
    pub fn repository(&self) -> Option<&str> {
        match self {
            Self::Base | Self::Catalog => None,
            Self::Blob { repository, .. }
            | Self::Uploads { repository }
            | Self::Upload { repository, .. }
            | Self::Manifest { repository, .. }
            | Self::Tags { repository } => Some(repository),
        }
    }
}

/// Parses what follows `/v2/`, still percent-encoded.
///
/// # Errors
/// 404 for paths that the specification does not have, 400 for malformed names, tags and digests.
pub fn parse(rest: &str) -> RegistryResult<Target> {
    let decoded: Option<Vec<String>> = rest
        .split('/')
        .map(|segment| {
            percent_decode_str(segment)
                .decode_utf8()
                .ok()
                .map(std::borrow::Cow::into_owned)
        })
        .collect();
    let decoded = decoded.ok_or_else(RegistryFailure::unknown_path)?;
    let segments: Vec<&str> = decoded.iter().map(String::as_str).collect();
    match segments.as_slice() {
        [""] => Ok(Target::Base),
        ["_catalog"] => Ok(Target::Catalog),
        [name @ .., "tags", "list"] => Ok(Target::Tags {
            repository: repository(name)?,
        }),
        [name @ .., "blobs", "uploads"] | [name @ .., "blobs", "uploads", ""] => Ok(Target::Uploads {
            repository: repository(name)?,
        }),
        [name @ .., "blobs", "uploads", id] => Ok(Target::Upload {
            repository: repository(name)?,
            id: (*id).to_owned(),
        }),
        [name @ .., "blobs", digest] => Ok(Target::Blob {
            repository: repository(name)?,
            digest: self::digest(digest)?,
        }),
        [name @ .., "manifests", reference] => {
            if reference.contains(':') {
                digest(reference)?;
            } else if !is_tag(reference) {
                return Err(RegistryFailure::new(
                    StatusCode::BAD_REQUEST,
                    "TAG_INVALID",
                    "not a tag",
                ));
            }
            Ok(Target::Manifest {
                repository: repository(name)?,
                reference: (*reference).to_owned(),
            })
        }
        _ => Err(RegistryFailure::unknown_path()),
    }
}

/// Reads a digest of a path or a query.
///
/// # Errors
/// 400 `DIGEST_INVALID`.
pub fn digest(text: &str) -> RegistryResult<Digest> {
    Digest::parse(text).map_err(|error| RegistryFailure::digest_invalid(error.to_string()))
}

fn repository(segments: &[&str]) -> RegistryResult<String> {
    let name = segments.join("/");
    if is_repository(&name) {
        Ok(name)
    } else {
        let message =
            "a repository is made of lower-case letters, digits and single separators between slashes";
        Err(RegistryFailure::new(
            StatusCode::BAD_REQUEST,
            "NAME_INVALID",
            message,
        ))
    }
}

/// Whether `name` is a repository: components of `[a-z0-9]+` joined by `.`, `_`, `__` or dashes.
pub fn is_repository(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_REPOSITORY && name.split('/').all(is_component)
}

fn is_component(component: &str) -> bool {
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let ends = |byte: Option<u8>| byte.is_some_and(alphanumeric);
    if !ends(component.bytes().next()) || !ends(component.bytes().last()) {
        return false;
    }
    component
        .split(|c: char| c.is_ascii() && alphanumeric(c as u8))
        .all(|separator| {
            matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|byte| byte == b'-')
        })
}

fn is_tag(text: &str) -> bool {
    text.len() <= 128
        && text
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_alphanumeric() || first == b'_')
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn repositories_have_any_depth() {
        for name in [
            "a",
            "a/b",
            "a/b/c/d/e/f",
            "blobs/uploads",
            "tags/manifests",
            "a--b/c__d/e.f",
            "cache/global/x",
        ] {
            assert_eq!(
                parse(&format!("{name}/manifests/latest")).unwrap(),
                Target::Manifest {
                    repository: name.into(),
                    reference: "latest".into()
                }
            );
            assert_eq!(
                parse(&format!("{name}/tags/list")).unwrap(),
                Target::Tags {
                    repository: name.into()
                }
            );
            assert_eq!(
                parse(&format!("{name}/blobs/uploads/")).unwrap(),
                Target::Uploads {
                    repository: name.into()
                }
            );
            assert_eq!(
                parse(&format!("{name}/blobs/uploads")).unwrap(),
                Target::Uploads {
                    repository: name.into()
                }
            );
            assert_eq!(
                parse(&format!("{name}/blobs/uploads/1-2")).unwrap(),
                Target::Upload {
                    repository: name.into(),
                    id: "1-2".into()
                }
            );
            let blob = Target::Blob {
                repository: name.into(),
                digest: Digest::parse(DIGEST).unwrap(),
            };
            assert_eq!(parse(&format!("{name}/blobs/{DIGEST}")).unwrap(), blob);
            assert_eq!(
                parse(&format!("{name}/blobs/{}", DIGEST.replace(':', "%3A"))).unwrap(),
                blob
            );
        }
        assert_eq!(parse("").unwrap(), Target::Base);
        assert_eq!(parse("_catalog").unwrap(), Target::Catalog);
    }

    #[test]
    fn malformed_paths_are_refused() {
        for path in [
            "A/manifests/x",
            "a//b/manifests/x",
            "../manifests/x",
            "a/./manifests/x",
            "a%2F..%2Fb/manifests/x",
            "-a/manifests/x",
            "a./manifests/x",
            "a___b/manifests/x",
            "a..b/manifests/x",
            "/manifests/x",
            "a/manifests/-x",
            "a/manifests/x%2Fy",
            "a/manifests/sha256:12",
            "a/blobs/sha256:12",
            "a/blobs/md5:d41d8cd98f00b204e9800998ecf8427e",
            "a",
            "a/b/c",
            "%ff/tags/list",
        ] {
            assert!(parse(path).is_err(), "{path}");
        }
        assert!(parse(&format!("{}/tags/list", "a".repeat(256))).is_err());
    }

    proptest! {
        #[test]
        fn any_path_is_answered(path in ".{0,100}") {
            if let Ok(target) = parse(&path) {
                prop_assert!(target.repository().is_none_or(|name| is_repository(name) && !name.contains("..")));
            }
        }
    }
}
