//! Whether this host can give VMs a network, found out without changing anything.

use std::fs::{self, OpenOptions};

use rustix::fs::{Access, access};
use rustix::thread::{CapabilitySet, capabilities};

use crate::error::NetworkError;
use crate::links::Links;
use crate::options::{Availability, NetworkOptions};
use crate::{conflict, firewall, network, tap};

/// The switch that lets the kernel route for VMs.
pub(crate) const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

pub(crate) async fn probe(options: &NetworkOptions) -> Availability {
    match check(options).await {
        Ok(()) => Availability::Available,
        Err(NetworkError::Unavailable(reason)) => Availability::Unavailable { reason },
        Err(error) => Availability::Unavailable {
            reason: error.to_string(),
        },
    }
}

/// All that must hold before anything is changed.
pub(crate) async fn check(options: &NetworkOptions) -> Result<(), NetworkError> {
    options.validate()?;
    let unavailable = |reason: &str| Err(NetworkError::Unavailable(reason.to_owned()));

    let privileged = capabilities(None).is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_ADMIN));
    if !privileged {
        return unavailable(
            "the server lacks the privilege CAP_NET_ADMIN; run it as root or with \
             AmbientCapabilities=CAP_NET_ADMIN, or create instances with network.enabled=false",
        );
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open(tap::TUN_DEVICE) {
        return unavailable(&format!(
            "{} cannot be opened ({error}); load the module with `modprobe tun` and give the server access to it",
            tap::TUN_DEVICE
        ));
    }
    if firewall::find_nft().is_none() {
        return unavailable("the tool nft is missing; install the package nftables");
    }
    let forwards = fs::read_to_string(FORWARDING).is_ok_and(|value| value.trim() == "1");
    if !forwards && access(FORWARDING, Access::WRITE_OK).is_err() {
        return unavailable(
            "IP forwarding is off and the server may not switch it on; run `sysctl -w net.ipv4.ip_forward=1`",
        );
    }
    let links = Links::connect()?;
    if let Some(link) = links.find(&options.bridge_name).await? {
        network::check_own_bridge(&link)?;
    }
    if let Some(uplink) = &options.uplink
        && links.find(uplink).await?.is_none()
    {
        return unavailable(&format!(
            "there is no interface {uplink}; correct the setting uplink or leave it out"
        ));
    }
    let routes = links.routes().await?;
    match conflict::find(&routes, options.subnet_cidr, &options.bridge_name) {
        Some(route) => unavailable(&conflict::advice(route, options.subnet_cidr)),
        None => Ok(()),
    }
}
