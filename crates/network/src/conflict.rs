//! Does our subnet collide with a route that the host already has? Pure.

use ipnet::Ipv4Net;

/// A route of the host, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Route {
    /// Where it leads.
    pub(crate) destination: Ipv4Net,
    /// Through which interface; none for a blackhole.
    pub(crate) interface: Option<String>,
}

/// The first route that shares addresses with `subnet` through another interface than `bridge`. Default routes
/// (also when split into two halves) share addresses with everything and mean nothing.
pub(crate) fn find<'a>(routes: &'a [Route], subnet: Ipv4Net, bridge: &str) -> Option<&'a Route> {
    routes.iter().find(|route| {
        let overlaps = route.destination.contains(&subnet) || subnet.contains(&route.destination);
        overlaps && route.destination.prefix_len() > 1 && route.interface.as_deref() != Some(bridge)
    })
}

/// What to tell the operator about it.
pub(crate) fn advice(route: &Route, subnet: Ipv4Net) -> String {
    let through = route
        .interface
        .as_deref()
        .map(|name| format!(" through {name}"))
        .unwrap_or_default();
    format!(
        "the subnet {subnet} collides with this host's route to {}{through}; choose another private subnet for \
         the VMs, for example {}",
        route.destination,
        alternative(route, subnet),
    )
}

/// A private subnet of the same kind that the route does not touch.
fn alternative(route: &Route, subnet: Ipv4Net) -> Ipv4Net {
    let candidates = [
        "10.100.0.0/16",
        "10.213.0.0/16",
        "172.30.0.0/16",
        "192.168.192.0/20",
    ];
    candidates
        .iter()
        .filter_map(|text| text.parse::<Ipv4Net>().ok())
        .find(|net| {
            [subnet, route.destination]
                .iter()
                .all(|other| !net.contains(other) && !other.contains(net))
        })
        .unwrap_or(subnet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn net() -> impl Strategy<Value = Ipv4Net> {
        (any::<u32>(), 2u8..=32)
            .prop_map(|(base, len)| Ipv4Net::new_assert(Ipv4Addr::from(base), len).trunc())
    }

    fn route(text: &str, interface: &str) -> Route {
        Route {
            destination: text.parse().unwrap(),
            interface: Some(interface.into()),
        }
    }

    proptest! {
        /// A conflict is exactly a shared address.
        #[test]
        fn a_conflict_is_a_shared_address(a in net(), b in net()) {
            let routes = [Route { destination: b, interface: Some("eth0".into()) }];
            let shares = u32::from(a.network()) <= u32::from(b.broadcast())
                && u32::from(b.network()) <= u32::from(a.broadcast());
            prop_assert_eq!(find(&routes, a, "vmbr0").is_some(), shares);
        }

        #[test]
        fn the_advice_is_free_of_the_conflict(base: u32, ours in 8u8..=29, theirs in 8u8..=32) {
            let net = |length| Ipv4Net::new_assert(Ipv4Addr::from(base), length).trunc();
            let other = alternative(&Route { destination: net(theirs), interface: None }, net(ours));
            prop_assert!(!other.contains(&net(theirs)) && !net(theirs).contains(&other));
        }
    }

    #[test]
    fn our_own_bridge_and_default_routes_do_not_conflict() {
        let subnet = "10.100.0.0/16".parse().unwrap();
        let routes = [
            route("0.0.0.0/0", "eth0"),
            route("0.0.0.0/1", "tun0"),
            route("10.100.0.0/16", "vmbr0"),
            route("10.100.0.1/32", "vmbr0"),
            route("10.101.0.0/16", "eth0"),
        ];
        assert_eq!(find(&routes, subnet, "vmbr0"), None);
        let wide = [route("10.0.0.0/8", "wg0")];
        let conflict = find(&wide, subnet, "vmbr0").unwrap();
        let text = advice(conflict, subnet);
        assert!(
            text.contains("10.0.0.0/8 through wg0") && text.contains("172.30.0.0/16"),
            "{text}"
        );
    }
}
