//! Between the wire and the engine: requests are checked against the grammars, answers are written as the
//! contract wants them.

pub mod compression;
pub mod fork;
pub mod image;
pub mod instance;
pub mod listed;
pub mod request;
#[cfg(test)]
mod samples;
pub mod schedule;
pub mod snapshot;
