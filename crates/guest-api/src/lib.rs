//! What host and guest say to each other, and the channel that they say it on.
//!
//! ```text
//!   bytes (virtio-serial or vsock)
//!     └─ handshake   preamble, proof, begin: resynchronises and authenticates   (handshake)
//!         └─ yamux   the host opens streams, the guest answers                  (mux)
//!             └─ frames   kind, length, payload: JSON headers and raw data      (frame)
//!                 └─ messages   one request a stream, then what it needs        (message)
//! ```
//!
//! What the workload prints takes a way of its own: a port where there is one, else [`workload_log`].
//!
//! The host is the yamux client and the only side that opens streams. Evolution is additive: unknown
//! fields are ignored, an unknown request is answered with [`RefusalCode::Unsupported`].

mod config;
pub use config::{
    AgentKey, GuestConfig, InitMode, NetworkConfig, Program, Reconfiguration, VolumeMode, VolumeMount,
};

mod error;
pub use error::ChannelError;

mod events;
pub use events::{ExitReason, GuestEvent};

pub mod frame;
pub mod handshake;

#[cfg(feature = "host")]
pub mod host;

mod init_command;
pub use init_command::is_init_command;

mod message;
pub use message::{
    CopyEntry, CopyFrom, CopyMessage, CopyTo, EntryKind, EventMessage, ExecControl, ExecEvent, ExecRequest,
    PathInfo, Refusal, RefusalCode, Reply, Request,
};

pub mod mux;
pub mod workload_log;

/// Name of the virtio-serial port that carries the channel on QEMU.
pub const AGENT_PORT_NAME: &str = "hypeman.agent.0";

/// Name of the virtio-serial port that receives what the workload prints.
pub const LOG_PORT_NAME: &str = "hypeman.log.0";

/// vsock port on which the agent listens where the machine has a vsock device.
pub const AGENT_VSOCK_PORT: u32 = 2222;

/// vsock port on which the host takes what the workload prints, see [`workload_log`].
pub const LOG_VSOCK_PORT: u32 = 2223;
