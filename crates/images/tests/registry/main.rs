//! The registry client against a real registry on loopback that can be told to misbehave.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on should panic"
)]

mod auth;
mod bad_days;
mod distribution;
mod helpers;
mod parallel;
mod pull;
mod push;
mod security;
mod support;
mod tls;
