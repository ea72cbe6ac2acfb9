//! What each port may send: the elements of two nftables sets, read and written over netlink.
//!
//! The set `guests` is also the record of who has which address, from which [`crate::Network::detach`] learns what
//! belongs to a TAP, whoever attached it and whenever.
//!
//! ```text
//! key of an element of `guests`, each part padded to four bytes:
//!   interface name (16, zero padded) | MAC address (6 + 2) | IPv4 address (4)
//! ```
//! The set `ports` holds the interface names alone, and is written in the same transaction.

use std::collections::BTreeSet;
use std::io;
use std::net::Ipv4Addr;

use netlink_packet_netfilter::nftables::{
    DataAttribute, ListAttribute, NfTablesMessage, SetElementAttribute, SetElementList, SetElementMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use rtnetlink::sys::protocols::NETLINK_NETFILTER;
use rtnetlink::sys::{Socket, SocketAddr};

use crate::address::MacAddress;
use crate::error::NetworkError;
use crate::rules::{GUESTS_SET, PORTS_SET};

const NAME_LENGTH: usize = 16;
const KEY_LENGTH: usize = 28;
/// The number of the nftables subsystem, which a batch names in its first and last message.
const NFTABLES_SUBSYSTEM: u16 = 10;
/// A dump is repeated this often when the set changed under it.
const DUMP_TRIES: u32 = 16;
/// Elements in one message; a message's list has a length field of 16 bits.
const ELEMENTS_PER_MESSAGE: usize = 500;

/// One port's permission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Guest {
    pub(crate) tap: String,
    pub(crate) mac: MacAddress,
    pub(crate) ip: Ipv4Addr,
}

impl Guest {
    fn to_key(&self) -> Vec<u8> {
        let mut key = vec![0u8; KEY_LENGTH];
        key[..NAME_LENGTH].copy_from_slice(&name_key(&self.tap));
        key[16..22].copy_from_slice(&self.mac.octets());
        key[24..28].copy_from_slice(&self.ip.octets());
        key
    }

    fn from_key(key: &[u8]) -> Option<Self> {
        let key: &[u8; KEY_LENGTH] = key.try_into().ok()?;
        let name = key[..NAME_LENGTH].split(|byte| *byte == 0).next()?;
        let mut mac = [0u8; 6];
        mac.copy_from_slice(&key[16..22]);
        let ip = Ipv4Addr::new(key[24], key[25], key[26], key[27]);
        Some(Self {
            tap: String::from_utf8(name.to_vec()).ok()?,
            mac: MacAddress(mac),
            ip,
        })
    }
}

fn name_key(tap: &str) -> [u8; NAME_LENGTH] {
    let mut key = [0u8; NAME_LENGTH];
    for (slot, byte) in key.iter_mut().take(NAME_LENGTH - 1).zip(tap.bytes()) {
        *slot = byte;
    }
    key
}

/// Lists the set.
pub(crate) fn list(table: &str) -> Result<Vec<Guest>, NetworkError> {
    for _ in 0..DUMP_TRIES {
        if let Some(guests) =
            dump(table).map_err(|e| NetworkError::kernel("list the guests of the firewall", e))?
        {
            return Ok(guests);
        }
    }
    Err(NetworkError::kernel(
        "list the guests of the firewall",
        io::ErrorKind::ResourceBusy.into(),
    ))
}

/// Removes and adds elements in one transaction. Elements to remove must exist; elements to add may.
pub(crate) fn update(table: &str, remove: &[Guest], add: &[Guest]) -> Result<(), NetworkError> {
    if remove.is_empty() && add.is_empty() {
        return Ok(());
    }
    commit(table, remove, add)
        .map_err(|source| NetworkError::kernel("update the guests of the firewall", source))
}

/// Elements of one set, as the body of a message; no elements means the whole set.
fn elements(table: &str, set: &str, keys: &[Vec<u8>]) -> SetElementMessage {
    let mut attributes = vec![
        SetElementList::Table(table.to_owned()),
        SetElementList::Set(set.to_owned()),
    ];
    if !keys.is_empty() {
        let keys = keys
            .iter()
            .map(|key| {
                ListAttribute::Element(vec![SetElementAttribute::Key(DataAttribute::Value(key.clone()))])
            })
            .collect();
        attributes.push(SetElementList::Elements(keys));
    }
    SetElementMessage { attributes }
}

fn serialize(buffer: &mut Vec<u8>, flags: u16, sequence: u32, message: NetfilterMessage) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let start = buffer.len();
    buffer.resize(start + message.buffer_len(), 0);
    message.serialize(&mut buffer[start..]);
}

fn open() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn bridge_message(message: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Bridge, 0, 0), message)
}

fn control_message(message: ControlMessage) -> NetfilterMessage {
    NetfilterMessage::new(
        NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFTABLES_SUBSYSTEM),
        message,
    )
}

fn commit(table: &str, remove: &[Guest], add: &[Guest]) -> io::Result<()> {
    let names = |guests: &[Guest]| {
        guests
            .iter()
            .map(|guest| guest.tap.clone())
            .collect::<BTreeSet<_>>()
    };
    let (going, staying) = (names(remove), names(add));
    let name_keys = |names: Vec<&String>| names.into_iter().map(|name| name_key(name).to_vec()).collect();
    let guest_keys = |guests: &[Guest]| guests.iter().map(Guest::to_key).collect::<Vec<_>>();
    let removals: [(&str, Vec<Vec<u8>>); 2] = [
        (PORTS_SET, name_keys(going.difference(&staying).collect())),
        (GUESTS_SET, guest_keys(remove)),
    ];
    let additions: [(&str, Vec<Vec<u8>>); 2] = [
        (PORTS_SET, name_keys(staying.iter().collect())),
        (GUESTS_SET, guest_keys(add)),
    ];

    let mut request = Vec::new();
    let mut sequence = 1;
    serialize(
        &mut request,
        NLM_F_REQUEST,
        0,
        control_message(ControlMessage::BatchBegin),
    );
    for (set, keys) in &removals {
        for keys in keys.chunks(ELEMENTS_PER_MESSAGE) {
            let message = bridge_message(NfTablesMessage::DeleteSetElement(elements(table, set, keys)));
            serialize(&mut request, NLM_F_REQUEST | NLM_F_ACK, sequence, message);
            sequence += 1;
        }
    }
    for (set, keys) in &additions {
        for keys in keys.chunks(ELEMENTS_PER_MESSAGE) {
            let message = bridge_message(NfTablesMessage::NewSetElement(elements(table, set, keys)));
            serialize(
                &mut request,
                NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE,
                sequence,
                message,
            );
            sequence += 1;
        }
    }
    serialize(
        &mut request,
        NLM_F_REQUEST,
        sequence,
        control_message(ControlMessage::BatchEnd),
    );

    let socket = open()?;
    socket.send(&request, 0)?;
    let mut awaited = sequence - 1;
    while awaited > 0 {
        for message in receive(&socket)? {
            if let NetlinkPayload::Error(answer) = message.payload {
                if answer.code.is_some() {
                    return Err(answer.to_io());
                }
                awaited -= 1;
            }
        }
    }
    Ok(())
}

/// One dump of the set, or nothing when the set changed meanwhile.
fn dump(table: &str) -> io::Result<Option<Vec<Guest>>> {
    let mut request = Vec::new();
    let message = bridge_message(NfTablesMessage::GetSetElement(elements(table, GUESTS_SET, &[])));
    serialize(&mut request, NLM_F_REQUEST | NLM_F_DUMP, 1, message);
    let socket = open()?;
    socket.send(&request, 0)?;
    let mut guests = Vec::new();
    let mut interrupted = false;
    loop {
        for message in receive(&socket)? {
            interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
            match message.payload {
                NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(guests)),
                NetlinkPayload::Error(answer) => return Err(answer.to_io()),
                NetlinkPayload::InnerMessage(message) => guests.extend(guests_of(message)),
                _ => {}
            }
        }
    }
}

fn guests_of(message: NetfilterMessage) -> Vec<Guest> {
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewSetElement(message)) = message.inner else {
        return Vec::new();
    };
    let mut guests = Vec::new();
    for list in message.attributes {
        let SetElementList::Elements(elements) = list else {
            continue;
        };
        for element in elements {
            let ListAttribute::Element(attributes) = element else {
                continue;
            };
            guests.extend(attributes.iter().find_map(|attribute| match attribute {
                SetElementAttribute::Key(DataAttribute::Value(key)) => Guest::from_key(key),
                _ => None,
            }));
        }
    }
    guests
}

/// Receives one datagram, which may carry several messages. The kernel has its answer ready when the request
/// returns, so this never waits for long.
fn receive(socket: &Socket) -> io::Result<Vec<NetlinkMessage<NetfilterMessage>>> {
    let (datagram, _) = socket.recv_from_full()?;
    let mut messages = Vec::new();
    let mut rest = datagram.as_slice();
    while !rest.is_empty() {
        let message = NetlinkMessage::<NetfilterMessage>::deserialize(rest)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
        let length = usize::try_from(message.header.length)
            .unwrap_or(usize::MAX)
            .next_multiple_of(4);
        messages.push(message);
        rest = rest.get(length.max(4)..).unwrap_or_default();
    }
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_key_tells_its_guest(name in "[a-z0-9-]{1,15}", mac: [u8; 6], ip: u32) {
            let guest = Guest { tap: name, mac: MacAddress(mac), ip: Ipv4Addr::from(ip) };
            prop_assert_eq!(Guest::from_key(&guest.to_key()), Some(guest));
        }

        #[test]
        fn no_key_breaks_the_reader(key: Vec<u8>) {
            let _ = Guest::from_key(&key);
        }
    }
}
