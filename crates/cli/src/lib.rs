//! The `hypeman` command line: one binary that is both the server (`hypeman serve`) and its client.
//!
//! A command is parsed ([`args`]), run (`commands`, one file a family) and printed ([`output`], the only place
//! that writes to standard output). Failures are one type ([`error::CliError`]) that knows its hint and its
//! exit code.
//!
//! Invariants:
//! - Standard output carries results only; progress, notes and errors go to standard error.
//! - Nothing is started (no runtime, no TLS, no file read) before a command needs it: `hypeman version` is instant.
//! - What the server or a guest sends is outside input: bounded, checked, and stripped of control characters
//!   before a terminal sees it.

pub mod args;
pub mod client;
pub mod commands;
pub mod config;
pub mod copy;
mod docker;
mod doctor;
pub mod document;
pub mod error;
pub mod exec;
mod guest_program;
pub mod output;
mod progress;
pub mod settings;
mod sse;
mod websocket;

use std::process::ExitCode;

use clap::Parser;

/// Parses the arguments, runs the command, prints a failure, and answers the exit code.
pub fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let failures = output::Failures::new(&cli.global);
    match commands::dispatch(cli) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failures.report(&failure);
            ExitCode::from(failure.exit_code())
        }
    }
}
