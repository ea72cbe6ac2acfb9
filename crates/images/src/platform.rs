//! Platforms: which operating system and processor an image is for.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{ImageError, Result};

/// An operating system, a processor and, rarely, a variant of the processor.
///
/// Displayed as `linux/amd64` or `linux/arm/v7`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// Operating system as Go names it: `linux`.
    pub os: String,
    /// Processor as Go names it: `amd64`, `arm64`.
    pub architecture: String,
    /// Variant: `v8`, `v7`; never empty text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// A Linux platform without a variant.
    pub fn linux(architecture: &str) -> Self {
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        }
    }

    /// The platform of this host's processor, on which guests run without emulation.
    pub fn host() -> Self {
        Self::linux(match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        })
    }

    /// Reads `os/architecture[/variant]` by the grammar alone, whatever the names are.
    ///
    /// # Errors
    /// [`ImageError::InvalidPlatform`].
    pub fn parse(text: &str) -> Result<Self> {
        let invalid = || ImageError::InvalidPlatform(text.chars().take(64).collect());
        let plain = |part: &&str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
        };
        let variant_text = |part: &&str| {
            let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'.';
            !part.is_empty() && part.bytes().all(allowed)
        };
        if text.len() > 64 {
            return Err(invalid());
        }
        let mut parts = text.split('/');
        let os = parts.next().filter(plain).ok_or_else(invalid)?;
        let architecture = parts.next().filter(plain).ok_or_else(invalid)?;
        let variant = match parts.next() {
            Some(part) => Some(Some(part).filter(variant_text).ok_or_else(invalid)?.to_owned()),
            None => None,
        };
        if parts.next().is_some() {
            return Err(invalid());
        }
        Ok(Self {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant,
        })
    }

    /// Reads a platform that guests can have: `linux/amd64` or `linux/arm64`, with or without the baseline variant.
    ///
    /// # Errors
    /// [`ImageError::InvalidPlatform`].
    pub fn parse_supported(text: &str) -> Result<Self> {
        let platform = Self::parse(text)?.normalized();
        let supported = platform.variant.is_none()
            && platform.os == "linux"
            && matches!(platform.architecture.as_str(), "amd64" | "arm64");
        if supported {
            Ok(platform)
        } else {
            Err(ImageError::InvalidPlatform(text.to_owned()))
        }
    }

    /// The same platform under its canonical names: aliases replaced, baseline variants dropped.
    pub fn normalized(&self) -> Self {
        let architecture = match self.architecture.as_str() {
            "x86_64" | "x86-64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let variant = match (architecture, self.variant.as_deref()) {
            (_, None | Some("")) | ("amd64", Some("v1")) | ("arm64", Some("v8" | "8" | "v8.0")) => None,
            ("arm", Some("7")) => Some("v7".to_owned()),
            ("arm", Some("6")) => Some("v6".to_owned()),
            (_, Some(other)) => Some(other.to_owned()),
        };
        Self {
            os: self.os.to_ascii_lowercase(),
            architecture: architecture.to_owned(),
            variant,
        }
    }

    /// How well an image for `offered` suits a guest of this platform: lower is better, `None` means not at all.
    ///
    /// A baseline image (no variant) runs on each variant of its processor; an image that needs a variant is
    /// chosen only when that variant, or on 32-bit ARM a later one, was asked for.
    pub fn rank(&self, offered: &Self) -> Option<u32> {
        let (wanted, offered) = (self.normalized(), offered.normalized());
        if wanted.os != offered.os || wanted.architecture != offered.architecture {
            return None;
        }
        match (wanted.variant.as_deref(), offered.variant.as_deref()) {
            (want, have) if want == have => Some(0),
            (Some(want), Some(have)) => {
                let (want, have) = (level(want)?, level(have)?);
                (have < want).then(|| want - have)
            }
            (Some(_), None) => Some(u32::MAX),
            (None, _) => None,
        }
    }
}

fn level(variant: &str) -> Option<u32> {
    variant.strip_prefix('v')?.parse().ok()
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(formatter, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}
