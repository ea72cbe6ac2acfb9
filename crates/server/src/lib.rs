//! The HTTP server: the API, its WebSocket streams, and the OCI registry.
//!
//! ```text
//!  connection ─► request id, access log, panic guard ─► route table ─► authorisation, time limit ─► handler
//!                                                                                                     │
//!                 engine ◄── convert (grammars, defaults) ◄── extract (bounded body, query, tags) ◄───┘
//! ```
//!
//! Invariants:
//! - Every answer outside `/v2` that is not a success is the error envelope, with a stable code.
//! - Nothing is buffered whole except JSON bodies and manifests, both bounded.
//! - Stopping the server never stops a VM.

mod all_instances;
pub mod auth;
mod convert;
mod error;
mod extract;
mod handlers;
mod linger;
mod middleware;
pub mod openapi;
mod registry;
mod routes;
mod serve;
mod state;
mod strict;

pub use error::ApiError;
pub use serve::{BoundServer, ServeError, ServerConfig, bind, serve};

#[cfg(test)]
mod tests;
