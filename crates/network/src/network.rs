//! The network of this host: open, attach, detach, reconcile.
//!
//! ```text
//! attach:  permission in the set ─► TAP (ours while we hold it) ─► port of the bridge, named by its alias
//!          ─► isolated ─► forwarding and neighbour entries ─► up ─► persistent
//! detach:  TAP away (its port and forwarding entry go with it) ─► neighbour entry ─► permission
//! ```
//! The permission is there before the first frame can pass, and goes last because it is the record of what
//! else belongs to the TAP.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use ipnet::Ipv4Net;
use rtnetlink::packet_route::link::InfoKind;
use tokio::sync::Mutex;

use crate::address::{Address, MacAddress};
use crate::error::NetworkError;
use crate::guests::{self, Guest};
use crate::links::{Link, Links};
use crate::options::{Availability, NetworkOptions, check_interface_name, is_host_address};
use crate::tap::Tap;
use crate::{address, firewall, links, probe, rules};

/// The start of the alias of each TAP that is ours; the instance's id follows.
const ALIAS_PREFIX: &str = "hypeman ";

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

/// The open network. Share it by reference; all methods may run at once.
#[derive(Debug)]
pub struct Network {
    options: NetworkOptions,
    links: Links,
    warnings: Vec<String>,
    /// Held from reading the set of guests to changing it.
    permissions: Mutex<()>,
}

impl Network {
    /// Says whether this host can give VMs a network. Cheap, without effects.
    pub async fn probe(options: &NetworkOptions) -> Availability {
        probe::probe(options).await
    }

    /// Brings the bridge and the rules into being, or finds them as they are. VMs that run are not disturbed.
    ///
    /// # Errors
    /// [`NetworkError::Unavailable`] with the fix, or the kernel's refusal.
    pub async fn open(options: NetworkOptions) -> Result<Self, NetworkError> {
        probe::check(&options).await?;
        let links = Links::connect()?;
        // Rules go first: no port ever exists without them.
        firewall::apply(&rules::render(&options)).await?;
        ensure_bridge(&links, &options).await?;
        if fs::read_to_string(probe::FORWARDING).map_or(true, |value| value.trim() != "1") {
            write_setting(Path::new(probe::FORWARDING), "1")?;
        }
        let warnings = find_warnings(&options).await;
        for warning in &warnings {
            tracing::warn!(bridge = %options.bridge_name, "{warning}");
        }
        Ok(Self {
            options,
            links,
            warnings,
            permissions: Mutex::new(()),
        })
    }

    /// Removes everything that [`Network::open`] and [`Network::attach`] made; IP forwarding stays as it is,
    /// because others may rely on it by now.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn remove(self) -> Result<(), NetworkError> {
        self.reconcile(&BTreeSet::new()).await?;
        if let Some(bridge) = self.links.find(&self.options.bridge_name).await? {
            check_own_bridge(&bridge)?;
            self.links.delete(bridge.index).await?;
        }
        firewall::apply(&rules::render_removal(&self.options)).await
    }

    /// What may keep VMs from the world although everything here is right, with advice.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The settings in force.
    pub fn options(&self) -> &NetworkOptions {
        &self.options
    }

    /// Picks a free address for a new VM; pure.
    ///
    /// # Errors
    /// [`NetworkError::Exhausted`] when none is left.
    pub fn allocate(&self, in_use: &BTreeSet<Ipv4Addr>, seed: u64) -> Result<Address, NetworkError> {
        let subnet = self.options.subnet_cidr;
        let gateway = self.options.gateway_address();
        let ip = address::pick(subnet, gateway, in_use, seed)?;
        Ok(Address {
            ip,
            prefix: subnet.prefix_len(),
            gateway,
            dns: self.options.dns.clone(),
        })
    }

    /// Gives a VM its TAP: an isolated port of the bridge that carries only this MAC and address. Idempotent;
    /// also right for a VM that runs already (adopted after a restart of the server).
    ///
    /// # Errors
    /// Another owner of the name or the address, or the kernel's refusal.
    pub async fn attach(&self, attachment: Attachment) -> Result<(), NetworkError> {
        let (guest, alias) = self.check(&attachment)?;
        let bridge = match self.links.find(&self.options.bridge_name).await? {
            Some(bridge) if bridge.up => bridge.index,
            // Somebody removed it or switched it off under us.
            _ => ensure_bridge(&self.links, &self.options).await?,
        };
        let existing = self.links.find(&guest.tap).await?;
        if existing.as_ref().is_some_and(|link| !owns(link, &alias)) {
            return Err(NetworkError::InterfaceTaken { name: guest.tap });
        }
        let former = self.permit(&guest).await?;
        for old in &former {
            if old.ip != guest.ip {
                self.links.remove_neighbour(bridge, old.ip).await?;
            }
            if let Some(link) = existing.as_ref().filter(|_| old.mac != guest.mac) {
                self.links.remove_forwarding(link.index, old.mac).await?;
            }
        }
        match existing {
            Some(link) => self.connect(&link, bridge, &alias, &guest).await,
            None => {
                let name = guest.tap.clone();
                let tap = blocking(move || Tap::create(&name)).await?;
                let link = self.links.find(&guest.tap).await?;
                let link = link.ok_or_else(|| NetworkError::NoInterface {
                    name: guest.tap.clone(),
                })?;
                self.connect(&link, bridge, &alias, &guest).await?;
                blocking(move || tap.persist()).await
            }
        }
    }

    /// Removes a TAP and all that belongs to it. Idempotent.
    ///
    /// # Errors
    /// The interface is not ours, or the kernel's refusal.
    pub async fn detach(&self, tap: &str) -> Result<(), NetworkError> {
        check_interface_name("tap", tap)?;
        if let Some(link) = self.links.find(tap).await? {
            if !is_ours(&link) {
                return Err(NetworkError::InterfaceTaken { name: tap.to_owned() });
            }
            self.links.delete(link.index).await?;
        }
        let _held = self.permissions.lock().await;
        let gone = self.guests(|guest| guest.tap == tap).await?;
        self.forget(gone).await
    }

    /// Removes every TAP of ours that is not in `keep`, with all that belongs to it, and returns their names.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub async fn reconcile(&self, keep: &BTreeSet<String>) -> Result<Vec<String>, NetworkError> {
        let mut removed = BTreeSet::new();
        let bridge = self
            .links
            .find(&self.options.bridge_name)
            .await?
            .map(|bridge| bridge.index);
        for link in self.links.list().await? {
            let on_our_bridge = bridge.is_some() && link.controller == bridge;
            if on_our_bridge && is_ours(&link) && !keep.contains(&link.name) {
                self.links.delete(link.index).await?;
                removed.insert(link.name);
            }
        }
        let _held = self.permissions.lock().await;
        let gone = self.guests(|guest| !keep.contains(&guest.tap)).await?;
        removed.extend(gone.iter().map(|guest| guest.tap.clone()));
        self.forget(gone).await?;
        if let Some(bridge) = bridge {
            let known: BTreeSet<Ipv4Addr> = self
                .guests(|_| true)
                .await?
                .into_iter()
                .map(|guest| guest.ip)
                .collect();
            for ip in self.links.permanent_neighbours(bridge).await? {
                if !known.contains(&ip) && self.options.subnet_cidr.contains(&ip) {
                    self.links.remove_neighbour(bridge, ip).await?;
                }
            }
        }
        Ok(removed.into_iter().collect())
    }

    /// Bytes that crossed a VM's interface so far.
    ///
    /// # Errors
    /// [`NetworkError::NoInterface`] when there is no such TAP.
    pub fn stats(&self, tap: &str) -> Result<Traffic, NetworkError> {
        let counters = links::counters(tap)?;
        // What the host's side of the TAP sends, the VM receives.
        Ok(Traffic {
            rx_bytes: counters.tx_bytes,
            tx_bytes: counters.rx_bytes,
        })
    }

    fn check(&self, attachment: &Attachment) -> Result<(Guest, String), NetworkError> {
        check_interface_name("tap", &attachment.tap)?;
        let id = &attachment.instance_id;
        let good_id = !id.is_empty()
            && id.len() <= 64
            && id
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_'));
        if !good_id {
            return Err(NetworkError::Invalid(format!("instance id {id:?}")));
        }
        let ip = attachment.ip;
        if !is_host_address(self.options.subnet_cidr, ip) || ip == self.options.gateway_address() {
            let subnet = self.options.subnet_cidr;
            return Err(NetworkError::Invalid(format!(
                "{ip} is not an address for a VM in {subnet}"
            )));
        }
        let mac: MacAddress = attachment.mac.parse()?;
        if mac == bridge_mac(&self.options.bridge_name) {
            return Err(NetworkError::Invalid(format!(
                "{mac} is the bridge's own MAC address"
            )));
        }
        Ok((
            Guest {
                tap: attachment.tap.clone(),
                mac,
                ip,
            },
            format!("{ALIAS_PREFIX}{id}"),
        ))
    }

    /// Lets the port send as `guest` and as nothing else; returns what it was allowed before.
    async fn permit(&self, guest: &Guest) -> Result<Vec<Guest>, NetworkError> {
        let _held = self.permissions.lock().await;
        let (tap, ip) = (guest.tap.clone(), guest.ip);
        let related = self
            .guests(move |other| other.tap == tap || other.ip == ip)
            .await?;
        let mut former = Vec::new();
        for other in related {
            if other.tap != guest.tap {
                return Err(NetworkError::AddressInUse { ip, tap: other.tap });
            }
            if other != *guest {
                former.push(other);
            }
        }
        let (table, remove, add) = (
            self.options.table_name.clone(),
            former.clone(),
            vec![guest.clone()],
        );
        blocking(move || guests::update(&table, &remove, &add)).await?;
        Ok(former)
    }

    async fn connect(
        &self,
        link: &Link,
        bridge: u32,
        alias: &str,
        guest: &Guest,
    ) -> Result<(), NetworkError> {
        if link.controller != Some(bridge) || link.alias.as_deref() != Some(alias) {
            self.links.enslave(link.index, bridge, alias).await?;
        }
        refuse_ipv6(&guest.tap)?;
        self.links.isolate_port(link.index).await?;
        self.links.add_forwarding(link.index, guest.mac).await?;
        self.links.add_neighbour(bridge, guest.ip, guest.mac).await?;
        self.links.set_up(link.index).await
    }

    async fn guests(&self, wanted: impl Fn(&Guest) -> bool + Send) -> Result<Vec<Guest>, NetworkError> {
        let table = self.options.table_name.clone();
        let mut all = blocking(move || guests::list(&table)).await?;
        all.retain(wanted);
        Ok(all)
    }

    /// Removes neighbour entries and permissions of guests whose TAPs are gone.
    async fn forget(&self, gone: Vec<Guest>) -> Result<(), NetworkError> {
        if let Some(bridge) = self.links.find(&self.options.bridge_name).await? {
            for guest in &gone {
                self.links.remove_neighbour(bridge.index, guest.ip).await?;
            }
        }
        let table = self.options.table_name.clone();
        blocking(move || guests::update(&table, &gone, &[])).await
    }
}

/// The bridge's MAC address: of our making, so that it tells whose bridge it is and never changes with the
/// ports; never one of [`crate::mac_address`].
fn bridge_mac(bridge_name: &str) -> MacAddress {
    // FNV-1a: stable over versions, which the hashers of the standard library do not promise.
    let hash = bridge_name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [a, b, c, d, ..] = hash.to_be_bytes();
    MacAddress([0x06, 0x68, a, b, c, d])
}

/// Refuses to touch an interface that bears our bridge's name but was made by somebody else.
pub(crate) fn check_own_bridge(link: &Link) -> Result<(), NetworkError> {
    if link.kind == Some(InfoKind::Bridge) && link.mac == bridge_mac(&link.name).octets() {
        return Ok(());
    }
    let name = &link.name;
    Err(NetworkError::Unavailable(format!(
        "the interface {name} exists and was not made by this program; choose another bridge name, or remove it \
         with `ip link delete {name}` if nothing needs it"
    )))
}

async fn ensure_bridge(links: &Links, options: &NetworkOptions) -> Result<u32, NetworkError> {
    let name = &options.bridge_name;
    if links.find(name).await?.is_none() {
        links.add_bridge(name, bridge_mac(name)).await?;
    }
    let bridge = links
        .find(name)
        .await?
        .ok_or_else(|| NetworkError::NoInterface { name: name.clone() })?;
    check_own_bridge(&bridge)?;
    refuse_ipv6(name)?;
    let gateway = Ipv4Net::new(options.gateway_address(), options.subnet_cidr.prefix_len())
        .map_err(|error| NetworkError::Invalid(error.to_string()))?;
    links.set_address(bridge.index, gateway).await?;
    links.set_up(bridge.index).await?;
    Ok(bridge.index)
}

/// Guests have no IPv6: without an address the host cannot be reached over it, nor does it speak to them.
fn refuse_ipv6(interface: &str) -> Result<(), NetworkError> {
    let setting = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    let setting = Path::new(&setting);
    if setting.exists() {
        write_setting(setting, "1")
    } else {
        Ok(())
    }
}

async fn find_warnings(options: &NetworkOptions) -> Vec<String> {
    let bridge = &options.bridge_name;
    match firewall::foreign_forward_drops(&options.table_name).await {
        Ok(chains) => chains
            .into_iter()
            .map(|chain| {
                format!(
                    "the firewall chain `{chain}` drops forwarded packets by default, so VMs may not reach the \
                     world; allow the bridge there, with Docker: iptables -I DOCKER-USER -i {bridge} -j ACCEPT && \
                     iptables -I DOCKER-USER -o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
                )
            })
            .collect(),
        Err(error) => vec![format!("cannot tell whether another firewall stops VMs: {error}")],
    }
}

fn is_ours(link: &Link) -> bool {
    link.kind == Some(InfoKind::Tun)
        && link
            .alias
            .as_ref()
            .is_some_and(|alias| alias.starts_with(ALIAS_PREFIX))
}

fn owns(link: &Link, alias: &str) -> bool {
    is_ours(link) && link.alias.as_deref() == Some(alias)
}

fn write_setting(path: &Path, value: &str) -> Result<(), NetworkError> {
    fs::write(path, value)
        .map_err(|source| NetworkError::kernel(format!("write {value} to {}", path.display()), source))
}

/// Runs a short system call that may wait for a lock of the kernel away from the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NetworkError> + Send + 'static,
) -> Result<T, NetworkError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(NetworkError::kernel(
            "run a blocking call",
            io::Error::other(error.to_string()),
        ))
    })
}
