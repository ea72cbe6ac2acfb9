//! Image platforms: `os/arch[/variant]`, such as `linux/amd64`.

use std::fmt;

use crate::InvalidValue;

/// The form as a regular expression, for the OpenAPI document.
pub const PATTERN: &str = "^[a-z0-9]+/[a-z0-9]+(/[a-z0-9.]+)?$";

/// A platform that this server can run or convert.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Platform {
    /// Processor architecture in OCI terms.
    pub architecture: Architecture,
    /// Variant of the architecture, such as `v8`; empty when none is asked for.
    pub variant: String,
}

/// Processor architectures in the OCI's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// x86-64.
    Amd64,
    /// AArch64.
    Arm64,
}

impl Architecture {
    /// The OCI's name.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// Architecture that this program was built for; `None` where images cannot run at all.
    #[must_use]
    pub fn host() -> Option<Self> {
        match std::env::consts::ARCH {
            "x86_64" => Some(Self::Amd64),
            "aarch64" => Some(Self::Arm64),
            _ => None,
        }
    }
}

impl Platform {
    /// Reads a platform.
    ///
    /// # Errors
    /// `invalid_platform` when the form is wrong, or the platform is neither `linux/amd64` nor `linux/arm64`.
    pub fn parse(text: &str) -> Result<Self, InvalidValue> {
        let refuse = |message: String| InvalidValue::new("invalid_platform", message).in_field("platform");
        let alphanumeric = |part: &str, extra: &[u8]| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || extra.contains(&byte))
        };
        let form = || refuse("a platform is os/arch[/variant], such as linux/amd64".to_owned());
        if text.len() > 64 {
            return Err(form());
        }
        let mut parts = text.split('/');
        let (Some(os), Some(arch), variant, None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(form());
        };
        if !alphanumeric(os, b"")
            || !alphanumeric(arch, b"")
            || variant.is_some_and(|v| !alphanumeric(v, b"."))
        {
            return Err(form());
        }
        let architecture = match (os, arch) {
            ("linux", "amd64") => Architecture::Amd64,
            ("linux", "arm64") => Architecture::Arm64,
            _ => {
                return Err(refuse(format!(
                    "platform {text} is not supported: use linux/amd64 or linux/arm64"
                )));
            }
        };
        Ok(Self {
            architecture,
            variant: variant.unwrap_or_default().to_owned(),
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "linux/{}", self.architecture.as_str())?;
        if self.variant.is_empty() {
            Ok(())
        } else {
            write!(f, "/{}", self.variant)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        for text in ["linux/amd64", "linux/arm64", "linux/arm64/v8"] {
            assert_eq!(Platform::parse(text).unwrap().to_string(), text);
        }
        for text in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "Linux/amd64",
            "linux/amd64/",
            "linux/amd64/v8/x",
            "windows/amd64",
            "linux/riscv64",
            "linux/amd64 ",
        ] {
            assert_eq!(
                Platform::parse(text).unwrap_err().code,
                "invalid_platform",
                "{text}"
            );
        }
    }
}
