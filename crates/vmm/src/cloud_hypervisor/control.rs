//! Our way to a Cloud Hypervisor process, and what it told of its machine.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hyper::Method;
use serde_json::Value;

use super::events::Told;
use crate::process::ProcessHandle;
use crate::rest::{CALL_DEADLINE, RestClient};
use crate::{RunState, VmmError};

/// Time between the end of the events and the end of the process that held them.
const END_GRACE: Duration = Duration::from_secs(1);
/// Pausing waits for requests to disks that are under way.
const PAUSE_DEADLINE: Duration = Duration::from_secs(60);

/// A Cloud Hypervisor process.
#[derive(Debug)]
pub(super) struct Control {
    rest: RestClient,
    told: Told,
    /// Held by what pauses and resumes, so that nothing lets a machine go on in the middle of its own capture.
    moving: tokio::sync::Mutex<()>,
}

impl Control {
    pub(super) fn new(socket: PathBuf, process: Arc<ProcessHandle>, told: Told) -> Self {
        Self {
            rest: RestClient::new(socket, process),
            told,
            moving: tokio::sync::Mutex::default(),
        }
    }

    pub(super) fn process(&self) -> &Arc<ProcessHandle> {
        self.rest.process()
    }

    pub(super) fn told(&self) -> &Told {
        &self.told
    }

    /// Waits until the events of a process that has ended are all known.
    pub(super) async fn drained(&self) {
        let _ = tokio::time::timeout(END_GRACE, self.told.drained()).await;
    }

    /// Orders something: `vm.boot` and the like.
    pub(super) async fn order(
        &self,
        order: &str,
        body: Option<&Value>,
        deadline: Duration,
    ) -> Result<Value, VmmError> {
        self.rest
            .call(Method::PUT, &format!("/api/v1/{order}"), body, deadline)
            .await
    }

    /// What it says of its machine.
    pub(super) async fn info(&self, deadline: Duration) -> Result<Value, VmmError> {
        self.rest
            .call(Method::GET, "/api/v1/vm.info", None, deadline)
            .await
    }

    pub(super) async fn run_state(&self, deadline: Duration) -> Result<RunState, VmmError> {
        let info = self.info(deadline).await?;
        match info["state"].as_str().unwrap_or_default() {
            "Created" => Ok(RunState::Created),
            "Running" => Ok(RunState::Running),
            "Shutdown" => Ok(RunState::Shutdown),
            "Paused" | "BreakPoint" => Ok(RunState::Paused),
            other => Err(VmmError::refused(
                "vm.info",
                format!("its state is {other:?}, which is none"),
            )),
        }
    }

    /// Stops the processors; a machine that stands still already stays so.
    pub(super) async fn pause(&self) -> Result<(), VmmError> {
        let _moving = self.moving.lock().await;
        self.bring("vm.pause", RunState::Paused).await
    }

    /// Lets the processors go on.
    pub(super) async fn resume(&self) -> Result<(), VmmError> {
        let _moving = self.moving.lock().await;
        self.bring("vm.resume", RunState::Running).await
    }

    /// Does something while the machine stands still, and lets it go on if it ran.
    pub(super) async fn while_paused<T>(
        &self,
        work: impl Future<Output = Result<T, VmmError>>,
    ) -> Result<T, VmmError> {
        let _moving = self.moving.lock().await;
        let ran = self.run_state(CALL_DEADLINE).await? == RunState::Running;
        if ran {
            self.bring("vm.pause", RunState::Paused).await?;
        }
        let outcome = work.await;
        if ran {
            self.bring("vm.resume", RunState::Running).await?;
        }
        outcome
    }

    /// It refuses to be brought where it is, and where its answer was lost it may be there.
    async fn bring(&self, order: &str, wanted: RunState) -> Result<(), VmmError> {
        match self.order(order, None, PAUSE_DEADLINE).await {
            Err(error @ (VmmError::Refused { .. } | VmmError::Unanswered { .. })) => {
                match self.run_state(CALL_DEADLINE).await {
                    Ok(state) if state == wanted => Ok(()),
                    Err(VmmError::Gone) => Err(VmmError::Gone),
                    _ => Err(error),
                }
            }
            outcome => outcome.map(drop),
        }
    }

    /// Presses the power button.
    pub(super) async fn power_button(&self) -> Result<(), VmmError> {
        self.order("vm.power-button", None, CALL_DEADLINE).await.map(drop)
    }
}
