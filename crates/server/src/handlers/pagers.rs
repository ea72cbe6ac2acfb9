//! Who serves page faults.

use axum::Json;
use axum::extract::State;
use hypeman_api::pager as api;
use hypeman_engine::{MachineState, PagedMachine, PagerReport};

use crate::state::AppState;

/// The processes that serve memory of machines page by page, and how far each machine is.
#[utoipa::path(get, path = "/pagers", tag = "resources", operation_id = "listPagers",
    responses((status = 200, description = "Pagers, those that take machines first.", body = [api::Pager])))]
pub async fn list(State(state): State<AppState>) -> Json<Vec<api::Pager>> {
    Json(state.engine.pagers().await.into_iter().map(pager).collect())
}

fn pager(report: PagerReport) -> api::Pager {
    let numbers = report.numbers;
    api::Pager {
        version: report.version,
        pid: report.pid,
        draining: report.draining,
        answering: numbers.is_some(),
        oldest_fault_ms: numbers
            .map(|numbers| i64::try_from(numbers.oldest_fault.as_millis()).unwrap_or(i64::MAX)),
        cache: numbers.map(|numbers| api::PagerCache {
            bytes: signed(numbers.cache.bytes),
            bound_bytes: signed(numbers.cache.bound),
            hits: signed(numbers.cache.hits),
            misses: signed(numbers.cache.misses),
            read_bytes: signed(numbers.cache.read_bytes),
        }),
        machines: report.machines.into_iter().filter_map(machine).collect(),
    }
}

/// `None` of one that is gone.
fn machine(machine: PagedMachine) -> Option<api::PagerMachine> {
    let (state, reason) = match machine.state {
        MachineState::Waiting => (api::PagerMachineState::Waiting, None),
        MachineState::Serving => (api::PagerMachineState::Serving, None),
        MachineState::Graduated => (api::PagerMachineState::Graduated, None),
        MachineState::Failed { reason, .. } => (api::PagerMachineState::Failed, Some(reason)),
        MachineState::Gone => return None,
    };
    let numbers = machine.numbers;
    Some(api::PagerMachine {
        instance_id: machine.instance_id,
        instance_name: machine.instance_name,
        state,
        reason,
        memory_bytes: numbers.and_then(|numbers| numbers.memory_bytes).map(signed),
        populated_bytes: numbers.and_then(|numbers| numbers.populated_bytes).map(signed),
        faults: numbers.map(|numbers| signed(numbers.faults)),
        faulted_pages: numbers.map(|numbers| signed(numbers.faulted_pages)),
        fetched_pages: numbers.map(|numbers| signed(numbers.fetched_pages)),
        fault_latency: numbers
            .and_then(|numbers| numbers.latency)
            .map(|latency| api::PagerFaultLatency {
                p50_us: signed(latency.p50_us),
                p99_us: signed(latency.p99_us),
                max_us: signed(latency.max_us),
            }),
    })
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hypeman_engine::{CacheStats, Latency, MachineNumbers, PagerNumbers};
    use serde_json::json;

    use super::*;

    fn paged(state: MachineState, numbers: Option<MachineNumbers>) -> PagedMachine {
        PagedMachine {
            instance_id: "abc".into(),
            instance_name: Some("web".into()),
            state,
            numbers,
        }
    }

    fn shown(numbers: Option<PagerNumbers>, machines: Vec<PagedMachine>) -> serde_json::Value {
        let report = PagerReport {
            version: "1.0".into(),
            pid: 7,
            draining: numbers.is_none(),
            numbers,
            machines,
        };
        serde_json::to_value(pager(report)).unwrap()
    }

    #[test]
    fn a_pager_that_answers_is_shown_with_its_numbers() {
        let numbers = PagerNumbers {
            oldest_fault: Duration::from_millis(3),
            cache: CacheStats {
                bytes: 1,
                bound: 2,
                hits: 3,
                misses: 4,
                read_bytes: u64::MAX,
            },
        };
        let counted = MachineNumbers {
            memory_bytes: Some(8192),
            populated_bytes: Some(4096),
            faults: 1,
            faulted_pages: 8,
            fetched_pages: 2,
            latency: Some(Latency {
                p50_us: 5,
                p99_us: 6,
                max_us: 7,
            }),
        };
        let machines = vec![
            paged(MachineState::Serving, Some(counted)),
            paged(MachineState::Gone, None),
        ];
        assert_eq!(
            shown(Some(numbers), machines),
            json!({
                "version": "1.0", "pid": 7, "draining": false, "answering": true, "oldest_fault_ms": 3,
                "cache": {"bytes": 1, "bound_bytes": 2, "hits": 3, "misses": 4, "read_bytes": i64::MAX},
                "machines": [{
                    "instance_id": "abc", "instance_name": "web", "state": "serving",
                    "memory_bytes": 8192, "populated_bytes": 4096,
                    "faults": 1, "faulted_pages": 8, "fetched_pages": 2,
                    "fault_latency": {"p50_us": 5, "p99_us": 6, "max_us": 7},
                }],
            })
        );
    }

    #[test]
    fn of_one_that_is_silent_only_what_was_heard_last_is_shown() {
        let failed = MachineState::Failed {
            reason: "damaged".into(),
            damaged: true,
        };
        assert_eq!(
            shown(None, vec![paged(failed, None)]),
            json!({
                "version": "1.0", "pid": 7, "draining": true, "answering": false,
                "machines": [{"instance_id": "abc", "instance_name": "web", "state": "failed", "reason": "damaged"}],
            })
        );
    }
}
