//! Whether this host can give VMs a network.
use crate::options::{Availability, NetworkOptions};
pub(crate) async fn probe(options: &NetworkOptions) -> Availability {
    match options.validate() {
        Ok(()) => Availability::Available,
        Err(error) => Availability::Unavailable { reason: error.to_string() },
    }
}
