//! The whole server over real connections, with an engine on an empty directory and no VM.

mod authorization;
mod document;
mod envelopes;
mod events;
mod pagers;
mod registry;
mod snapshots;
mod streams;
mod support;
