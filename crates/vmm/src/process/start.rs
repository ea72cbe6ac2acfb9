//! The start of a VMM, the same for every driver.
//!
//! ```text
//! spawned ─► identity known ─► it becomes what it shall be ─► the process of a machine
//!    └──────────────┴── it fails, or nobody waits any more: killed, and the reason is what it said itself
//! ```

use std::sync::Arc;

use hypeman_jail::{Mode, Report};

use super::ProcessHandle;
use super::own_filter::Look;
use super::spawn::{Detached, spawn_detached};
use crate::blocking::blocking;
use crate::console::Console;
use crate::files::io_error;
use crate::{VmmError, VmmKind};

/// A process that was started and is no machine yet. Dropped, it is killed.
pub(crate) struct Starting {
    process: Arc<ProcessHandle>,
    guard: KillOnDrop,
    /// What of its jail is in force.
    jail: Option<Report>,
    /// What shows of that only when it runs.
    look: Look,
    /// What it says.
    console: Console,
}

impl Starting {
    /// Starts the program of a VMM of this kind, whose words are in `console`.
    ///
    /// # Errors
    /// [`VmmError::StartFailed`] with its own words when it has ended already.
    pub(crate) async fn spawn(kind: VmmKind, program: Detached, console: &Console) -> Result<Self, VmmError> {
        let path = program.program.clone();
        let confinement = program.jail.as_ref();
        // Where all of it is required, nothing is started without.
        let required =
            confinement.is_some_and(|confinement| confinement.jail.options().mode == Mode::Required);
        let spawned = blocking(move || spawn_detached(program))
            .await
            .map_err(io_error("cannot start", &path))?;
        let process = ProcessHandle::of_child(spawned.pid).map_err(|error| {
            tracing::debug!(%error, program = %path.display(), "a VMM ended before it could be looked at");
            failed(console)
        })?;
        let process = Arc::new(process);
        Ok(Self {
            guard: KillOnDrop::of(&process),
            process,
            look: Look {
                kind,
                pid: spawned.pid,
                started_with: spawned.filters,
                required,
            },
            jail: spawned.jail,
            console: console.clone(),
        })
    }

    pub(crate) fn process(&self) -> &Arc<ProcessHandle> {
        &self.process
    }

    /// Waits until it is what it shall be. Also tells what of its jail is in force.
    ///
    /// # Errors
    /// Those of `ready`, and [`VmmError::StartFailed`] with its own words when it ends before. The process is gone.
    pub(crate) async fn until<T>(
        self,
        ready: impl Future<Output = Result<T, VmmError>>,
    ) -> Result<(T, Option<Report>), VmmError> {
        let Self {
            process,
            guard,
            jail,
            look,
            console,
        } = self;
        let whole = async {
            let ready = ready.await?;
            Ok::<_, VmmError>((ready, look.complete(jail).await?))
        };
        let outcome = tokio::select! {
            biased;
            outcome = whole => outcome,
            _ = process.ended() => Err(VmmError::Gone),
        };
        match outcome {
            Ok(started) => {
                guard.forget();
                Ok(started)
            }
            Err(error) => {
                process.end().await?;
                Err(match error {
                    // Its sockets end a moment before it does, so its words are whole only now.
                    VmmError::Gone => failed(&console),
                    error => error,
                })
            }
        }
    }
}

/// Kills a process whose start was cancelled or failed; its watching task reaps it.
struct KillOnDrop(Option<Arc<ProcessHandle>>);

impl KillOnDrop {
    fn of(process: &Arc<ProcessHandle>) -> Self {
        Self(Some(Arc::clone(process)))
    }

    /// The start succeeded.
    fn forget(mut self) {
        self.0 = None;
    }
}

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        if let Some(process) = &self.0 {
            let _ = process.kill();
        }
    }
}

fn failed(console: &Console) -> VmmError {
    VmmError::StartFailed(console.tail_of_start())
}
