//! Image references: the names by which people speak of images.
//!
//! ```text
//! reference  = [registry "/"] repository [":" tag] ["@" digest]
//! registry   = host [":" port]      present when the first part has a dot or a colon, or is "localhost"
//! repository = part {"/" part}      part = letters and digits, joined by "." "_" "__" or any run of "-"
//! tag        = [A-Za-z0-9_] [A-Za-z0-9_.-]{0,127}
//! ```
//!
//! Invariant: a [`Reference`] is always in canonical form: it has a registry, Docker Hub is `docker.io`, its
//! one-part repositories are under `library/`, and there is a tag or a digest. `parse(x.to_string()) == x`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::digest::Digest;
use crate::error::{ImageError, Result};

/// The registry that a name without one means.
pub const DEFAULT_REGISTRY: &str = "docker.io";

/// Longest registry plus repository, in bytes.
const MAX_NAME_BYTES: usize = 255;
/// Longest tag, in bytes.
const MAX_TAG_BYTES: usize = 128;

/// A normalised image reference.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Reads a reference and normalises it.
    ///
    /// # Errors
    /// [`ImageError::InvalidName`] with the rule that is broken.
    pub fn parse(text: &str) -> Result<Self> {
        parse(text).map_err(|reason| ImageError::InvalidName {
            name: text.chars().take(128).collect(),
            reason,
        })
    }

    /// Puts a reference together from its parts, as the `/v2` endpoints get them.
    ///
    /// # Errors
    /// [`ImageError::InvalidName`] with the rule that is broken.
    pub fn from_parts(registry: &str, repository: &str, tag_or_digest: &str) -> Result<Self> {
        let separator = if tag_or_digest.contains(':') { '@' } else { ':' };
        Self::parse(&format!("{registry}/{repository}{separator}{tag_or_digest}"))
    }

    /// The registry with its port, lower case: `docker.io`, `localhost:5000`, `[::1]:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository inside the registry: `library/alpine`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if the reference has one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if the reference has one. It wins over the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Registry and repository: `docker.io/library/alpine`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry, self.repository)
    }

    /// The same repository at a digest, without a tag.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            tag: None,
            digest: Some(digest),
            ..self.clone()
        }
    }

    /// The same repository at a tag, without a digest.
    ///
    /// # Errors
    /// [`ImageError::InvalidName`] when the tag breaks the grammar.
    pub fn with_tag(&self, tag: &str) -> Result<Self> {
        if !is_tag(tag) {
            return Err(ImageError::InvalidName {
                name: tag.chars().take(128).collect(),
                reason: BAD_TAG,
            });
        }
        Ok(Self {
            tag: Some(tag.to_owned()),
            digest: None,
            ..self.clone()
        })
    }

    /// What stands after `/manifests/` in a registry URL: the digest, else the tag.
    pub fn manifest_selector(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => digest.to_string(),
            (None, Some(tag)) => tag.clone(),
            (None, None) => "latest".to_owned(),
        }
    }
}

const BAD_TAG: &str =
    "a tag is up to 128 letters, digits, '_', '.' and '-', and starts with none of '.' and '-'";
const BAD_REPOSITORY: &str = "a repository is lower-case letters and digits, parted by '/', '.', '_', '__' or '-' with none at the ends";
const BAD_REGISTRY: &str = "the registry is not a host name or address with an optional port";

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() > MAX_NAME_BYTES + MAX_TAG_BYTES + 80 {
        return Err("it is too long");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (
            rest,
            Some(Digest::parse(digest).map_err(|_| "the digest is not sha256")?),
        ),
        None => (text, None),
    };
    let (name, tag) = match rest.rsplit_once(':') {
        // A colon before a slash belongs to the port.
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(BAD_TAG);
    }
    let (registry, path) = split_registry(name)?;
    let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') {
        format!("library/{path}")
    } else {
        path.to_owned()
    };
    if !repository.split('/').all(is_repository_part) {
        return Err(BAD_REPOSITORY);
    }
    if registry.len() + 1 + repository.len() > MAX_NAME_BYTES {
        return Err("registry and repository together exceed 255 characters");
    }
    if !name.contains('/') && Digest::from_hex(name).is_some() {
        return Err("64 hexadecimal digits alone are an image id, not a name");
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, Some(_)) => None,
        (None, None) => Some("latest".to_owned()),
    };
    Ok(Reference {
        registry,
        repository,
        tag,
        digest,
    })
}

fn split_registry(name: &str) -> Result<(String, &str), &'static str> {
    let Some((first, path)) = name.split_once('/') else {
        return Ok((DEFAULT_REGISTRY.to_owned(), name));
    };
    if first != "localhost" && !first.contains(['.', ':', '[']) {
        return Ok((DEFAULT_REGISTRY.to_owned(), name));
    }
    if !is_registry_host(first) {
        return Err(BAD_REGISTRY);
    }
    let registry = first.to_ascii_lowercase();
    match registry.as_str() {
        "index.docker.io" | "registry-1.docker.io" => Ok((DEFAULT_REGISTRY.to_owned(), path)),
        _ => Ok((registry, path)),
    }
}

fn is_registry_host(text: &str) -> bool {
    let (host, port) = if let Some(bracketed) = text.strip_prefix('[') {
        let Some((address, after)) = bracketed.split_once(']') else {
            return false;
        };
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return false;
        }
        match after.strip_prefix(':') {
            Some(port) => return is_port(port),
            None => return after.is_empty(),
        }
    } else {
        match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        }
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    host.split('.').all(is_label) && port.is_none_or(is_port)
}

fn is_port(text: &str) -> bool {
    let digits = !text.is_empty() && text.len() <= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    digits && text.parse::<u16>().is_ok_and(|port| port != 0)
}

fn is_tag(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    !text.is_empty()
        && text.len() <= MAX_TAG_BYTES
        && text.bytes().all(allowed)
        && !text.starts_with(['.', '-'])
}

fn is_repository_part(part: &str) -> bool {
    let bytes = part.as_bytes();
    let is_word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let mut index = 0;
    let mut expects_word = true;
    while index < bytes.len() {
        if is_word(bytes[index]) {
            index += 1;
            expects_word = false;
            continue;
        }
        if expects_word {
            return false;
        }
        let run = bytes[index..].iter().take_while(|byte| !is_word(**byte)).count();
        match &bytes[index..index + run] {
            b"." | b"_" | b"__" => {}
            dashes if dashes.iter().all(|byte| *byte == b'-') => {}
            _ => return false,
        }
        index += run;
        expects_word = true;
    }
    !expects_word
}

impl fmt::Display for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(formatter, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(formatter, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

impl FromStr for Reference {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}
