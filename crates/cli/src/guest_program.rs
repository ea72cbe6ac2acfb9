//! The static guest program: embedded by the build, configured, or beside the executable.

use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};

use crate::config::Values;
use crate::error::CliError;

include!(concat!(env!("OUT_DIR"), "/guest.rs"));

/// Name of the program beside the executable.
const NAME: &str = "hypeman-guest";

/// A program larger than this is not ours: it is read into memory at each boot of each guest.
const LARGEST: u64 = 64 * 1024 * 1024;

/// Where a program was found.
#[derive(Debug)]
pub(crate) struct GuestProgram {
    pub(crate) bytes: Cow<'static, [u8]>,
    pub(crate) origin: String,
}

/// Finds the program: what is configured, else what is embedded, else what lies beside the executable.
///
/// # Errors
/// When there is none, or what is there is no static ELF program.
pub(crate) fn find(values: &Values) -> Result<GuestProgram, CliError> {
    if let Some(path) = values.path("guest_binary") {
        return read(&path);
    }
    if let Some(embedded) = EMBEDDED {
        return Ok(GuestProgram {
            bytes: Cow::Borrowed(embedded),
            origin: "embedded".to_owned(),
        });
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|program| Some(program.parent()?.join(NAME)));
    match beside {
        Some(path) if path.is_file() => read(&path),
        beside => {
            let place = beside.unwrap_or_else(|| PathBuf::from(NAME));
            Err(CliError::failed_with(
                format!(
                    "the guest program is missing: this build has none in it, and there is none at {}",
                    place.display()
                ),
                "build it with `cargo build -p hypeman-guest --profile guest --target x86_64-unknown-linux-musl` and \
                 name it in guest_binary of the configuration (or GUEST_BINARY), or build hypeman after it",
            ))
        }
    }
}

fn read(path: &Path) -> Result<GuestProgram, CliError> {
    let context = |failure| {
        CliError::io(
            format!("cannot read the guest program {}", path.display()),
            failure,
        )
    };
    let size = fs::metadata(path).map_err(context)?.len();
    if size > LARGEST {
        return Err(CliError::failed(format!(
            "{} is too large to be the guest program",
            path.display()
        )));
    }
    let bytes = fs::read(path).map_err(context)?;
    if !bytes.starts_with(b"\x7fELF") {
        return Err(CliError::failed(format!("{} is no program", path.display())));
    }
    Ok(GuestProgram {
        bytes: Cow::Owned(bytes),
        origin: path.display().to_string(),
    })
}
