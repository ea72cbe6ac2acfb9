//! What the stories are told with: a real server in a private directory, a client, images made on the spot.
//!
//! The stories stand in `stories/`, one file for each part of the product. They talk to the server as users do,
//! over HTTP, WebSocket and the command line, and know nothing of its inside.
//!
//! Invariants:
//! - A story cleans up also when it fails: [`Server`] ends its process and every VMM of its data directory.
//! - Only processes that belong to the story's own data directory are ever signalled.
//! - No story asserts how long something takes; waits are generous and only guard against waiting for ever.

// The whole crate is test code: a failed expectation is how it reports.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::missing_panics_doc
)]

mod client;
mod clock;
mod command;
mod copy;
mod counting;
mod exec;
mod files;
mod guest;
mod host;
mod image;
mod interrupt;
mod processes;
mod server;
mod snapshot;
mod sse;
mod token;
mod upstream;

pub use client::{Client, Reply, encode};
pub use clock::Clock;
pub use command::{CommandLine, Finished};
pub use copy::Entry;
pub use counting::COUNTS_ON;
pub use exec::{ExecSession, Executed};
pub use files::{files, flip};
pub use guest::Guest;
pub use host::{
    LoopDisk, any_hypervisor, have, hypervisors, is_root, kernel, kvm_kernel, makes, offers, repository,
    told_on,
};
pub use image::{Image, ImageBuilder, LayerBuilder, MediaFamily, sha256};
pub use processes::{VmmProcess, pagers_of, vmms_of};
pub use server::{Server, ServerOptions};
pub use snapshot::Snapshot;
pub use sse::{EventStream, LogStream};
pub use token::{Claims, mint, mint_with};
pub use upstream::Upstream;

use std::time::Duration;

/// How long a story waits before it gives up on something that should have happened. Not an expectation of speed.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Waits until `condition` holds, looking again and again; fails the story when [`PATIENCE`] is over.
pub async fn eventually<F, Fut>(what: &str, mut condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let end = tokio::time::Instant::now() + PATIENCE;
    while !condition().await {
        assert!(tokio::time::Instant::now() < end, "gave up waiting: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// What the host may not be able to give; without it leaves the story and says why.
#[macro_export]
macro_rules! or_skip {
    ($given:expr, $($reason:tt)+) => {
        match $given {
            Some(given) => given,
            None => {
                eprintln!("SKIPPED: {}", format!($($reason)+));
                return;
            }
        }
    };
}

/// Leaves the story when the host lacks something, and says so.
#[macro_export]
macro_rules! skip_unless {
    ($condition:expr, $($reason:tt)+) => {
        if !$condition {
            eprintln!("SKIPPED: {}", format!($($reason)+));
            return;
        }
    };
}
