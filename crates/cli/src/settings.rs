//! Which server the client talks to and with which token.
//!
//! Precedence, highest first: flag, environment, `~/.config/hypeman/cli.yaml`, default. Each value is decided by
//! itself: a base URL on the command line still goes with a token of the file.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::args::GlobalArgs;
use crate::error::CliError;

/// Where a server is looked for when nothing names one.
pub const DEFAULT_BASE_URL: &str = "http://localhost:8080";

/// A token longer than this is a mistake (a whole file pasted), and would be refused by every HTTP server.
const LONGEST_API_KEY: usize = 16 * 1024;

/// The file `~/.config/hypeman/cli.yaml`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SettingsFile {
    /// Address of the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_url: Option<String>,
    /// Bearer token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub api_key: Option<String>,
}

/// The environment as data, so that rules about it are testable.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `HYPEMAN_BASE_URL`.
    pub base_url: Option<String>,
    /// `HYPEMAN_API_KEY`.
    pub api_key: Option<String>,
}

impl Environment {
    /// Reads the process environment. Empty variables count as unset.
    pub fn of_process() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            base_url: variable("HYPEMAN_BASE_URL"),
            api_key: variable("HYPEMAN_API_KEY"),
        }
    }
}

/// What the client uses.
#[derive(Clone, PartialEq, Eq)]
pub struct Settings {
    /// Address of the server, without a slash at the end.
    pub base_url: String,
    /// Bearer token, if any.
    pub api_key: Option<String>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = self.api_key.as_ref().map(|_| "<hidden>");
        formatter
            .debug_struct("Settings")
            .field("base_url", &self.base_url)
            .field("api_key", &key)
            .finish()
    }
}

impl Settings {
    /// Decides from the flags, the process environment and the settings file.
    ///
    /// # Errors
    /// When the file cannot be read or parsed, or the base URL is not an http(s) URL.
    pub fn load(flags: &GlobalArgs) -> Result<Self, CliError> {
        let file = match settings_path() {
            Some(path) => read_file(&path)?,
            None => SettingsFile::default(),
        };
        Self::resolve(flags.base_url.as_deref(), &Environment::of_process(), &file)
    }

    /// The pure rule behind [`Settings::load`].
    ///
    /// # Errors
    /// When the base URL is not an http(s) URL or the token cannot be a header value.
    pub fn resolve(
        flag: Option<&str>,
        environment: &Environment,
        file: &SettingsFile,
    ) -> Result<Self, CliError> {
        let base_url = flag
            .or(environment.base_url.as_deref())
            .or(file.base_url.as_deref())
            .unwrap_or(DEFAULT_BASE_URL)
            .trim_end_matches('/')
            .to_owned();
        let parsed = reqwest::Url::parse(&base_url).ok().filter(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.query().is_none()
                && url.fragment().is_none()
                && url.username().is_empty()
                && url.password().is_none()
        });
        if parsed.is_none() {
            return Err(CliError::usage_with(
                format!("{base_url:?} is not the address of a server"),
                "write it like http://localhost:8080 or https://hypeman.example.org",
            ));
        }
        let api_key = environment
            .api_key
            .as_deref()
            .or(file.api_key.as_deref())
            .map(str::trim);
        if let Some(key) = api_key
            && (key.len() > LONGEST_API_KEY || key.bytes().any(|byte| !byte.is_ascii_graphic()))
        {
            return Err(CliError::usage_with(
                "the API key is not a token: it has spaces, control characters or is far too long",
                "make one with `hypeman token create`",
            ));
        }
        Ok(Self {
            base_url,
            api_key: api_key.filter(|key| !key.is_empty()).map(str::to_owned),
        })
    }
}

/// Where the settings file is, when a home directory is known.
pub fn settings_path() -> Option<PathBuf> {
    configuration_home().map(|home| home.join("hypeman/cli.yaml"))
}

/// `$XDG_CONFIG_HOME`, or `~/.config`.
pub fn configuration_home() -> Option<PathBuf> {
    std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".config")))
}

/// Reads the settings file; an absent one is empty.
///
/// # Errors
/// When it cannot be read or has keys that nobody knows.
pub fn read_file(path: &Path) -> Result<SettingsFile, CliError> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(absent) if absent.kind() == io::ErrorKind::NotFound => return Ok(SettingsFile::default()),
        Err(failure) => return Err(CliError::io(format!("cannot read {}", path.display()), failure)),
    };
    if text.trim().is_empty() {
        return Ok(SettingsFile::default());
    }
    serde_norway::from_str(&text).map_err(|failure| {
        CliError::usage_with(
            format!("{}: {failure}", path.display()),
            "the keys are base_url and api_key",
        )
    })
}

/// Writes the settings file for its owner only, whole or not at all.
///
/// # Errors
/// When the directory or file cannot be written.
pub fn write_file(path: &Path, settings: &SettingsFile) -> Result<(), CliError> {
    let context = || format!("cannot write {}", path.display());
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(|failure| CliError::io(context(), failure))?;
    let text = serde_norway::to_string(settings).map_err(|failure| CliError::failed(failure.to_string()))?;
    write_private(directory, path, text.as_bytes()).map_err(|failure| CliError::io(context(), failure))
}

/// Puts `bytes` at `path` with mode 0600: temporary name, sync, rename, sync of the directory.
pub(crate) fn write_private(directory: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temporary = directory.join(format!(".hypeman-{:016x}", rand::random::<u64>()));
    let written = (|| {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        fs::File::open(directory)?.sync_all()
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn environment(base_url: Option<&str>, api_key: Option<&str>) -> Environment {
        Environment {
            base_url: base_url.map(str::to_owned),
            api_key: api_key.map(str::to_owned),
        }
    }

    fn file(base_url: Option<&str>, api_key: Option<&str>) -> SettingsFile {
        SettingsFile {
            base_url: base_url.map(str::to_owned),
            api_key: api_key.map(str::to_owned),
        }
    }

    #[test]
    fn flag_beats_environment_beats_file_beats_default() {
        let all = environment(Some("http://env:1"), Some("k-env"));
        let stored = file(Some("http://file:2"), Some("k-file"));
        let none = environment(None, None);
        let cases = [
            (
                Some("http://flag:3/"),
                &all,
                &stored,
                "http://flag:3",
                Some("k-env"),
            ),
            (None, &all, &stored, "http://env:1", Some("k-env")),
            (None, &none, &stored, "http://file:2", Some("k-file")),
            (
                Some("https://flag"),
                &none,
                &stored,
                "https://flag",
                Some("k-file"),
            ),
            (None, &none, &SettingsFile::default(), DEFAULT_BASE_URL, None),
        ];
        for (flag, environment, stored, base_url, api_key) in cases {
            let settings = Settings::resolve(flag, environment, stored).unwrap();
            assert_eq!(
                (settings.base_url.as_str(), settings.api_key.as_deref()),
                (base_url, api_key)
            );
        }
    }

    #[test]
    fn addresses_that_are_no_server_are_refused_with_a_hint() {
        for wrong in [
            "localhost:8080",
            "ftp://x",
            "http://",
            "",
            "http://u:p@host",
            "http://x/?q=1",
            "/run/x.sock",
        ] {
            let failure = Settings::resolve(Some(wrong), &Environment::default(), &SettingsFile::default());
            assert_eq!(
                failure.unwrap_err().exit_code(),
                crate::error::exit::USAGE,
                "{wrong}"
            );
        }
    }

    #[test]
    fn a_token_never_shows_in_debug_output() {
        let settings = Settings {
            base_url: DEFAULT_BASE_URL.to_owned(),
            api_key: Some("secret".to_owned()),
        };
        assert!(!format!("{settings:?}").contains("secret"));
    }

    #[test]
    fn the_file_is_private_and_survives_a_round_trip() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("hypeman/cli.yaml");
        assert_eq!(read_file(&path).unwrap(), SettingsFile::default());
        let settings = file(Some("http://a"), Some("token"));
        write_file(&path, &settings).unwrap();
        assert_eq!(read_file(&path).unwrap(), settings);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        fs::write(&path, "base-url: x\n").unwrap();
        assert!(read_file(&path).unwrap_err().to_string().contains("base-url"));
    }
}
