//! Loads the kernel modules that the initramfs brings, in the order that it names.

use std::{fs, path::Path};

use rustix::{io::Errno, system::finit_module};

use crate::log_line;

const ORDER: &str = "/modules/order";

/// `MODULE_INIT_COMPRESSED_FILE` of the kernel.
const COMPRESSED: i32 = 4;

/// Loads them all. A kernel with everything built in has no list; a module that fails is logged and skipped,
/// because whether it was needed shows later and better.
pub(super) fn load() {
    let Ok(order) = fs::read_to_string(ORDER) else {
        return;
    };
    for name in order.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let path = if name.starts_with('/') {
            name.to_owned()
        } else {
            format!("/modules/{name}")
        };
        let flags = if Path::new(name).extension().is_some_and(|kind| kind != "ko") {
            COMPRESSED
        } else {
            0
        };
        let loaded = fs::File::open(&path)
            .map_err(|error| error.to_string())
            .and_then(|file| match finit_module(&file, c"", flags) {
                Ok(()) | Err(Errno::EXIST) => Ok(()),
                Err(error) => Err(error.to_string()),
            });
        if let Err(error) = loaded {
            log_line!("module {path}: {error}");
        }
    }
}
