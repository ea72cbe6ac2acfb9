//! Where requests may go, and which host may see which secret.
//!
//! The rules exist because a registry's answers steer its client: a `Location`, a token realm or a DNS answer can
//! point at another tenant's service, at the cloud's metadata address, or at a host that collects passwords.
//!
//! ```text
//!  request to                     scheme                      address                 secret
//!  the registry itself            https; http on loopback     its own reach           its credentials or token
//!                                 or when listed insecure
//!  its token realm                same rule                   not further inside      credentials only when related
//!                                                             than the registry       by name, else none
//!  another origin (redirect,      same rule                   same                    none
//!  upload location)
//! ```
//!
//! Link-local, metadata, multicast and other special addresses are refused always, for every kind of request.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use reqwest::Url;

use super::ClientOptions;
use crate::error::{ImageError, Result};
use crate::reference::{DEFAULT_REGISTRY, Reference};

/// The host that serves the names of Docker Hub.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// Registries whose token service has another name.
const KNOWN_REALMS: [(&str, &str); 2] = [
    (DOCKER_HUB_HOST, "auth.docker.io"),
    ("registry.gitlab.com", "gitlab.com"),
];

/// How far inside a network an address is. A server that is further out must not lead us further in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Reach {
    /// The internet.
    Public,
    /// Private ranges.
    Private,
    /// This host.
    Loopback,
}

/// The reach of an address; `None` for addresses that are never spoken to.
pub(super) fn reach_of(address: IpAddr) -> Option<Reach> {
    match address {
        IpAddr::V4(address) => reach_v4(address),
        IpAddr::V6(address) => reach_v6(address),
    }
}

fn reach_v4(address: Ipv4Addr) -> Option<Reach> {
    let [a, b, c, d] = address.octets();
    match (a, b, c, d) {
        (127, ..) => Some(Reach::Loopback),
        // "This network", link-local (metadata services), protocol assignments, 6to4 relays, multicast, reserved.
        (0 | 224.., ..) | (169, 254, ..) | (192, 0, 0, _) | (192, 88, 99, _) => None,
        // Documentation, and the metadata address of one cloud inside the shared range.
        (192, 0, 2, _) | (198, 51, 100, _) | (203, 0, 113, _) | (100, 100, 100, 200) => None,
        (10, ..) | (172, 16..=31, ..) | (192, 168, ..) | (100, 64..=127, ..) | (198, 18..=19, ..) => {
            Some(Reach::Private)
        }
        _ => Some(Reach::Public),
    }
}

fn reach_v6(address: Ipv6Addr) -> Option<Reach> {
    if address == Ipv6Addr::LOCALHOST {
        return Some(Reach::Loopback);
    }
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        reach_v4(Ipv4Addr::new(a, b, c, d))
    };
    match segments {
        // IPv4-mapped, IPv4-compatible and translated addresses lead where the IPv4 address inside leads.
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low] => embedded(high, low),
        [0, 0, 0, 0, 0xffff, 0, high, low] => embedded(high, low),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x64, 0xff9b, ..] => None,
        [0x2002, high, low, ..] => embedded(high, low),
        // Teredo, documentation, discard.
        [0x2001, 0, ..] | [0x2001, 0xdb8, ..] | [0x100, 0, 0, 0, ..] => None,
        // The metadata address of one cloud, inside the unique local range.
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => None,
        [0xfc00..=0xfdff, ..] => Some(Reach::Private),
        // Link-local, site-local, multicast.
        [0xfe80..=0xfeff, ..] | [0xff00..=0xffff, ..] => None,
        _ => Some(Reach::Public),
    }
}

/// Scheme, host and port: what a secret is bound to.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    pub(super) scheme: String,
    pub(super) host: String,
    pub(super) port: u16,
}

impl Origin {
    pub(super) fn of(url: &Url) -> Self {
        Self {
            scheme: url.scheme().to_owned(),
            host: url
                .host_str()
                .unwrap_or_default()
                .trim_end_matches('.')
                .to_ascii_lowercase(),
            port: url.port_or_known_default().unwrap_or_default(),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}://{}:{}", self.scheme, self.host, self.port)
    }
}

impl fmt::Debug for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, formatter)
    }
}

/// The address that a host text is, when it is one.
pub(super) fn literal_address(host: &str) -> Option<IpAddr> {
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    bare.parse().ok()
}

/// Whether a host text names this host, without asking a name server.
fn is_loopback(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    match literal_address(&host) {
        Some(address) => reach_of(address) == Some(Reach::Loopback),
        None => host == "localhost" || host.ends_with(".localhost"),
    }
}

/// The rules for one registry.
#[derive(Debug, Clone)]
pub(super) struct Policy {
    /// Root of the registry's API, such as `https://registry-1.docker.io/`.
    pub(super) base: Url,
    pub(super) origin: Origin,
    /// How far in the registry's own name may lead.
    pub(super) own_reach: Reach,
    insecure: Vec<String>,
    trusted_realms: Vec<(String, String)>,
}

impl Policy {
    /// The rules for the registry of a reference.
    pub(super) fn new(reference: &Reference, options: &ClientOptions) -> Result<Self> {
        let registry = match reference.registry() {
            DEFAULT_REGISTRY => DOCKER_HUB_HOST,
            other => other,
        };
        let insecure: Vec<String> = options
            .insecure
            .iter()
            .map(|entry| entry.to_ascii_lowercase())
            .collect();
        let host = match registry.rsplit_once(':') {
            Some((host, port)) if !port.contains(']') => host,
            _ => registry,
        };
        let listed = insecure.iter().any(|entry| entry == registry || entry == host);
        let scheme = if is_loopback(host) || listed {
            "http"
        } else {
            "https"
        };
        let invalid = || ImageError::InvalidName {
            name: registry.to_owned(),
            reason: "the registry is not a host",
        };
        let base = Url::parse(&format!("{scheme}://{registry}/")).map_err(|_| invalid())?;
        let own_reach = if is_loopback(host) || listed {
            Reach::Loopback
        } else {
            Reach::Private
        };
        let origin = Origin::of(&base);
        let trusted_realms = options.trusted_realms.clone();
        let policy = Self {
            base,
            origin,
            own_reach,
            insecure,
            trusted_realms,
        };
        policy.check_literal(&policy.base, own_reach)?;
        Ok(policy)
    }

    /// Whether the registry is on this host by name, so that it may lead to other services of this host.
    pub(super) fn is_on_loopback(&self) -> bool {
        is_loopback(&self.origin.host)
    }

    /// Whether a URL is at the registry itself.
    pub(super) fn is_own(&self, url: &Url) -> bool {
        Origin::of(url) == self.origin
    }

    /// Checks a URL that a server told us to use, before any name is resolved: scheme, user info, address literals.
    ///
    /// # Errors
    /// [`ImageError::UnsafeServer`].
    pub(super) fn check_url(&self, url: &Url, limit: Reach, what: &str) -> Result<()> {
        let refuse = |reason: String| Err(self.refusal(reason));
        if !url.username().is_empty() || url.password().is_some() {
            return refuse(format!("its {what} contains user info"));
        }
        let Some(host) = url.host_str() else {
            return refuse(format!("its {what} has no host"));
        };
        match url.scheme() {
            "https" => {}
            "http" if self.allows_plain(url, host) => {}
            "http" => return refuse(format!("its {what} at {host} is not https")),
            _ => return refuse(format!("its {what} is not a web address")),
        }
        self.check_literal(url, limit)
    }

    fn allows_plain(&self, url: &Url, host: &str) -> bool {
        if self.origin.scheme != "http" {
            return false;
        }
        let host = host.to_ascii_lowercase();
        let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or_default());
        self.is_own(url)
            || (self.is_on_loopback() && is_loopback(&host))
            || self
                .insecure
                .iter()
                .any(|entry| *entry == host || *entry == with_port)
    }

    fn check_literal(&self, url: &Url, limit: Reach) -> Result<()> {
        let host = url.host_str().unwrap_or_default();
        let reach = match literal_address(host) {
            Some(address) => reach_of(address),
            None if is_loopback(host) => Some(Reach::Loopback),
            None => Some(Reach::Public),
        };
        match reach {
            Some(reach) if reach <= limit => Ok(()),
            _ => Err(self.refusal(format!("{host} is an address that it may not lead to"))),
        }
    }

    /// Whether the credentials of this registry may be shown to a token service on `realm_host`: the same host, a host
    /// above or below it in the name tree (whoever runs the upper one controls the lower one anyway), or a known pair.
    pub(super) fn is_related_realm(&self, realm: &Url) -> bool {
        let realm = Origin::of(realm);
        let (registry, host) = (self.origin.host.as_str(), realm.host.as_str());
        if registry == host {
            return true;
        }
        let listed = KNOWN_REALMS.contains(&(registry, host))
            || self.trusted_realms.iter().any(|(owner, service)| {
                (owner == registry || (owner == DEFAULT_REGISTRY && registry == DOCKER_HUB_HOST))
                    && service == host
            });
        let is_name = |host: &str| literal_address(host).is_none() && host.contains('.');
        let is_below = |lower: &str, upper: &str| {
            is_name(lower)
                && is_name(upper)
                && lower.strip_suffix(upper).is_some_and(|rest| rest.ends_with('.'))
        };
        listed || is_below(host, registry) || is_below(registry, host)
    }

    pub(super) fn refusal(&self, reason: impl Into<String>) -> ImageError {
        ImageError::UnsafeServer {
            host: self.origin.host.clone(),
            reason: reason.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(reference: &str) -> Policy {
        policy_with(reference, |_| {})
    }

    fn policy_with(reference: &str, change: impl FnOnce(&mut ClientOptions)) -> Policy {
        let mut options = ClientOptions::default();
        change(&mut options);
        Policy::new(&Reference::parse(reference).unwrap(), &options).unwrap()
    }

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    #[test]
    fn addresses_that_are_never_spoken_to() {
        for address in [
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "169.254.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "192.0.0.192",
            "100.100.100.200",
            "192.0.2.1",
            "::",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "::ffff:169.254.169.254",
            "::169.254.169.254",
            "::ffff:0:169.254.169.254",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::1",
            "2002:a9fe:a9fe::1",
            "2001:db8::1",
            "2001::1",
            "100::1",
            "fd00:ec2::254",
        ] {
            assert_eq!(reach_of(address.parse().unwrap()), None, "{address}");
        }
    }

    #[test]
    fn the_reach_of_ordinary_addresses() {
        for (address, reach) in [
            ("127.0.0.1", Reach::Loopback),
            ("127.255.0.1", Reach::Loopback),
            ("::1", Reach::Loopback),
            ("::ffff:127.0.0.1", Reach::Loopback),
            ("10.1.2.3", Reach::Private),
            ("172.16.0.1", Reach::Private),
            ("172.31.255.255", Reach::Private),
            ("192.168.1.1", Reach::Private),
            ("100.64.0.1", Reach::Private),
            ("fd12::1", Reach::Private),
            ("::ffff:10.0.0.1", Reach::Private),
            ("64:ff9b::10.0.0.1", Reach::Private),
            ("172.32.0.1", Reach::Public),
            ("8.8.8.8", Reach::Public),
            ("2606:4700::1111", Reach::Public),
        ] {
            assert_eq!(reach_of(address.parse().unwrap()), Some(reach), "{address}");
        }
    }

    #[test]
    fn http_is_for_loopback_and_listed_registries() {
        for (reference, scheme) in [
            ("localhost:5000/a", "http"),
            ("127.0.0.1:5000/a", "http"),
            ("[::1]:5000/a", "http"),
            ("registry.localhost/a", "http"),
            ("registry.example.com/a", "https"),
            ("localhost.example.com/a", "https"),
            ("alpine", "https"),
            ("10.0.0.1:5000/a", "https"),
        ] {
            assert_eq!(policy(reference).origin.scheme, scheme, "{reference}");
        }
        let listed = |entry: &str, reference: &str| {
            policy_with(reference, |options| options.insecure = vec![entry.to_owned()])
                .origin
                .scheme
        };
        assert_eq!(listed("10.0.0.1:5000", "10.0.0.1:5000/a"), "http");
        assert_eq!(listed("Reg.Example.com", "reg.example.com:81/a"), "http");
        assert_eq!(listed("10.0.0.1:5000", "10.0.0.1:5001/a"), "https");
        assert_eq!(listed("example.com", "reg.example.com/a"), "https");
    }

    #[test]
    fn docker_hub_is_served_by_another_host() {
        assert_eq!(policy("alpine").base.as_str(), "https://registry-1.docker.io/");
    }

    #[test]
    fn a_realm_must_be_https_and_on_a_host_that_may_be_contacted() {
        let policy = policy("registry.example.com/a");
        let allowed = |text: &str| policy.check_url(&url(text), Reach::Public, "token realm").is_ok();
        assert!(allowed("https://auth.example.com/token"));
        for refused in [
            "http://auth.example.com/token",
            "http://registry.example.com/token",
            "http://localhost/token",
            "https://user@auth.example.com/token",
            "https://:pass@auth.example.com/token",
            "https://127.0.0.1/token",
            "https://localhost/token",
            "https://LOCALHOST./token",
            "https://[::1]/token",
            "https://10.0.0.1/token",
            "https://169.254.169.254/token",
            "https://[::ffff:169.254.169.254]/token",
            "https://0x7f.1/token",
            "https://2130706433/token",
            "ftp://auth.example.com/token",
        ] {
            assert!(!allowed(refused), "{refused}");
        }
    }

    #[test]
    fn credentials_are_for_related_realms() {
        let related = |reference: &str, realm: &str| policy(reference).is_related_realm(&url(realm));
        for (reference, realm) in [
            ("alpine", "https://auth.docker.io/token"),
            ("ghcr.io/a/b", "https://ghcr.io/token"),
            ("registry.gitlab.com/a/b", "https://gitlab.com/jwt/auth"),
            (
                "registry.example.com/a",
                "https://auth.registry.example.com/token",
            ),
            ("registry.example.com:5000/a", "https://example.com/token"),
            ("gitlab.example.com:5050/a", "https://gitlab.example.com/jwt/auth"),
        ] {
            assert!(related(reference, realm), "{reference} {realm}");
        }
        for (reference, realm) in [
            ("alpine", "https://auth.docker.io.evil.example/token"),
            ("alpine", "https://evil.example/token"),
            ("ghcr.io/a/b", "https://auth.docker.io/token"),
            (
                "registry.example.com/a",
                "https://evil-registry.example.com/token",
            ),
            ("registry.example.com/a", "https://evilregistry.example.com/token"),
            ("a.github.io/x", "https://b.github.io/token"),
            ("registry.example.com/a", "https://com/token"),
            ("10.0.0.1/a", "https://0.0.1/token"),
            ("10.0.0.1/a", "https://10.0.0.2/token"),
        ] {
            assert!(!related(reference, realm), "{reference} {realm}");
        }
    }
}
