//! How the network of this host is set up, and whether it can be.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use crate::error::NetworkError;

/// The longest interface name that Linux takes.
pub(crate) const INTERFACE_NAME_MAX: usize = 15;

/// The settings of the one network of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkOptions {
    /// Name of the bridge, at most 15 characters.
    pub bridge_name: String,
    /// Addresses of the VMs and of the gateway.
    pub subnet_cidr: Ipv4Net,
    /// The host's address on the bridge; the first of the subnet when absent.
    pub gateway: Option<Ipv4Addr>,
    /// The only interface through which VMs reach the world; whatever the host's routes say when absent.
    pub uplink: Option<String>,
    /// Name servers that guests are told to use.
    pub dns: Vec<Ipv4Addr>,
    /// Name of our nftables tables (families `bridge` and `inet`); see [`NetworkOptions::table_for`].
    pub table_name: String,
    /// TCP and UDP ports of the gateway address that guests may reach; all others are closed to them.
    pub gateway_ports: BTreeSet<u16>,
}

impl Default for NetworkOptions {
    fn default() -> Self {
        Self::for_bridge("vmbr0")
    }
}

impl NetworkOptions {
    /// The default network on a bridge of this name.
    pub fn for_bridge(bridge_name: &str) -> Self {
        Self {
            bridge_name: bridge_name.to_owned(),
            subnet_cidr: Ipv4Net::new_assert(Ipv4Addr::new(10, 100, 0, 0), 16),
            gateway: None,
            uplink: None,
            dns: vec![Ipv4Addr::new(1, 1, 1, 1)],
            table_name: Self::table_for(bridge_name),
            gateway_ports: BTreeSet::new(),
        }
    }

    /// The name of the nftables tables that go with a bridge.
    pub fn table_for(bridge_name: &str) -> String {
        let tail: String = bridge_name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '_' })
            .collect();
        format!("hypeman_{tail}")
    }

    /// The gateway's address: the chosen one, or the first of the subnet.
    pub fn gateway_address(&self) -> Ipv4Addr {
        self.gateway
            .unwrap_or_else(|| Ipv4Addr::from(u32::from(self.subnet_cidr.network()).wrapping_add(1)))
    }

    /// Checks everything that can be checked without looking at the host.
    ///
    /// # Errors
    /// [`NetworkError::Invalid`], naming the setting.
    pub fn validate(&self) -> Result<(), NetworkError> {
        check_interface_name("bridge_name", &self.bridge_name)?;
        if let Some(uplink) = &self.uplink {
            check_interface_name("uplink", uplink)?;
            if *uplink == self.bridge_name {
                return Err(NetworkError::Invalid(
                    "uplink must not be the bridge itself".into(),
                ));
            }
        }
        let table = &self.table_name;
        let starts_well = table.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !starts_well || table.len() > 64 || !table.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            return Err(NetworkError::Invalid(format!(
                "table_name {table:?}: use at most 64 letters, digits and underscores"
            )));
        }
        let subnet = self.subnet_cidr;
        if subnet.prefix_len() < 8 || subnet.prefix_len() > 29 {
            return Err(NetworkError::Invalid(format!(
                "subnet_cidr {subnet}: the prefix must be 8 to 29"
            )));
        }
        if subnet.trunc() != subnet {
            return Err(NetworkError::Invalid(format!(
                "subnet_cidr {subnet} has host bits set; did you mean {}?",
                subnet.trunc()
            )));
        }
        let network = subnet.network();
        if network.is_loopback()
            || network.is_link_local()
            || network.is_multicast()
            || network.octets()[0] == 0
        {
            return Err(NetworkError::Invalid(format!(
                "subnet_cidr {subnet} is a reserved range"
            )));
        }
        let gateway = self.gateway_address();
        if !is_host_address(subnet, gateway) {
            return Err(NetworkError::Invalid(format!(
                "gateway {gateway} is not a host address of {subnet}"
            )));
        }
        Ok(())
    }
}

/// Whether `ip` lies in `subnet` and is neither its network nor its broadcast address.
pub(crate) fn is_host_address(subnet: Ipv4Net, ip: Ipv4Addr) -> bool {
    subnet.contains(&ip) && ip != subnet.network() && ip != subnet.broadcast()
}

/// Accepts the names that are safe in a path, in a rule set and to the kernel.
pub(crate) fn check_interface_name(what: &str, name: &str) -> Result<(), NetworkError> {
    let good = !name.is_empty()
        && name.len() <= INTERFACE_NAME_MAX
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if good {
        return Ok(());
    }
    Err(NetworkError::Invalid(format!(
        "{what} {name:?}: use 1 to {INTERFACE_NAME_MAX} letters, digits, '-', '_' and '.', letter or digit first"
    )))
}

/// Whether this host can give VMs a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Availability {
    /// It can.
    Available,
    /// It cannot.
    Unavailable {
        /// Why, and what to do about it.
        reason: String,
    },
}
