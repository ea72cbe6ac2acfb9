//! The rule set, as text for `nft -f -`: pure.
//!
//! Two tables of one name, written in a single transaction:
//!
//! * family `bridge`: what a port may send. Its sets `ports` (the interfaces that are held to it) and `guests`
//!   (interface, MAC, address) are filled and emptied together by [`crate::guests`]; the rules themselves never
//!   change with the number of VMs. Naming the bridge in a rule would do without `ports`, but needs a kernel
//!   option (`NFT_BRIDGE_META`) that not every kernel has.
//! * family `inet`: what the network as a whole may do. Metadata ranges are dropped in the first hook that
//!   exists, before any rule of anyone could redirect or accept them.
//!
//! Chains are flushed and refilled, the sets are kept, so that applying the rules again to a host with running
//! VMs interrupts nobody.

use std::fmt::Write as _;

use crate::options::NetworkOptions;

/// Name of the set of interfaces that may send only what is in [`GUESTS_SET`].
pub(crate) const PORTS_SET: &str = "ports";

/// Name of the set of what each port may send.
pub(crate) const GUESTS_SET: &str = "guests";

/// Where clouds serve credentials to whoever asks from the machine: link-local (AWS, Google, Azure, OpenStack,
/// …), Alibaba, Azure's wire server, Oracle's classic service.
const METADATA: [&str; 4] = [
    "169.254.0.0/16",
    "100.100.100.200",
    "168.63.129.16",
    "192.0.0.192",
];

/// Renders the whole rule set. `options` must be valid.
pub(crate) fn render(options: &NetworkOptions) -> String {
    let table = &options.table_name;
    let bridge = &options.bridge_name;
    let subnet = options.subnet_cidr;
    let gateway = options.gateway_address();
    let metadata = METADATA.join(", ");

    // Adding what exists is no error, so these lines make the flush below right the first time and later.
    let mut text = format!(
        "add table bridge {table}\n\
         add set bridge {table} {PORTS_SET} {{ type ifname; }}\n\
         add set bridge {table} {GUESTS_SET} {{ type ifname . ether_addr . ipv4_addr; }}\n\
         add chain bridge {table} prerouting {{ type filter hook prerouting priority -300; policy accept; }}\n\
         flush chain bridge {table} prerouting\n\
         add chain bridge {table} output {{ type filter hook output priority -300; policy accept; }}\n\
         flush chain bridge {table} output\n\
         add table inet {table}\n"
    );
    for (chain, kind, hook, priority) in [
        ("prerouting", "filter", "prerouting", -310),
        ("input", "filter", "input", -10),
        ("forward", "filter", "forward", -10),
        ("postrouting", "nat", "postrouting", 100),
    ] {
        let _ = writeln!(
            text,
            "add chain inet {table} {chain} {{ type {kind} hook {hook} priority {priority}; policy accept; }}\n\
             flush chain inet {table} {chain}"
        );
    }

    let mut rule = |family: &str, chain: &str, body: &str| {
        let _ = writeln!(text, "add rule {family} {table} {chain} {body}");
    };

    // A port may send IPv4 and ARP under its own MAC and address and nothing else: no IPv6, no VLAN tags.
    rule("bridge", "prerouting", &format!("iifname != @{PORTS_SET} accept"));
    rule(
        "bridge",
        "prerouting",
        &format!("iifname . ether saddr . ip saddr @{GUESTS_SET} accept"),
    );
    rule(
        "bridge",
        "prerouting",
        &format!(
            "iifname . ether saddr . arp saddr ip @{GUESTS_SET} iifname . arp saddr ether . arp saddr ip @{GUESTS_SET} accept"
        ),
    );
    rule("bridge", "prerouting", "counter drop");
    // The kernel hands the host's own broadcasts to every port, whatever its flooding flags.
    rule(
        "bridge",
        "output",
        &format!("oifname @{PORTS_SET} ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 counter drop"),
    );

    rule(
        "inet",
        "prerouting",
        &format!("iifname \"{bridge}\" ip daddr {{ {metadata} }} counter drop"),
    );
    rule(
        "inet",
        "prerouting",
        &format!("iifname \"{bridge}\" meta nfproto != ipv4 counter drop"),
    );
    rule(
        "inet",
        "prerouting",
        &format!("iifname \"{bridge}\" ip saddr != {subnet} counter drop"),
    );
    rule(
        "inet",
        "prerouting",
        &format!("iifname != {{ \"{bridge}\", \"lo\" }} ip saddr {subnet} counter drop"),
    );

    // The host answers ping and the chosen ports at the gateway's address; it may itself open connections.
    rule("inet", "input", &format!("iifname != \"{bridge}\" accept"));
    rule("inet", "input", "ct state established,related accept");
    rule(
        "inet",
        "input",
        &format!("ip daddr {gateway} icmp type echo-request accept"),
    );
    if !options.gateway_ports.is_empty() {
        let ports: Vec<String> = options.gateway_ports.iter().map(u16::to_string).collect();
        let ports = ports.join(", ");
        rule(
            "inet",
            "input",
            &format!("ip daddr {gateway} meta l4proto {{ tcp, udp }} th dport {{ {ports} }} accept"),
        );
    }
    rule("inet", "input", "counter drop");

    // Out to the world and answers back; never from one VM to another, never unasked from outside.
    rule(
        "inet",
        "forward",
        &format!("iifname \"{bridge}\" oifname \"{bridge}\" counter drop"),
    );
    rule(
        "inet",
        "forward",
        &format!("iifname \"{bridge}\" ip daddr {{ {metadata} }} counter drop"),
    );
    if let Some(uplink) = &options.uplink {
        rule(
            "inet",
            "forward",
            &format!("iifname \"{bridge}\" oifname != \"{uplink}\" counter drop"),
        );
    }
    rule(
        "inet",
        "forward",
        &format!("oifname \"{bridge}\" ct state established,related accept"),
    );
    rule("inet", "forward", &format!("oifname \"{bridge}\" counter drop"));

    rule(
        "inet",
        "postrouting",
        &format!("ip saddr {subnet} oifname != \"{bridge}\" masquerade"),
    );
    text
}

/// Renders the removal of both tables.
pub(crate) fn render_removal(options: &NetworkOptions) -> String {
    let table = &options.table_name;
    // Deleting what does not exist is an error, adding what exists is none.
    format!(
        "add table bridge {table}\ndelete table bridge {table}\nadd table inet {table}\ndelete table inet {table}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn name() -> impl Strategy<Value = String> {
        prop_oneof![9 => "[a-zA-Z0-9][a-zA-Z0-9._-]{0,14}", 1 => "[ -~]{0,17}"]
    }

    fn options() -> impl Strategy<Value = NetworkOptions> {
        (
            name(),
            proptest::option::of(name()),
            0x0a00_0000u32..0x0b00_0000,
            7u8..=30,
            proptest::collection::btree_set(any::<u16>(), 0..4),
        )
            .prop_map(|(bridge, uplink, base, prefix, ports)| NetworkOptions {
                subnet_cidr: ipnet::Ipv4Net::new_assert(Ipv4Addr::from(base), prefix).trunc(),
                uplink,
                gateway_ports: ports,
                ..NetworkOptions::for_bridge(&bridge)
            })
    }

    proptest! {
        /// Options that pass the check cannot put anything into the rule set but their own names.
        #[test]
        fn no_option_can_smuggle_in_a_rule(options in options()) {
            prop_assume!(options.validate().is_ok());
            let plain = NetworkOptions {
                subnet_cidr: options.subnet_cidr,
                uplink: options.uplink.as_ref().map(|_| "up0".to_owned()),
                gateway_ports: options.gateway_ports.clone(),
                ..NetworkOptions::for_bridge("br0")
            };
            let (rendered, plain) = (render(&options), render(&plain));
            prop_assert_eq!(rendered.lines().count(), plain.lines().count());
            for (line, model) in rendered.lines().zip(plain.lines()) {
                prop_assert_eq!(line.split(' ').count(), model.split(' ').count());
                prop_assert_eq!(line.matches(['"', ';', '{', '}', '#', '\\']).count(),
                    model.matches(['"', ';', '{', '}', '#', '\\']).count());
            }
        }

        /// In each chain that a guest's packet passes, no accept stands before the metadata drop.
        #[test]
        fn metadata_is_dropped_before_anything_is_accepted(ports in proptest::collection::btree_set(any::<u16>(), 0..4)) {
            let text = render(&NetworkOptions { gateway_ports: ports, ..NetworkOptions::default() });
            for chain in ["inet hypeman_vmbr0 prerouting", "inet hypeman_vmbr0 forward"] {
                let rules: Vec<&str> = text
                    .lines()
                    .filter_map(|l| l.strip_prefix("add rule "))
                    .filter(|l| l.starts_with(chain))
                    .collect();
                let drop = rules.iter().position(|r| r.contains("169.254.0.0/16") && r.ends_with("drop")).unwrap();
                prop_assert!(rules[..drop].iter().all(|r| r.ends_with("drop")));
            }
        }
    }

    #[test]
    fn a_name_with_a_quote_is_refused() {
        let options = NetworkOptions::for_bridge("vm\"br0");
        assert!(options.validate().is_err());
    }
}
