//! References, platforms, manifests and archives: what is read, what is refused, and that nothing makes it panic.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on should panic"
)]

mod archives;
mod manifests;
mod references;
