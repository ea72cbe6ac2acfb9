//! The configuration that a guest waits for: who it is and what it runs.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Secret of one boot: both ends prove that they know it whenever the channel is re-established.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentKey(
    /// 32 random bytes.
    pub [u8; 32],
);

impl std::fmt::Debug for AgentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AgentKey(..)")
    }
}

/// Everything that a booted guest needs to become an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestConfig {
    /// Secret of this boot.
    pub key: AgentKey,
    /// Instance id, for `/etc/machine-id` (hashed) and logs.
    pub instance_id: String,
    /// Host name.
    pub hostname: String,
    /// Wall clock of the host, nanoseconds since 1970, taken when the message was sent.
    pub time_unix_nanos: i128,
    /// Fresh bytes for the kernel's entropy pool, credited.
    pub entropy: Vec<u8>,
    /// How the image's program is started.
    pub init_mode: InitMode,
    /// The image's program.
    pub program: Program,
    /// Address of the first interface; `None` leaves only loopback.
    pub network: Option<NetworkConfig>,
    /// Data volumes; disks follow the root (`vda`) and the overlay (`vdb`) in order.
    pub volumes: Vec<VolumeMount>,
    /// Do not serve exec, copy and stat (the `skip_guest_agent` of the API).
    pub skip_agent: bool,
}

/// Who is process 1 of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum InitMode {
    /// The guest program stays process 1 and runs the image's command.
    Exec,
    /// The image brings its own init, which becomes process 1.
    Systemd,
}

/// A command as the image and the request define it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Entrypoint and command, joined. Never empty: `/bin/sh` stands in for nothing.
    pub argv: Vec<String>,
    /// `NAME=value`, image first, request over it.
    pub environment: Vec<(String, String)>,
    /// Working directory, created if missing. Empty means `/`.
    pub working_directory: String,
    /// `user[:group]` of the image, names or numbers. Empty means root.
    pub user: String,
}

/// Static address of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkConfig {
    /// Address of the guest.
    pub address: Ipv4Addr,
    /// Prefix length of its network.
    pub prefix_length: u8,
    /// Default gateway.
    pub gateway: Ipv4Addr,
    /// Resolvers, in order.
    pub dns: Vec<Ipv4Addr>,
    /// MAC address to set; `None` keeps the device's.
    pub mac: Option<String>,
}

/// A data volume in the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeMount {
    /// Block device, such as `/dev/vdc`.
    pub device: String,
    /// Where it is mounted.
    pub path: String,
    /// How.
    pub mode: VolumeMode,
}

/// How a volume is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeMode {
    /// Read only.
    Ro,
    /// Read and write.
    Rw,
    /// Read-only base with a private writable layer on another device.
    Overlay {
        /// Block device of the layer.
        device: String,
    },
}

/// A new identity for a guest that already runs (after a fork). `None` keeps what is there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconfiguration {
    /// Secret from now on; also of connections made later.
    pub key: AgentKey,
    /// Instance id, for `/etc/machine-id`.
    pub instance_id: String,
    /// Host name.
    pub hostname: String,
    /// Wall clock of the host, nanoseconds since 1970.
    pub time_unix_nanos: i128,
    /// Fresh bytes for the kernel's entropy pool, at least 32, credited; the generator takes new keys at once.
    pub entropy: Vec<u8>,
    /// Address of the first interface; `None` takes its address away.
    pub network: Option<NetworkConfig>,
}
