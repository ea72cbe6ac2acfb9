//! What the pagers of a server say: how much they have read, and how one machine fares.

use std::time::Duration;

use serde_json::Value;

use crate::error::{BenchError, Result};
use crate::http::Connection;
use crate::server::call;

/// A machine whose memory comes page by page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Served {
    /// Bytes of its memory that are there: what it asked for, the neighbours that came with it, and zeros.
    pub populated: u64,
    /// Half of its faults waited no longer.
    pub p50: Duration,
    /// All but one in a hundred waited no longer.
    pub p99: Duration,
}

/// Bytes that all pagers of a server have read from its store, as they lie there.
///
/// # Errors
/// The server refuses.
pub fn read_bytes(api: &mut Connection) -> Result<u64> {
    Ok(read(&call(api, "GET", "/pagers", None, 200)?))
}

/// How the machine of an instance fares now.
///
/// # Errors
/// No pager serves it.
pub fn of(api: &mut Connection, instance: &str) -> Result<Served> {
    let pagers = call(api, "GET", "/pagers", None, 200)?;
    served(&pagers, instance)
        .ok_or_else(|| BenchError::Answer(format!("no pager tells of {instance}: {pagers}")))
}

fn read(pagers: &Value) -> u64 {
    let pagers = pagers.as_array().into_iter().flatten();
    pagers
        .filter_map(|pager| pager["cache"]["read_bytes"].as_u64())
        .sum()
}

fn served(pagers: &Value, instance: &str) -> Option<Served> {
    let machine = pagers
        .as_array()?
        .iter()
        .filter_map(|pager| pager["machines"].as_array())
        .flatten()
        .find(|machine| machine["instance_id"] == instance)?;
    let waited = |name: &str| machine["fault_latency"][name].as_u64().map(Duration::from_micros);
    Some(Served {
        populated: machine["populated_bytes"].as_u64()?,
        p50: waited("p50_us")?,
        p99: waited("p99_us")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_pagers_have_read_is_summed_and_a_machine_is_found_at_any_of_them() {
        let pagers = json!([
            { "cache": { "read_bytes": 5 }, "machines": [] },
            { "machines": [] },
            { "cache": { "read_bytes": 7 }, "machines": [{
                "instance_id": "a", "populated_bytes": 8192, "fault_latency": { "p50_us": 20, "p99_us": 90, "max_us": 91 }
            }, { "instance_id": "b" }] },
        ]);
        assert_eq!(read(&pagers), 12);
        let expected = Served {
            populated: 8192,
            p50: Duration::from_micros(20),
            p99: Duration::from_micros(90),
        };
        assert_eq!(served(&pagers, "a"), Some(expected));
        assert_eq!(served(&pagers, "b"), None, "which has had no fault yet");
        assert_eq!(served(&pagers, "c"), None);
    }
}
