//! Values by key, each with the place that it came from, so that an error can name it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde_norway::Value;

use super::keys::{KEYS, LEVELS, known, nearest};
use crate::error::CliError;

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The built-in default.
    Default,
    /// A file.
    File(PathBuf),
    /// An environment variable.
    Environment(String),
    /// The command line.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => formatter.write_str("default"),
            Self::File(path) => write!(formatter, "{}", path.display()),
            Self::Environment(name) => write!(formatter, "environment variable {name}"),
            Self::Flag => formatter.write_str("command line"),
        }
    }
}

/// The values that were set; the table has the defaults of all others.
#[derive(Clone, Default)]
pub struct Values {
    set: BTreeMap<String, (String, Origin)>,
}

impl fmt::Debug for Values {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.set.iter().map(|(key, (value, origin))| {
            (
                key,
                if key == "jwt_secret" {
                    "<hidden>"
                } else {
                    value.as_str()
                },
                origin,
            )
        });
        formatter.debug_list().entries(shown).finish()
    }
}

impl Values {
    /// Sets one value.
    ///
    /// # Errors
    /// When there is no such key.
    pub fn set(&mut self, key: &str, value: String, origin: Origin) -> Result<(), CliError> {
        if !known(key) {
            let message = format!("{origin}: there is no configuration key {key:?}");
            return Err(match nearest(key) {
                Some(near) => CliError::usage_with(message, format!("did you mean {near}?")),
                None => CliError::usage_with(message, "`hypeman serve --list-keys` lists all keys"),
            });
        }
        self.set.insert(key.to_owned(), (value, origin));
        Ok(())
    }

    /// Adds what a YAML file says.
    ///
    /// # Errors
    /// When it is not YAML, or has unknown keys.
    pub fn add_yaml(&mut self, text: &str, path: &Path) -> Result<(), CliError> {
        let document: Value = serde_norway::from_str(text)
            .map_err(|failure| CliError::usage(format!("{}: {failure}", path.display())))?;
        match document {
            Value::Null => Ok(()),
            Value::Mapping(_) => self.add_value("", &document, path),
            _ => Err(CliError::usage(format!(
                "{}: it must be keys and values",
                path.display()
            ))),
        }
    }

    fn add_value(&mut self, key: &str, value: &Value, path: &Path) -> Result<(), CliError> {
        let origin = || Origin::File(path.to_owned());
        match value {
            Value::Mapping(members) => {
                for (name, member) in members {
                    let Value::String(name) = name else {
                        return Err(CliError::usage(format!("{}: {name:?} is no key", path.display())));
                    };
                    let whole = if key.is_empty() {
                        name.clone()
                    } else {
                        format!("{key}.{name}")
                    };
                    self.add_value(&whole, member, path)?;
                }
                Ok(())
            }
            // `key:` without a value keeps the default.
            Value::Null if known(key) => Ok(()),
            Value::Sequence(items) => {
                let words: Option<Vec<String>> = items.iter().map(scalar).collect();
                let words = words.ok_or_else(|| {
                    CliError::usage(format!("{}: {key} must be a list of words", path.display()))
                })?;
                self.set(key, words.join(","), origin())
            }
            other => {
                let text = scalar(other).ok_or_else(|| {
                    CliError::usage(format!("{}: {key} has no usable value", path.display()))
                })?;
                self.set(key, text, origin())
            }
        }
    }

    /// Adds what the environment says. Variables that are no key are somebody else's.
    ///
    /// # Errors
    /// Never for now; kept so that a rule about values can come here.
    pub fn add_environment(
        &mut self,
        variables: impl Iterator<Item = (String, String)>,
    ) -> Result<(), CliError> {
        for (name, value) in variables {
            if value.is_empty() || name.bytes().any(|byte| byte.is_ascii_lowercase()) {
                continue;
            }
            let key = name.to_ascii_lowercase().replace("__", ".");
            let ours = known(&key) && key != "logging.levels";
            // A family that is ours with an unknown key in it is a typing error, not somebody else's variable.
            let family = key.split_once('.').map(|(family, _)| format!("{family}."));
            let mistyped = family.is_some_and(|family| KEYS.iter().any(|key| key.name.starts_with(&family)));
            if ours || mistyped {
                self.set(&key, value, Origin::Environment(name))?;
            }
        }
        Ok(())
    }

    fn raw(&self, key: &'static str) -> (&str, Origin) {
        match self.set.get(key) {
            Some((value, origin)) => (value.as_str(), origin.clone()),
            None => {
                let default = KEYS
                    .iter()
                    .find(|known| known.name == key)
                    .map_or("", |known| known.default);
                (default, Origin::Default)
            }
        }
    }

    fn wrong(&self, key: &'static str, expected: &str) -> CliError {
        let (value, origin) = self.raw(key);
        let shown = if key == "jwt_secret" { "<hidden>" } else { value };
        CliError::usage_with(
            format!("{origin}: {key} cannot be {shown:?}"),
            expected.to_owned(),
        )
    }

    /// A value as text; `None` when it is neither set nor has a default.
    pub fn text(&self, key: &'static str) -> Option<String> {
        let (value, _) = self.raw(key);
        (!value.is_empty()).then(|| value.to_owned())
    }

    /// A value as a path; `~/` is the home directory.
    pub fn path(&self, key: &'static str) -> Option<PathBuf> {
        let text = self.text(key)?;
        match (text.strip_prefix("~/"), std::env::home_dir()) {
            (Some(rest), Some(home)) => Some(home.join(rest)),
            _ => Some(PathBuf::from(text)),
        }
    }

    /// A value that can be read from text, such as a number or an address. `expected` says what it should be.
    ///
    /// # Errors
    /// When it cannot.
    pub fn parsed<T: FromStr>(&self, key: &'static str, expected: &str) -> Result<T, CliError> {
        self.raw(key)
            .0
            .trim()
            .parse()
            .map_err(|_| self.wrong(key, expected))
    }

    /// A value that can be read from text, when it is set or has a default.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub fn optional<T: FromStr>(&self, key: &'static str, expected: &str) -> Result<Option<T>, CliError> {
        if self.text(key).is_none() {
            return Ok(None);
        }
        self.parsed(key, expected).map(Some)
    }

    /// A size in bytes.
    ///
    /// # Errors
    /// When it is not a size.
    pub fn size(&self, key: &'static str) -> Result<u64, CliError> {
        hypeman_core::size::parse(self.raw(key).0)
            .map_err(|_| self.wrong(key, "write a size such as 512MB or 100GB"))
    }

    /// A duration longer than nothing.
    ///
    /// # Errors
    /// When it is not a duration.
    pub fn duration(&self, key: &'static str) -> Result<Duration, CliError> {
        hypeman_core::duration::parse_positive(self.raw(key).0)
            .map_err(|_| self.wrong(key, "write a duration such as 30s or 5m"))
    }

    /// A list of words, each read from text.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn list<T: FromStr>(&self, key: &'static str, expected: &str) -> Result<Vec<T>, CliError> {
        let words = self
            .raw(key)
            .0
            .split(',')
            .map(str::trim)
            .filter(|word| !word.is_empty());
        words
            .map(|word| word.parse().map_err(|_| self.wrong(key, expected)))
            .collect()
    }

    /// The levels of single subsystems, by name.
    pub fn subsystem_levels(&self) -> Vec<(String, String)> {
        let levels = self.set.iter();
        levels
            .filter_map(|(key, (level, _))| Some((key.strip_prefix(LEVELS)?.to_owned(), level.clone())))
            .collect()
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(flag) => Some(flag.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yaml(text: &str) -> Result<Values, CliError> {
        let mut values = Values::default();
        values.add_yaml(text, Path::new("config.yaml"))?;
        Ok(values)
    }

    #[test]
    fn without_any_file_all_defaults_can_be_read() {
        let values = Values::default();
        assert_eq!(values.parsed::<u16>("port", "").unwrap(), 8080);
        assert_eq!(values.size("limits.max_memory_per_instance").unwrap(), 32 << 30);
        assert_eq!(
            values.duration("logging.rotate_interval").unwrap(),
            Duration::from_secs(300)
        );
        assert_eq!(values.text("jwt_secret"), None);
        assert_eq!(
            values
                .list::<std::net::Ipv4Addr>("network.dns_server", "")
                .unwrap()
                .len(),
            1
        );
    }

    #[test]
    fn environment_beats_file_and_flag_beats_both() {
        let mut values =
            yaml("port: \"4973\"\nlimits:\n  max_overlay_size: 1GB\n  max_concurrent_builds: 3\n").unwrap();
        let environment = [
            ("PORT", "5000"),
            ("LIMITS__MAX_OVERLAY_SIZE", "2GB"),
            ("HOME", "/root"),
            ("LANG", "C"),
        ];
        values
            .add_environment(
                environment
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value.to_owned())),
            )
            .unwrap();
        values.set("port", "6000".to_owned(), Origin::Flag).unwrap();
        assert_eq!(values.parsed::<u16>("port", "").unwrap(), 6000);
        assert_eq!(values.size("limits.max_overlay_size").unwrap(), 2 << 30);
        assert_eq!(
            values
                .parsed::<usize>("limits.max_concurrent_builds", "")
                .unwrap(),
            3
        );
    }

    #[test]
    fn unknown_keys_are_refused_with_the_near_one() {
        let failure = yaml("limits:\n  max_overlay_sise: 1GB\n").unwrap_err();
        assert_eq!(
            failure.to_string(),
            "config.yaml: there is no configuration key \"limits.max_overlay_sise\""
        );
        assert_eq!(failure.hint().unwrap(), "did you mean limits.max_overlay_size?");
        let mut values = Values::default();
        let wrong = [("NETWORK__BRIGDE_NAME".to_owned(), "x".to_owned())];
        let failure = values.add_environment(wrong.into_iter()).unwrap_err();
        assert!(
            failure
                .to_string()
                .starts_with("environment variable NETWORK__BRIGDE_NAME"),
            "{failure}"
        );
    }

    #[test]
    fn wrong_values_name_their_place_and_never_the_secret() {
        let values = yaml("port: many\njwt_secret: hush\nlogging:\n  max_size: -1\n").unwrap();
        let failure = values.parsed::<u16>("port", "write a port").unwrap_err();
        assert_eq!(failure.to_string(), "config.yaml: port cannot be \"many\"");
        assert!(values.size("logging.max_size").is_err());
        assert!(!format!("{values:?}").contains("hush"));
    }

    #[test]
    fn lists_subsystems_and_empty_values_are_read() {
        let values = yaml(
            "images:\n  insecure_registries: [localhost:5000, 10.0.0.1]\nlogging:\n  levels: {engine: debug}\nport:\n",
        )
        .unwrap();
        let registries = values.list::<String>("images.insecure_registries", "").unwrap();
        assert_eq!(registries, ["localhost:5000", "10.0.0.1"]);
        assert_eq!(
            values.subsystem_levels(),
            [("engine".to_owned(), "debug".to_owned())]
        );
        assert_eq!(values.parsed::<u16>("port", "").unwrap(), 8080);
        for wrong in [
            "- a",
            "just text",
            "port: [[1]]",
            "a: b: c",
            "logging: {levels: {UP: debug}}",
        ] {
            assert!(yaml(wrong).is_err(), "{wrong}");
        }
        assert!(yaml("").is_ok());
    }
}
