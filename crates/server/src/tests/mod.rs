//! The whole server over real connections, with an engine on an empty directory and no VM.

mod authorization;
mod document;
mod envelopes;
mod registry;
mod streams;
mod support;
