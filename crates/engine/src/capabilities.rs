//! What this host can do, probed when asked.

use std::net::Ipv4Addr;

use hypeman_network::{Availability, Network};
use hypeman_vmm::{Capabilities, VmmKind};

use crate::shared::Shared;

/// Answer to "what can I do here".
#[derive(Debug, Clone)]
pub struct HostCapabilities {
    /// Which VMM an instance gets when it does not say.
    pub default_runtime: VmmKind,
    /// All kinds of the contract, sorted by name.
    pub runtimes: Vec<RuntimeCapabilities>,
    /// Whether instances can be networked.
    pub network: Availability,
    /// Gateway of the bridge.
    pub gateway: Ipv4Addr,
    /// Network of the bridge, `address/prefix`.
    pub subnet: String,
    /// Platforms of images that run here.
    pub platforms: Vec<String>,
}

/// One kind of VMM.
#[derive(Debug, Clone)]
pub struct RuntimeCapabilities {
    /// Which.
    pub kind: VmmKind,
    /// What it can do here, or why it can't.
    pub capabilities: Capabilities,
}

pub(crate) async fn probe(shared: &Shared) -> HostCapabilities {
    let runtimes = shared.vmms.list().await;
    HostCapabilities {
        default_runtime: shared.options.default_hypervisor,
        runtimes: runtimes
            .into_iter()
            .map(|(kind, capabilities)| RuntimeCapabilities { kind, capabilities })
            .collect(),
        network: Network::probe(&shared.options.network).await,
        gateway: shared.options.network.gateway_address(),
        subnet: shared.options.network.subnet_cidr.to_string(),
        platforms: vec![hypeman_images::Platform::host().to_string()],
    }
}
