//! What host and guest say to each other, and the channel that they say it on.

mod config;
pub use config::{AgentKey, GuestConfig, InitMode, NetworkConfig, Program, VolumeMount, VolumeMode};

mod events;
pub use events::{ExitReason, GuestEvent};
