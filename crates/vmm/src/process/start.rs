//! The start of a VMM, the same for every driver.
//!
//! ```text
//! spawned ─► identity known ─► it becomes what it shall be ─► the process of a machine
//!    └──────────────┴── it fails, or nobody waits any more: killed, and the reason is what it said itself
//! ```

use std::io::ErrorKind;
use std::sync::Arc;

use hypeman_core::Undo;
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
    /// Kills it when nobody waits for it any more; its watching task reaps it.
    guard: Undo<Box<dyn FnOnce() + Send + Sync>>,
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
    /// The host does not start it, and [`VmmError::StartFailed`] with its own words when it has ended already.
    pub(crate) async fn spawn(kind: VmmKind, program: Detached, console: &Console) -> Result<Self, VmmError> {
        let console = console.clone();
        // All of it there: whoever does not wait for the outcome drops it, and with it the process.
        blocking(move || Self::spawned(kind, program, console)).await
    }

    fn spawned(kind: VmmKind, program: Detached, console: Console) -> Result<Self, VmmError> {
        let path = program.program.clone();
        let confinement = program.jail.as_ref();
        // Where all of it is required, nothing is started without.
        let required =
            confinement.is_some_and(|confinement| confinement.jail.options().mode == Mode::Required);
        let spawned = spawn_detached(program).map_err(io_error("cannot start", &path))?;
        let process = ProcessHandle::of_child(spawned.pid).map_err(|error| match error.kind() {
            ErrorKind::NotFound => failed(&console),
            _ => io_error("cannot watch", &path)(error),
        })?;
        let process = Arc::new(process);
        let killed = Arc::clone(&process);
        Ok(Self {
            guard: Undo::by(Box::new(move || drop(killed.kill()))),
            process,
            look: Look {
                kind,
                pid: spawned.pid,
                started_with: spawned.filters,
                required,
            },
            jail: spawned.jail,
            console,
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

fn failed(console: &Console) -> VmmError {
    VmmError::StartFailed(console.tail_of_start())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;

    /// A program that holds the other end for as long as it lives.
    fn sleeper() -> (Detached, File) {
        let (ours, held) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let program = Detached {
            program: "/bin/sleep".into(),
            arguments: vec!["600".into()],
            directory: "/".into(),
            output: File::options().write(true).open("/dev/null").unwrap(),
            errors: None,
            keep: vec![held],
            forbid_holes: false,
            jail: None,
            restraint: None,
        };
        (program, ours.into())
    }

    /// Waits until nobody holds the other end any more.
    async fn let_go_of(mut pipe: File) {
        let read = blocking(move || pipe.read_to_end(&mut Vec::new()));
        assert_eq!(read.await.unwrap(), 0);
    }

    #[tokio::test]
    async fn nothing_is_left_of_a_start_that_nobody_waits_for() {
        let console = Console::new("/nonexistent/log".into(), None);
        let (program, pipe) = sleeper();
        tokio::select! {
            biased;
            // Dropped as well, should it ever be that fast.
            _ = Starting::spawn(VmmKind::Qemu, program, &console) => {}
            () = std::future::ready(()) => {}
        }
        let_go_of(pipe).await;

        let (program, pipe) = sleeper();
        let starting = Starting::spawn(VmmKind::Qemu, program, &console).await.unwrap();
        tokio::select! {
            biased;
            _ = starting.until(std::future::pending::<Result<(), VmmError>>()) => panic!("it never is"),
            () = std::future::ready(()) => {}
        }
        let_go_of(pipe).await;
    }

    #[tokio::test]
    async fn a_start_that_fails_or_ends_says_why_and_leaves_nothing() {
        let console = Console::new("/nonexistent/log".into(), None);
        let (program, pipe) = sleeper();
        let starting = Starting::spawn(VmmKind::Qemu, program, &console).await.unwrap();
        let refused = starting
            .until(async { Err::<(), _>(VmmError::refused("boot", "no")) })
            .await;
        assert!(matches!(refused, Err(VmmError::Refused { .. })), "{refused:?}");
        let_go_of(pipe).await;

        let (program, pipe) = sleeper();
        let starting = Starting::spawn(VmmKind::Qemu, program, &console).await.unwrap();
        starting.process().kill().unwrap();
        let ended = starting
            .until(std::future::pending::<Result<(), VmmError>>())
            .await;
        assert!(matches!(ended, Err(VmmError::StartFailed(_))), "{ended:?}");
        let_go_of(pipe).await;
    }
}
