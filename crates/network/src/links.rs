//! Links, addresses, neighbours and routes over netlink: the few requests that a bridge of VMs needs.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use futures::TryStreamExt as _;
use ipnet::Ipv4Net;
use rtnetlink::packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage, Stats64};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rtnetlink::sys::{Socket, SocketAddr};
use rtnetlink::{Handle, LinkBridge, LinkBridgePort, LinkUnspec};

use crate::address::MacAddress;
use crate::conflict::Route;
use crate::error::NetworkError;

/// A link, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) index: u32,
    pub(crate) name: String,
    pub(crate) kind: Option<InfoKind>,
    pub(crate) alias: Option<String>,
    pub(crate) mac: Vec<u8>,
    pub(crate) controller: Option<u32>,
    pub(crate) up: bool,
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            kind: None,
            alias: None,
            mac: Vec::new(),
            controller: None,
            up: message.header.flags.contains(LinkFlags::Up),
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Address(mac) => link.mac = mac,
                LinkAttribute::Controller(index) => link.controller = Some(index),
                LinkAttribute::LinkInfo(infos) => {
                    link.kind = infos.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        link
    }
}

/// The requests. A clone shares the connection.
#[derive(Debug, Clone)]
pub(crate) struct Links {
    handle: Handle,
}

impl Links {
    /// Connects to the kernel; the connection ends with the last clone.
    pub(crate) fn connect() -> Result<Self, NetworkError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|source| NetworkError::kernel("open a netlink socket", source))?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    pub(crate) async fn find(&self, name: &str) -> Result<Option<Link>, NetworkError> {
        let answer = self
            .handle
            .link()
            .get()
            .match_name(name)
            .execute()
            .try_next()
            .await;
        match answer {
            Ok(message) => Ok(message.map(Link::from)),
            Err(error) if error_number(&error) == Some(libc::ENODEV) => Ok(None),
            Err(error) => Err(refused(format!("look up the interface {name}"), error)),
        }
    }

    pub(crate) async fn list(&self) -> Result<Vec<Link>, NetworkError> {
        let links = self
            .handle
            .link()
            .get()
            .execute()
            .map_ok(Link::from)
            .try_collect();
        links.await.map_err(|error| refused("list the interfaces", error))
    }

    pub(crate) async fn add_bridge(&self, name: &str, mac: MacAddress) -> Result<(), NetworkError> {
        let bridge = LinkBridge::new(name)
            .address(mac.octets().to_vec())
            .mcast_snooping(false)
            .build();
        let answer = self.handle.link().add(bridge).execute().await;
        unless(answer, libc::EEXIST, || format!("create the bridge {name}"))
    }

    pub(crate) async fn set_up(&self, index: u32) -> Result<(), NetworkError> {
        let answer = self
            .handle
            .link()
            .set(LinkUnspec::new_with_index(index).up().build())
            .execute()
            .await;
        answer.map_err(|error| refused("switch an interface on", error))
    }

    pub(crate) async fn delete(&self, index: u32) -> Result<(), NetworkError> {
        let answer = self.handle.link().del(index).execute().await;
        unless(answer, libc::ENODEV, || "remove an interface".to_owned())
    }

    /// Makes a link a port of the bridge and names its owner, in one step.
    pub(crate) async fn enslave(&self, link: u32, bridge: u32, alias: &str) -> Result<(), NetworkError> {
        let change = LinkUnspec::new_with_index(link)
            .alias(alias)
            .controller(bridge)
            .build();
        self.handle
            .link()
            .set(change)
            .execute()
            .await
            .map_err(|error| match error_number(&error) {
                Some(libc::EXFULL) => NetworkError::Unavailable(
                    "the bridge has no port left (the kernel allows 1023); delete instances".to_owned(),
                ),
                _ => refused("join an interface to the bridge", error),
            })
    }

    /// No frame between ports, nothing learned, nothing flooded: a port receives only what is addressed to the
    /// MAC of its static entry.
    pub(crate) async fn isolate_port(&self, link: u32) -> Result<(), NetworkError> {
        let port = LinkBridgePort::new(link)
            .isolated(true)
            .learning(false)
            .flood(false)
            .mcast_flood(false)
            .bcast_flood(false)
            .hairpin(false)
            .guard(true)
            .build();
        let answer = self
            .handle
            .link()
            .set_port(port)
            .set_flags(PORT_CHANGE)
            .execute()
            .await;
        answer.map_err(|error| refused("isolate a port of the bridge", error))
    }

    pub(crate) async fn add_forwarding(&self, link: u32, mac: MacAddress) -> Result<(), NetworkError> {
        let entry = self.handle.neighbours().add_bridge(link, &mac.octets());
        let entry = entry
            .state(NeighbourState::Noarp)
            .flags(NeighbourFlags::Controller)
            .replace();
        entry
            .execute()
            .await
            .map_err(|error| refused(format!("add a forwarding entry for {mac}"), error))
    }

    pub(crate) async fn remove_forwarding(&self, link: u32, mac: MacAddress) -> Result<(), NetworkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = link;
        message.header.flags = NeighbourFlags::Controller;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.octets().to_vec()));
        let answer = self.handle.neighbours().del(message).execute().await;
        unless(answer, libc::ENOENT, || {
            format!("remove the forwarding entry of {mac}")
        })
    }

    pub(crate) async fn add_neighbour(
        &self,
        link: u32,
        ip: Ipv4Addr,
        mac: MacAddress,
    ) -> Result<(), NetworkError> {
        let entry = self
            .handle
            .neighbours()
            .add(link, IpAddr::V4(ip))
            .link_layer_address(&mac.octets())
            .replace();
        entry
            .execute()
            .await
            .map_err(|error| refused(format!("add a neighbour entry for {ip}"), error))
    }

    pub(crate) async fn remove_neighbour(&self, link: u32, ip: Ipv4Addr) -> Result<(), NetworkError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = link;
        message
            .attributes
            .push(NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)));
        let answer = self.handle.neighbours().del(message).execute().await;
        unless(answer, libc::ENOENT, || {
            format!("remove the neighbour entry of {ip}")
        })
    }

    /// Addresses with a permanent neighbour entry on a link.
    pub(crate) async fn permanent_neighbours(&self, link: u32) -> Result<Vec<Ipv4Addr>, NetworkError> {
        let request = self
            .handle
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Inet);
        let entries: Vec<NeighbourMessage> = request
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("list the neighbours", error))?;
        let ours = entries
            .into_iter()
            .filter(|entry| entry.header.ifindex == link && entry.header.state == NeighbourState::Permanent);
        Ok(ours
            .filter_map(|entry| {
                entry
                    .attributes
                    .into_iter()
                    .find_map(|attribute| match attribute {
                        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(ip),
                        _ => None,
                    })
            })
            .collect())
    }

    /// Makes `address` the only IPv4 address of a link.
    pub(crate) async fn set_address(&self, link: u32, address: Ipv4Net) -> Result<(), NetworkError> {
        let request = self.handle.address().get().set_link_index_filter(link);
        let existing: Vec<_> = request
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("list addresses", error))?;
        let mut present = false;
        for message in existing {
            let ip = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(ip)) => Some(*ip),
                _ => None,
            });
            let Some(ip) = ip else { continue };
            if ip == address.addr() && message.header.prefix_len == address.prefix_len() {
                present = true;
                continue;
            }
            let answer = self.handle.address().del(message).execute().await;
            unless(answer, libc::EADDRNOTAVAIL, || {
                format!("remove the former address {ip}")
            })?;
        }
        if present {
            return Ok(());
        }
        let request = self
            .handle
            .address()
            .add(link, IpAddr::V4(address.addr()), address.prefix_len());
        unless(request.execute().await, libc::EEXIST, || {
            format!("set the address {address}")
        })
    }

    /// The host's IPv4 routes.
    pub(crate) async fn routes(&self) -> Result<Vec<Route>, NetworkError> {
        let names: Vec<(u32, String)> = self
            .list()
            .await?
            .into_iter()
            .map(|link| (link.index, link.name))
            .collect();
        let mut filter = RouteMessage::default();
        filter.header.address_family = AddressFamily::Inet;
        let messages: Vec<RouteMessage> = self
            .handle
            .route()
            .get(filter)
            .execute()
            .try_collect()
            .await
            .map_err(|error| refused("list the routes", error))?;
        Ok(messages
            .into_iter()
            .filter_map(|message| route(&message, &names))
            .collect())
    }
}

/// A change of a port goes to an existing link and must not create one.
const PORT_CHANGE: u16 = NLM_F_REQUEST | rtnetlink::packet_core::NLM_F_ACK;

fn route(message: &RouteMessage, names: &[(u32, String)]) -> Option<Route> {
    let mut destination = Ipv4Addr::UNSPECIFIED;
    let mut interface = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => destination = *ip,
            RouteAttribute::Oif(index) => {
                interface = names
                    .iter()
                    .find(|(known, _)| known == index)
                    .map(|(_, name)| name.clone());
            }
            _ => {}
        }
    }
    let destination = Ipv4Net::new(destination, message.header.destination_prefix_length).ok()?;
    Some(Route {
        destination,
        interface,
    })
}

/// Counters of a link. Blocking, and quick: the kernel answers within the request.
pub(crate) fn counters(name: &str) -> Result<Stats64, NetworkError> {
    crate::options::check_interface_name("tap", name)?;
    let fail = |source: io::Error| match source.raw_os_error() {
        Some(libc::ENODEV) => NetworkError::NoInterface {
            name: name.to_owned(),
        },
        _ => NetworkError::kernel(format!("read the counters of {name}"), source),
    };
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut message = NetlinkMessage::new(
        header,
        NetlinkPayload::from(RouteNetlinkMessage::GetLink(request)),
    );
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);

    let exchange = || -> io::Result<Vec<u8>> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.send(&bytes, 0)?;
        Ok(socket.recv_from_full()?.0)
    };
    let answer = exchange().map_err(fail)?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
        .map_err(|error| fail(io::Error::new(io::ErrorKind::InvalidData, error.to_string())))?;
    match answer.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => link
            .attributes
            .into_iter()
            .find_map(|attribute| match attribute {
                LinkAttribute::Stats64(stats) => Some(stats),
                _ => None,
            })
            .ok_or_else(|| fail(io::ErrorKind::InvalidData.into())),
        NetlinkPayload::Error(error) => Err(fail(error.to_io())),
        _ => Err(fail(io::ErrorKind::InvalidData.into())),
    }
}

fn error_number(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io().raw_os_error(),
        _ => None,
    }
}

fn refused(action: impl Into<String>, error: rtnetlink::Error) -> NetworkError {
    let source = match &error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    };
    NetworkError::kernel(action, source)
}

/// Takes one refusal for success: what was asked for is already so.
fn unless(
    answer: Result<(), rtnetlink::Error>,
    expected: i32,
    action: impl FnOnce() -> String,
) -> Result<(), NetworkError> {
    match answer {
        Err(error) if error_number(&error) != Some(expected) => Err(refused(action(), error)),
        _ => Ok(()),
    }
}
