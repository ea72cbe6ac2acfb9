//! Going on from what was captured: requests to restore and to fork, checked, and what became of each fork.

use hypeman_api::instance::Instance;
use hypeman_api::snapshot as api;
use hypeman_core::instance::InstanceState;
use hypeman_core::name;
use hypeman_core::snapshot::{MAX_FORKS, fork_names};
use hypeman_engine::{ForkRequest, RestoreRequest};

use super::instance::hypervisor_to_engine;
use crate::error::{ApiError, ApiResult};

fn target_to_core(target: api::SnapshotTargetState) -> InstanceState {
    match target {
        api::SnapshotTargetState::Stopped => InstanceState::Stopped,
        api::SnapshotTargetState::Standby => InstanceState::Standby,
        api::SnapshotTargetState::Running => InstanceState::Running,
    }
}

/// A request to restore a snapshot in place.
#[must_use]
pub fn restore(request: api::RestoreSnapshotRequest) -> RestoreRequest {
    RestoreRequest {
        target_state: request.target_state.map(target_to_core),
        target_hypervisor: request.target_hypervisor.map(hypervisor_to_engine),
    }
}

/// A request to fork an instance, checked.
///
/// # Errors
/// 400 for a name or a count that cannot be.
pub fn of_instance(request: api::ForkInstanceRequest) -> ApiResult<ForkRequest> {
    Ok(ForkRequest {
        count: forks(&request.name, request.count)?,
        name: request.name,
        from_running: request.from_running.unwrap_or(false),
        target_state: request.target_state.map(target_to_core),
        target_hypervisor: None,
    })
}

/// A request to fork a snapshot, checked.
///
/// # Errors
/// 400 for a name or a count that cannot be.
pub fn of_snapshot(request: api::ForkSnapshotRequest) -> ApiResult<ForkRequest> {
    Ok(ForkRequest {
        count: forks(&request.name, request.count)?,
        name: request.name,
        from_running: false,
        target_state: request.target_state.map(target_to_core),
        target_hypervisor: request.target_hypervisor.map(hypervisor_to_engine),
    })
}

fn forks(base: &str, count: Option<u32>) -> ApiResult<u32> {
    name::check(base).map_err(|error| ApiError::schema(error.message))?;
    let count = count.unwrap_or(1);
    if !(1..=MAX_FORKS).contains(&count) {
        return Err(ApiError::schema(format!("count must be 1 to {MAX_FORKS}")));
    }
    fork_names(base, count)?;
    Ok(count)
}

/// What became of one of several forks.
#[must_use]
pub fn result(name: String, result: Result<Instance, ApiError>) -> api::ForkResult {
    let (instance, error) = match result {
        Ok(instance) => (Some(instance), None),
        Err(error) => (None, Some(error.into_body())),
    };
    api::ForkResult {
        name,
        instance,
        error,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::samples::{body, code_of};
    use super::*;

    #[test]
    fn names_and_counts_of_forks_are_checked() {
        let fork = |value: Value| of_snapshot(body(value));
        assert_eq!(fork(json!({"name": "web"})).unwrap().count, 1);
        assert_eq!(fork(json!({"name": "web", "count": 100})).unwrap().count, 100);
        for (value, code) in [
            (json!({"name": "Web"}), "Bad Request"),
            (json!({"name": "web", "count": 0}), "Bad Request"),
            (json!({"name": "web", "count": 101}), "Bad Request"),
            (json!({"name": "a".repeat(63), "count": 2}), "invalid_request"),
        ] {
            assert_eq!(code_of(fork(value.clone())), code, "{value}");
        }
        let instance = of_instance(body(json!({"name": "web", "target_state": "Standby"}))).unwrap();
        assert!(!instance.from_running);
        assert_eq!(instance.target_state, Some(InstanceState::Standby));
    }
}
