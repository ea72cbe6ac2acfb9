//! Lines for people, in the kernel's log: the only place that exists from the first to the last moment.

use std::{fs::File, io::Write, sync::OnceLock};

static KERNEL_LOG: OnceLock<File> = OnceLock::new();

/// Opens the kernel log; without it, lines go nowhere.
pub fn open() {
    if let Ok(file) = File::options().write(true).open("/dev/kmsg") {
        // A second call changes nothing.
        let _ = KERNEL_LOG.set(file);
    }
}

/// Writes one line.
pub fn line(message: std::fmt::Arguments<'_>) {
    if let Some(mut file) = KERNEL_LOG.get() {
        // The kernel takes one line a write; there is nobody to tell when it does not.
        let _ = file.write_all(format!("<6>hypeman-guest: {message}\n").as_bytes());
    }
}

/// Writes one formatted line to the kernel log.
#[macro_export]
macro_rules! log_line {
    ($($argument:tt)*) => { $crate::log::line(format_args!($($argument)*)) };
}
