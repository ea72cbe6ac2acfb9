//! The server's configuration: defaults, a YAML file, the environment, flags; the later wins.
//!
//! One table ([`keys::KEYS`]) names every key with its default. The file may be nested or dotted; the environment
//! spells a key in capitals with two underscores for each level (`LIMITS__MAX_OVERLAY_SIZE`). A key that the table
//! does not have is refused with the nearest one that it has, so that a typing error never silently means the
//! default.

mod data;
mod images;
mod keys;
pub(crate) mod options;
mod values;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub(crate) use data::data_directory;
pub use data::{SECRET_FILE, default_data_directory, find_secret, make_secret};
pub use keys::{KEYS, Key, nearest};
pub use values::{Origin, Values};

use crate::error::CliError;
use crate::settings::configuration_home;

/// A configuration file larger than this is not one.
const LARGEST_FILE: u64 = 1024 * 1024;

/// What the command line says about the server's configuration.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// The file to read instead of the usual places.
    pub file: Option<PathBuf>,
    /// Values by key.
    pub values: Vec<(&'static str, String)>,
}

/// Loads the configuration of this machine.
///
/// # Errors
/// When a file cannot be read or has keys or values that make no sense.
pub fn load(overrides: &Overrides) -> Result<Values, CliError> {
    let mut values = Values::default();
    if let Some(path) = file_to_read(overrides) {
        let text = read(&path)?;
        values.add_yaml(&text, &path)?;
    }
    values.add_environment(std::env::vars())?;
    for (key, value) in &overrides.values {
        values.set(key, value.clone(), Origin::Flag)?;
    }
    Ok(values)
}

/// The file that counts: the one that was named, or the first of the usual ones that exists.
fn file_to_read(overrides: &Overrides) -> Option<PathBuf> {
    if let Some(named) = &overrides.file {
        return Some(named.clone());
    }
    if let Some(named) = std::env::var_os("CONFIG_PATH").filter(|path| !path.is_empty()) {
        return Some(PathBuf::from(named));
    }
    let usual = [
        Some(PathBuf::from("/etc/hypeman/config.yaml")),
        configuration_home().map(|home| home.join("hypeman/config.yaml")),
    ];
    usual.into_iter().flatten().find(|path| path.exists())
}

fn read(path: &Path) -> Result<String, CliError> {
    let context = |failure: io::Error| CliError::io(format!("cannot read {}", path.display()), failure);
    let size = fs::metadata(path).map_err(context)?.len();
    if size > LARGEST_FILE {
        return Err(CliError::usage(format!(
            "{} is too large for a configuration",
            path.display()
        )));
    }
    fs::read_to_string(path).map_err(context)
}
