//! What can go wrong with the host's network, each with what to do about it.

use std::io;
use std::net::Ipv4Addr;

/// A failure of the network, with a message that an operator can act on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// An option, a name or an address is not acceptable.
    #[error("invalid network setting: {0}")]
    Invalid(String),
    /// The host lacks something; the text names the fix.
    #[error("networking is unavailable: {0}")]
    Unavailable(String),
    /// Every address of the subnet is taken.
    #[error("no free address is left in {subnet}; delete instances or choose a larger subnet")]
    Exhausted {
        /// The subnet, as `address/prefix`.
        subnet: String,
    },
    /// The address belongs to another TAP of the same bridge.
    #[error("address {ip} is already in use by {tap}")]
    AddressInUse {
        /// The contested address.
        ip: Ipv4Addr,
        /// The TAP that has it.
        tap: String,
    },
    /// An interface of that name exists and is not ours.
    #[error("interface {name} already exists and does not belong to this instance; remove it or rename it")]
    InterfaceTaken {
        /// The interface.
        name: String,
    },
    /// There is no such interface.
    #[error("there is no interface {name}")]
    NoInterface {
        /// The interface.
        name: String,
    },
    /// The kernel refused a request.
    #[error("cannot {action}: {source}")]
    Kernel {
        /// What was asked for.
        action: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// `nft` refused our rule set.
    #[error("nft refused the rule set: {0}")]
    RuleSet(String),
}

impl NetworkError {
    /// Wraps the kernel's answer to `action`.
    pub(crate) fn kernel(action: impl Into<String>, source: io::Error) -> Self {
        Self::Kernel {
            action: action.into(),
            source,
        }
    }
}
