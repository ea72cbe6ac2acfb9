//! Addresses and the default route, by the kernel's interface calls.
#![allow(unsafe_code)]

use std::{
    fs, io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
};

use hypeman_guest_api::NetworkConfig;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// The kernel's `struct ifreq` for x86-64 and arm64.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; 16],
    value: [u8; 24],
}

/// The kernel's `struct rtentry`.
#[repr(C)]
struct RouteRequest {
    pad1: u64,
    destination: [u8; 16],
    gateway: [u8; 16],
    mask: [u8; 16],
    flags: u16,
    pad2: i16,
    pad3: u64,
    pad4: u64,
    metric: i16,
    device: *const u8,
    mtu: u64,
    window: u64,
    round_trip: u16,
}

fn internet_address(address: Ipv4Addr) -> [u8; 16] {
    let mut raw = [0; 16];
    raw[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    raw[4..8].copy_from_slice(&address.octets());
    raw
}

struct Interface {
    socket: OwnedFd,
    name: [u8; 16],
}

impl Interface {
    fn new(name: &str) -> io::Result<Interface> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        let mut raw = [0; 16];
        let bytes = name.as_bytes().get(..15.min(name.len())).unwrap_or_default();
        raw[..bytes.len()].copy_from_slice(bytes);
        Ok(Interface { socket, name: raw })
    }

    fn call(&self, request: u64, value: &[u8]) -> io::Result<[u8; 24]> {
        let mut argument = InterfaceRequest {
            name: self.name,
            value: [0; 24],
        };
        argument.value[..value.len()].copy_from_slice(value);
        // SAFETY: these requests read and write one `struct ifreq`, which the argument is.
        if unsafe { libc::ioctl(self.socket.as_raw_fd(), request as _, &raw mut argument) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(argument.value)
    }

    fn set_up(&self, up: bool) -> io::Result<()> {
        let value = self.call(libc::SIOCGIFFLAGS, &[])?;
        let mut flags = u16::from_ne_bytes([value[0], value[1]]);
        let bit = libc::IFF_UP as u16;
        if (flags & bit != 0) == up {
            return Ok(());
        }
        flags ^= bit;
        self.call(libc::SIOCSIFFLAGS, &flags.to_ne_bytes()).map(drop)
    }

    fn mac(&self) -> io::Result<[u8; 6]> {
        let value = self.call(libc::SIOCGIFHWADDR, &[])?;
        let mut mac = [0; 6];
        mac.copy_from_slice(&value[2..8]);
        Ok(mac)
    }

    fn address(&self) -> io::Result<Ipv4Addr> {
        let value = self.call(libc::SIOCGIFADDR, &[])?;
        Ok(Ipv4Addr::new(value[4], value[5], value[6], value[7]))
    }

    fn set_address(&self, address: Ipv4Addr, prefix_length: u8) -> io::Result<()> {
        self.call(libc::SIOCSIFADDR, &internet_address(address))?;
        if address.is_unspecified() {
            return Ok(());
        }
        let mask = u32::MAX
            .checked_shl(32 - u32::from(prefix_length.min(32)))
            .unwrap_or(0);
        self.call(libc::SIOCSIFNETMASK, &internet_address(Ipv4Addr::from(mask)))
            .map(drop)
    }

    fn set_mac(&self, mac: [u8; 6]) -> io::Result<()> {
        const ETHERNET: u16 = 1;
        let mut value = [0; 16];
        value[..2].copy_from_slice(&ETHERNET.to_ne_bytes());
        value[2..8].copy_from_slice(&mac);
        self.call(libc::SIOCSIFHWADDR, &value).map(drop)
    }

    fn add_default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        const UP: u16 = 1;
        const GATEWAY: u16 = 2;
        let any = internet_address(Ipv4Addr::UNSPECIFIED);
        let route = RouteRequest {
            pad1: 0,
            destination: any,
            gateway: internet_address(gateway),
            mask: any,
            flags: UP | GATEWAY,
            pad2: 0,
            pad3: 0,
            pad4: 0,
            metric: 0,
            device: self.name.as_ptr(),
            mtu: 0,
            window: 0,
            round_trip: 0,
        };
        // SAFETY: the request reads one `struct rtentry` and the name that it points to; both live on.
        if unsafe { libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT as _, &raw const route) } < 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EEXIST) {
                return Err(error);
            }
        }
        Ok(())
    }
}

fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
}

/// The first interface that is not loopback, by name.
fn first_interface() -> Option<String> {
    // Not by listing `/sys/class/net`: for a copy that goes on with cold code it takes several times as long.
    let table = fs::read_to_string("/proc/net/dev").ok()?;
    // Only devices of the machine have this link; tunnels and bridges that drivers make by themselves do not.
    let of_machine = |name: &&str| Path::new("/sys/class/net").join(name).join("device").exists();
    interface_names(&table)
        .filter(|name| *name != "lo")
        .filter(of_machine)
        .min()
        .map(str::to_owned)
}

/// The names in the kernel's table of interfaces: two lines of headings, then one line each.
fn interface_names(table: &str) -> impl Iterator<Item = &str> {
    let rows = table.lines().skip(2);
    rows.filter_map(|row| Some(row.split_once(':')?.0.trim()))
}

/// Nothing leaves by the first interface any more. `false`: there is none.
pub(super) fn take_down() -> Result<bool, String> {
    let Some(name) = first_interface() else {
        return Ok(false);
    };
    Interface::new(&name)
        .and_then(|interface| interface.set_up(false))
        .map_err(|error| format!("network: interface: {error}"))?;
    Ok(true)
}

/// Brings up loopback and gives the first interface its address, or takes it away.
pub(super) fn apply(network: Option<&NetworkConfig>) -> Result<(), String> {
    let told = |what: &'static str| move |error: io::Error| format!("network: {what}: {error}");
    Interface::new("lo")
        .and_then(|lo| lo.set_up(true))
        .map_err(told("loopback"))?;
    let name = first_interface();
    let Some(config) = network else {
        if let Some(name) = name {
            let interface = Interface::new(&name).map_err(told("interface"))?;
            // It may have had none.
            let _ = interface.set_address(Ipv4Addr::UNSPECIFIED, 0);
        }
        return Ok(());
    };
    let name = name.ok_or("network: the machine has no network interface")?;
    let interface = Interface::new(&name).map_err(told("interface"))?;
    // Down first: nothing leaves under half an identity, and what was learnt under a former one is forgotten
    // (routes, neighbours, the addresses that version 6 makes of the MAC).
    interface.set_up(false).map_err(told("interface"))?;
    let mac = match &config.mac {
        Some(text) => {
            let mac = parse_mac(text).ok_or_else(|| format!("network: malformed MAC address {text:?}"))?;
            interface.set_mac(mac).map_err(told("MAC address"))?;
            Some(mac)
        }
        None => None,
    };
    // An address that is taken away takes its routes with it.
    let _ = interface.set_address(Ipv4Addr::UNSPECIFIED, 0);
    interface
        .set_address(config.address, config.prefix_length)
        .map_err(told("address"))?;
    interface.set_up(true).map_err(told("interface"))?;
    interface
        .add_default_route(config.gateway)
        .map_err(told("default route"))?;
    let now = (
        interface.mac().map_err(told("MAC address"))?,
        interface.address().map_err(told("address"))?,
    );
    if mac.is_some_and(|mac| mac != now.0) || config.address != now.1 {
        return Err(format!(
            "network: the interface kept {:02x?} and {}",
            now.0, now.1
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{interface_names, parse_mac};

    #[test]
    fn the_table_of_interfaces_is_read() {
        let table = "Inter-|   Receive                            |  Transmit\n \
                     face |bytes    packets errs drop fifo frame|bytes\n    \
                     lo: 1200      12    0    0    0     0 1200\n  eth0:0 0 0\n";
        assert_eq!(interface_names(table).collect::<Vec<_>>(), ["lo", "eth0"]);
        assert_eq!(interface_names("").count(), 0);
    }

    #[test]
    fn mac_addresses_are_six_bytes() {
        assert_eq!(parse_mac("02:00:0a:ff:10:01"), Some([2, 0, 10, 255, 16, 1]));
        for bad in ["", "02:00:0a:ff:10", "02:00:0a:ff:10:01:02", "02:00:0a:ff:10:zz"] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }
}
