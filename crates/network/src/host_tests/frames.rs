//! Ethernet frames, built and read by hand.

use std::net::Ipv4Addr;

pub(super) type Mac = [u8; 6];

pub(super) const BROADCAST: Mac = [0xff; 6];

pub(super) fn ethernet(to: Mac, from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(to);
    frame.extend(from);
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame.resize(frame.len().max(60), 0);
    frame
}

pub(super) fn arp(request: bool, from: (Mac, Ipv4Addr), to: (Mac, Ipv4Addr)) -> Vec<u8> {
    let mut body = vec![0, 1, 8, 0, 6, 4, 0, if request { 1 } else { 2 }];
    body.extend(from.0);
    body.extend(from.1.octets());
    body.extend(to.0);
    body.extend(to.1.octets());
    body
}

pub(super) fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend((20 + payload.len() as u16).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.extend(payload);
    header
}

pub(super) fn udp(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), text: &str) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(from.1.to_be_bytes());
    body.extend(to.1.to_be_bytes());
    body.extend((8 + text.len() as u16).to_be_bytes());
    // No checksum: UDP over IPv4 may go without.
    body.extend([0, 0]);
    body.extend(text.bytes());
    ipv4(from.0, to.0, 17, &body)
}

pub(super) fn ping(from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
    let mut body = vec![8, 0, 0, 0, 0, 1, 0, 1];
    let sum = checksum(&body);
    body[2..4].copy_from_slice(&sum.to_be_bytes());
    ipv4(from, to, 1, &body)
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// What a frame says, as a line that tests can compare.
pub(super) fn describe(frame: &[u8]) -> String {
    let kind = u16::from_be_bytes([frame[12], frame[13]]);
    let body = &frame[14..];
    let ip = |at: usize| Ipv4Addr::new(body[at], body[at + 1], body[at + 2], body[at + 3]);
    match kind {
        0x0806 if body[7] == 1 => format!("arp who-has {}", ip(24)),
        0x0806 => format!("arp {} is-at", ip(14)),
        0x0800 => {
            let length = usize::from(u16::from_be_bytes([body[2], body[3]]));
            let payload = &body[20..length];
            match body[9] {
                17 => format!("udp from {}: {}", ip(12), String::from_utf8_lossy(&payload[8..])),
                1 => format!("icmp type {} from {}", payload[0], ip(12)),
                other => format!("ip protocol {other} from {}", ip(12)),
            }
        }
        other => format!("ethernet {other:04x}"),
    }
}
