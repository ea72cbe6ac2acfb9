//! Between the wire and the engine: requests are checked against the grammars, answers are written as the
//! contract wants them.

pub mod image;
pub mod instance;
pub mod listed;
pub mod request;
pub mod snapshot;
