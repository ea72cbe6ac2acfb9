//! Networking of VMs on one Linux host: a bridge, one TAP per VM, addresses, NAT and isolation.
//!
//! ```text
//!   VM ── TAP hype-… ─┐ isolated port, no learning, no flooding, static forwarding entry
//!   VM ── TAP hype-… ─┼── bridge vmbr0 (gateway address) ── routing ── uplink ── the world
//!   VM ── TAP hype-… ─┘        │                              │
//!                     table bridge: a frame must carry    table inet: metadata ranges dropped
//!                     the MAC and address of its port     first, host and other VMs closed, NAT
//! ```
//!
//! Invariants:
//! * A guest reaches neither another guest, nor the host (beyond ping and the chosen ports), nor a
//!   metadata service; it cannot send under another address or MAC.
//! * Every effect is idempotent, and what belongs to a TAP can be found again from the kernel alone (the
//!   interface alias and the elements of the nftables set), so nothing depends on this process's memory.
//! * A TAP becomes persistent only after it is an isolated port of the bridge: a crash at any instant leaves
//!   either nothing or something that [`Network::reconcile`] finds.
//! * No text of a user reaches a kernel interface or a tool: only checked names, numbers and addresses do.

mod address;
mod conflict;
mod error;
mod firewall;
mod guests;
#[cfg(test)]
mod host_tests;
mod links;
mod network;
mod options;
mod probe;
mod rules;
mod tap;

pub use address::{Address, MacAddress, mac_address, tap_name};
pub use error::NetworkError;
pub use ipnet::Ipv4Net;
pub use network::{Attachment, Network, Traffic};
pub use options::{Availability, NetworkOptions};
