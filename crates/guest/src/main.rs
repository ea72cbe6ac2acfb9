//! The program that the kernel starts as process 1.
//!
//! The C entry point is ours, because Rust's own start-up opens `/dev/null` where standard descriptors are
//! missing and aborts without it, and an initramfs needs no device nodes.
#![no_main]
#![allow(unsafe_code)]

use std::ffi::{c_char, c_int};

/// Called by the C library.
///
/// # Safety
/// `arguments` is the process's argument vector.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn main(_count: c_int, arguments: *const *mut c_char) -> c_int {
    if std::process::id() != 1 {
        let message = b"hypeman-guest runs as process 1 of a virtual machine\n";
        // Whoever started it by hand reads this or does not.
        let _ = rustix::io::write(rustix::stdio::stderr(), message);
        return 2;
    }
    // SAFETY: the C library passes a vector of strings that lives as long as the process; the first one exists
    // because the kernel starts process 1 with its path.
    let name = unsafe { *arguments };
    hypeman_guest::machine::run(hypeman_guest::machine::ProcessName::new(name))
}
