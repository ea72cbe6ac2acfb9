//! The data directory, and the secret in it.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use super::Values;
use crate::error::CliError;
use crate::settings::write_private;

/// Name of the file in the data directory that holds the secret that signs tokens.
pub const SECRET_FILE: &str = "jwt_secret";

/// Bytes of randomness in a secret that is made here.
const SECRET_BYTES: usize = 32;

/// A secret file longer than this is not one.
const LONGEST_SECRET: u64 = 64 * 1024;

/// Where the data lies when nothing says otherwise: `/var/lib/hypeman` for root, else `$XDG_DATA_HOME/hypeman`.
///
/// # Errors
/// When there is no home directory to put it in.
pub fn default_data_directory() -> Result<PathBuf, CliError> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/var/lib/hypeman"));
    }
    std::env::var_os("XDG_DATA_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| std::env::home_dir().map(|home| home.join(".local/share")))
        .map(|data| data.join("hypeman"))
        .ok_or_else(|| {
            CliError::usage_with(
                "no place for data: there is no home directory",
                "name one with --data-dir",
            )
        })
}

/// The data directory that the configuration means.
///
/// # Errors
/// When there is none and no default.
pub(crate) fn data_directory(values: &Values) -> Result<PathBuf, CliError> {
    match values.path("data_dir") {
        // A server outlives the directory it was started in.
        Some(path) => std::path::absolute(&path)
            .map_err(|failure| CliError::io(format!("cannot use {}", path.display()), failure)),
        None => default_data_directory(),
    }
}

/// The secret that signs tokens: of the configuration, or of the data directory. `None` when there is none yet.
///
/// # Errors
/// When the file is there and cannot be used.
pub fn find_secret(values: &Values) -> Result<Option<String>, CliError> {
    if let Some(secret) = values.text("jwt_secret") {
        return Ok(Some(secret));
    }
    let path = data_directory(values)?.join(SECRET_FILE);
    let context = || format!("cannot read the secret {}", path.display());
    match fs::metadata(&path) {
        Err(absent) if absent.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(failure) => Err(CliError::io(context(), failure)),
        Ok(metadata) if metadata.len() > LONGEST_SECRET => Err(CliError::failed(format!(
            "{} is too long for a secret",
            path.display()
        ))),
        Ok(metadata) if metadata.mode() & 0o077 != 0 => Err(CliError::failed_with(
            format!("{} can be read by others", path.display()),
            format!(
                "rotate it: `rm {0}`, start the server, make new tokens; or `chmod 600 {0}` if nobody could",
                path.display()
            ),
        )),
        Ok(_) => {
            let text = fs::read_to_string(&path).map_err(|failure| CliError::io(context(), failure))?;
            let secret = text.trim();
            if secret.is_empty() {
                return Err(CliError::failed_with(
                    format!("{} is empty", path.display()),
                    "delete it: the server makes a new one at its next start",
                ));
            }
            Ok(Some(secret.to_owned()))
        }
    }
}

/// The secret, made now when there is none. Answers whether it is new.
///
/// # Errors
/// When the data directory cannot be written.
pub fn make_secret(values: &Values) -> Result<(String, bool), CliError> {
    if let Some(secret) = find_secret(values)? {
        return Ok((secret, false));
    }
    let directory = data_directory(values)?;
    create_private(&directory)?;
    let random: [u8; SECRET_BYTES] = rand::random();
    let secret: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let path = directory.join(SECRET_FILE);
    write_private(&directory, &path, format!("{secret}\n").as_bytes())
        .map_err(|failure| CliError::io(format!("cannot write {}", path.display()), failure))?;
    Ok((secret, true))
}

/// Makes a directory and what is above it; the directory itself is for its owner only.
fn create_private(directory: &Path) -> Result<(), CliError> {
    let context = || format!("cannot make the data directory {}", directory.display());
    if let Some(parent) = directory.parent() {
        fs::create_dir_all(parent).map_err(|failure| CliError::io(context(), failure))?;
    }
    match DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => Ok(()),
        Err(exists) if exists.kind() == io::ErrorKind::AlreadyExists && directory.is_dir() => Ok(()),
        Err(failure) => Err(CliError::io(context(), failure)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::config::Origin;

    fn values(directory: &Path) -> Values {
        let mut values = Values::default();
        values
            .set("data_dir", directory.display().to_string(), Origin::Flag)
            .unwrap();
        values
    }

    #[test]
    fn a_secret_is_made_once_and_kept_private() {
        let temporary = tempfile::tempdir().unwrap();
        let data = temporary.path().join("a/data");
        let values = values(&data);
        assert_eq!(find_secret(&values).unwrap(), None);
        let (secret, new) = make_secret(&values).unwrap();
        assert!(new && secret.len() == 2 * SECRET_BYTES);
        assert_eq!(make_secret(&values).unwrap(), (secret.clone(), false));
        assert_eq!(find_secret(&values).unwrap(), Some(secret));
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&data), mode(&data.join(SECRET_FILE))), (0o700, 0o600));
    }

    #[test]
    fn a_secret_that_others_can_read_is_not_used() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join(SECRET_FILE);
        fs::write(&path, "secret\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(
            find_secret(&values(temporary.path()))
                .unwrap_err()
                .to_string()
                .contains("read by others")
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(
            find_secret(&values(temporary.path())).unwrap().as_deref(),
            Some("secret")
        );
        fs::write(&path, "\n").unwrap();
        assert!(find_secret(&values(temporary.path())).is_err());
    }

    #[test]
    fn the_configured_secret_comes_first() {
        let temporary = tempfile::tempdir().unwrap();
        let mut values = values(temporary.path());
        values
            .set("jwt_secret", "configured".to_owned(), Origin::Flag)
            .unwrap();
        assert_eq!(make_secret(&values).unwrap(), ("configured".to_owned(), false));
        assert!(!temporary.path().join(SECRET_FILE).exists());
    }
}
