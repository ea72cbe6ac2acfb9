//! Names and addresses of a VM's network interface: pure.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;

use crate::error::NetworkError;
use crate::options::is_host_address;

/// Random picks before the subnet is scanned in order.
const RANDOM_TRIES: u32 = 5;

/// Characters of the instance id in the name of its TAP.
const TAP_ID_LENGTH: usize = 10;

/// What a guest is told about its interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The guest's address.
    pub ip: Ipv4Addr,
    /// Length of the subnet's prefix in bits.
    pub prefix: u8,
    /// The default route.
    pub gateway: Ipv4Addr,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
}

/// A unicast Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress(pub(crate) [u8; 6]);

impl MacAddress {
    /// The six octets in the order in which they are sent.
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddress {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let invalid = || NetworkError::Invalid(format!("{text:?} is not a unicast MAC address"));
        let mut octets = [0u8; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts.next().ok_or_else(invalid)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        let multicast = octets[0] & 1 == 1;
        if parts.next().is_some() || multicast || octets == [0; 6] {
            return Err(invalid());
        }
        Ok(Self(octets))
    }
}

/// A VM's MAC address, `02:00:00:xx:xx:xx`, from three random octets.
pub fn mac_address(random: [u8; 3]) -> String {
    let [a, b, c] = random;
    MacAddress([2, 0, 0, a, b, c]).to_string()
}

/// The name of an instance's TAP: `hype-` and the start of its id, at most 15 characters.
pub fn tap_name(instance_id: &str) -> String {
    let start: String = instance_id
        .chars()
        .filter(char::is_ascii_alphanumeric)
        .take(TAP_ID_LENGTH)
        .collect();
    format!("hype-{}", start.to_ascii_lowercase())
}

/// Picks a free host address: a few random tries, which nearly always suffice, then a scan from a random
/// place, so that an address is found whenever there is one.
pub(crate) fn pick(
    subnet: Ipv4Net,
    gateway: Ipv4Addr,
    in_use: &BTreeSet<Ipv4Addr>,
    seed: u64,
) -> Result<Ipv4Addr, NetworkError> {
    let base = u32::from(subnet.network());
    let span = u64::from(u32::from(subnet.broadcast()) - base) + 1;
    let free = |offset: u64| {
        let ip = Ipv4Addr::from(base.wrapping_add(u32::try_from(offset % span).unwrap_or(0)));
        (is_host_address(subnet, ip) && ip != gateway && !in_use.contains(&ip)).then_some(ip)
    };
    let mut state = seed;
    for _ in 0..RANDOM_TRIES {
        if let Some(ip) = free(split_mix(&mut state)) {
            return Ok(ip);
        }
    }
    let start = split_mix(&mut state) % span;
    (0..span)
        .find_map(|step| free(start + step))
        .ok_or_else(|| NetworkError::Exhausted {
            subnet: subnet.to_string(),
        })
}

/// One step of SplitMix64: spreads any seed, also a small one, over all bits.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is taken: the address is a free host address, or nothing was free.
        #[test]
        fn an_address_is_found_exactly_when_one_is_free(
            prefix in 22u8..=29, third in 0u8..=255, seed: u64, taken in proptest::collection::vec(any::<u16>(), 0..1200),
        ) {
            let subnet = Ipv4Net::new_assert(Ipv4Addr::new(10, 100, third, 0), prefix).trunc();
            let gateway = subnet.hosts().next().unwrap();
            let hosts: BTreeSet<Ipv4Addr> = subnet.hosts().filter(|ip| *ip != gateway).collect();
            let in_use: BTreeSet<Ipv4Addr> = taken
                .iter()
                .map(|n| Ipv4Addr::from(u32::from(subnet.network()) + u32::from(*n) % (1 << (32 - prefix))))
                .collect();
            let anything_free = hosts.difference(&in_use).next().is_some();
            match pick(subnet, gateway, &in_use, seed) {
                Ok(ip) => prop_assert!(hosts.contains(&ip) && !in_use.contains(&ip)),
                Err(_) => prop_assert!(!anything_free),
            }
        }

        /// A subnet can be handed out to the last address.
        #[test]
        fn a_subnet_fills_to_the_last_address(seed: u64) {
            let subnet = Ipv4Net::new_assert(Ipv4Addr::new(192, 168, 7, 0), 26);
            let gateway = Ipv4Addr::new(192, 168, 7, 1);
            let mut in_use = BTreeSet::new();
            while let Ok(ip) = pick(subnet, gateway, &in_use, seed.wrapping_add(in_use.len() as u64)) {
                prop_assert!(in_use.insert(ip));
            }
            prop_assert_eq!(in_use.len(), 61);
        }

        #[test]
        fn a_mac_address_survives_text(random: [u8; 3]) {
            let text = mac_address(random);
            prop_assert!(text.starts_with("02:00:00:"));
            let parsed: MacAddress = text.parse().unwrap();
            prop_assert_eq!(parsed.to_string(), text);
        }

        #[test]
        fn no_text_breaks_the_parser_of_mac_addresses(text in ".{0,20}") {
            if let Ok(mac) = text.parse::<MacAddress>() {
                prop_assert_eq!(mac.to_string(), text.to_ascii_lowercase());
            }
        }

        #[test]
        fn the_name_of_a_tap_fits_the_kernel(id in ".{0,40}") {
            let name = tap_name(&id);
            prop_assert!(crate::options::check_interface_name("tap", &name).is_ok());
        }
    }

    #[test]
    fn group_addresses_are_refused() {
        for text in [
            "ff:ff:ff:ff:ff:ff",
            "01:80:c2:00:00:00",
            "00:00:00:00:00:00",
            "02:00:00:00:00",
            "2:0:0:0:0:0",
        ] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
    }
}
