//! Machines whose memory comes page by page from a pager, instead of being laid out before they start.
//!
//! ```text
//!  restore ──► serve: the pager listens for this machine, for this image ──► VMM connects ──► pages as they are asked for
//!                                                                              │
//!               the pager fails, or is gone ──► condemned with the reason ──► killed    all memory is there ──► forgotten
//!
//!  no pager takes the machine ──► auto: its memory is expanded after all     always: the restore fails
//! ```
//! Invariant: a machine that waits for a page that nobody gives is killed, by whoever notices first: the watch of a
//! running server, or the recovery of the next one. It never just hangs.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hypeman_pager::{
    Condition, MachineState, Pager, PagerClient, PagerError, PagerEvent, PagerOptions, RefusedCode,
    Registration, Served,
};
use hypeman_snapshots::MemoryId;
use hypeman_vmm::{Machine, VmmKind};
use tokio::sync::broadcast;

use crate::layout::Layout;
use crate::shared::Shared;
use crate::{EngineError, random};

/// Where sockets of pagers lie, below the runtime directory: instances have other names.
pub(crate) const DIRECTORY: &str = "pager";
/// Name of a machine's socket in its runtime directory.
const SOCKET: &str = "pages.sock";

/// From here on a guest that is served answers sooner: two processors expand so much in 0.3 s.
const SERVED_FROM: u64 = 1 << 30;

/// When pages are served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PagingMode {
    /// Where so much memory would have to be expanded first that it takes longer than being served; expanded after all
    /// where no pager takes the machine.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Wherever the VMM can ask for them. A restore fails where no pager takes the machine.
    Always,
}

fn wanted(mode: PagingMode, served_from: u64, to_expand: Option<u64>) -> bool {
    match mode {
        PagingMode::Off => false,
        PagingMode::Auto => to_expand.is_some_and(|bytes| bytes >= served_from),
        PagingMode::Always => true,
    }
}

/// What becomes of a restore that no pager takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unserved {
    /// Its memory is expanded, as on a host without pagers.
    Expanded,
    /// It fails: served memory was insisted on.
    Refused,
    /// It fails: its memory is not what was stored, however it is laid out.
    Damaged,
}

/// Decides by what the pager, or the lack of one, said.
fn unserved(mode: PagingMode, error: &PagerError) -> Unserved {
    match (mode, error) {
        (_, PagerError::Refused(refused)) if refused.code == RefusedCode::Damaged => Unserved::Damaged,
        (PagingMode::Always, _) => Unserved::Refused,
        (PagingMode::Auto | PagingMode::Off, _) => Unserved::Expanded,
    }
}

/// How pages are served.
#[derive(Debug, Clone)]
pub struct PagingOptions {
    /// When.
    pub mode: PagingMode,
    /// Bytes from which on memory that would have to be expanded is served instead, in the mode `Auto`.
    pub served_from: u64,
    /// The program that is a pager when told so: this one.
    pub program: Option<PathBuf>,
    /// The release of this server.
    pub release: String,
    /// Bytes of memory images that a pager keeps in RAM.
    pub cache_bytes: u64,
    /// How long a machine is served before all of its memory is filled.
    pub graduate_after: Option<Duration>,
}

impl Default for PagingOptions {
    fn default() -> Self {
        Self {
            mode: PagingMode::Off,
            served_from: SERVED_FROM,
            program: None,
            release: "0".to_owned(),
            cache_bytes: 4 << 30,
            graduate_after: Some(Duration::from_secs(600)),
        }
    }
}

/// The pagers of this server.
#[derive(Debug)]
pub(crate) struct Paging {
    mode: PagingMode,
    served_from: u64,
    pager: Arc<Pager>,
    store: PathBuf,
}

/// A machine that is being started with served memory. Forgotten unless it is kept.
#[derive(Debug)]
pub(crate) struct Serving {
    pager: Arc<Pager>,
    served: Served,
    /// The machine as the pager knows it.
    pub(crate) name: String,
    /// Where its VMM connects.
    pub(crate) socket: PathBuf,
    kept: bool,
}

impl Serving {
    /// Completes with the reason when the pager cannot give it what it asks for.
    pub(crate) async fn failed(&self) -> String {
        self.served.failed().await
    }

    /// The machine runs, and its record names it.
    pub(crate) fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        let (pager, name) = (Arc::clone(&self.pager), std::mem::take(&mut self.name));
        tokio::spawn(async move { forget(&pager, &name).await });
    }
}

async fn forget(pager: &Pager, name: &str) {
    if let Some(client) = pager.pager_of(name) {
        match client.forget(name).await {
            // Its end was noticed before.
            Ok(()) | Err(PagerError::Gone(_) | PagerError::Refused(_)) => {}
            Err(error) => tracing::warn!(name, %error, "the pager does not forget a machine"),
        }
    }
}

impl Paging {
    pub(crate) fn open(options: &PagingOptions, layout: &Layout) -> Self {
        let possible = options.program.is_some() && options.mode != PagingMode::Off;
        let mode = match possible.then(hypeman_pager::memory::probe) {
            Some(Ok(())) => options.mode,
            Some(Err(error)) if options.mode == PagingMode::Always => {
                tracing::warn!(%error, "page faults cannot be served on this host; memory is expanded instead");
                PagingMode::Off
            }
            Some(Err(error)) => {
                tracing::info!(%error, "page faults cannot be served on this host; memory is expanded instead");
                PagingMode::Off
            }
            None => PagingMode::Off,
        };
        let pager = Pager::new(PagerOptions {
            program: options.program.clone().unwrap_or_default(),
            directory: layout.runtime().join(DIRECTORY),
            log: layout.system().join("pager.log"),
            release: options.release.clone(),
            cache_bytes: options.cache_bytes,
            graduate_after: options.graduate_after,
        });
        Self {
            mode,
            served_from: options.served_from,
            pager: Arc::new(pager),
            store: layout.memory(),
        }
    }

    /// Takes back the pagers that an earlier server left, before their machines are. Nobody but the named machines may
    /// still need them.
    pub(crate) async fn adopt(&self, machines: &HashSet<&str>) {
        if let Err(error) = self.pager.adopt().await {
            tracing::error!(%error, "earlier pagers were not taken back");
        }
        self.pager.forget_others(|name| machines.contains(name)).await;
    }

    /// Whether memory of a machine of this kind may be served at all.
    pub(crate) fn can_serve(&self, kind: VmmKind) -> bool {
        self.mode != PagingMode::Off && kind == VmmKind::Firecracker
    }

    /// Whether memory should be served of which so many bytes would have to be expanded; `None`: it lies there as it would
    /// be mapped.
    pub(crate) fn wants(&self, to_expand: Option<u64>) -> bool {
        wanted(self.mode, self.served_from, to_expand)
    }

    /// Has a machine served from an image, which the caller holds. `None`: nobody serves it, and its memory is to be
    /// expanded instead.
    ///
    /// # Errors
    /// The image is damaged, or served memory was insisted on.
    pub(crate) async fn serve(
        &self,
        instance: &str,
        image: MemoryId,
        memory_bytes: u64,
        runtime: &std::path::Path,
    ) -> Result<Option<Serving>, EngineError> {
        let suffix = random::hex::<4>().map_err(|error| EngineError::io("random name", error))?;
        let name = format!("{instance}-{suffix}");
        let socket = runtime.join(SOCKET);
        // What an earlier attempt left.
        let _ = std::fs::remove_file(&socket);
        let registration = Registration {
            machine: name.clone(),
            store: self.store.clone(),
            image,
            memory_bytes,
            socket: socket.clone(),
            overlay: Vec::new(),
            working_set: true,
        };
        let served = match self.pager.register(registration).await {
            Ok(served) => served,
            Err(error) => {
                return match unserved(self.mode, &error) {
                    Unserved::Expanded => {
                        tracing::warn!(instance, %error, "no pager serves this memory; it is expanded instead");
                        Ok(None)
                    }
                    Unserved::Refused => Err(EngineError::RestoreFailed(error.to_string())),
                    Unserved::Damaged => {
                        tracing::error!(instance, %error, "not restored");
                        Err(EngineError::damaged("the memory image"))
                    }
                };
            }
        };
        Ok(Some(Serving {
            served,
            pager: Arc::clone(&self.pager),
            name,
            socket,
            kept: false,
        }))
    }

    /// Makes the page tables of a machine that stands still tell what it has. `false` when it is not served any more:
    /// then what it does not have is zero.
    pub(crate) async fn settle(&self, name: Option<&str>) -> Result<bool, EngineError> {
        let Some(name) = name else {
            return Ok(false);
        };
        let Some(client) = self.pager.pager_of(name) else {
            return Ok(false);
        };
        client
            .settle(name)
            .await
            .map_err(|error| EngineError::io("memory of a served machine", std::io::Error::other(error)))?;
        Ok(client.machine(name) == Some(MachineState::Serving))
    }

    /// Why a machine that runs cannot go on, if its pages are not served any more and should be.
    pub(crate) async fn abandoned(&self, name: &str, machine: &Arc<dyn Machine>) -> Option<String> {
        match self.pager.machine(name) {
            Some(MachineState::Failed { reason, .. }) => Some(reason),
            Some(_) => None,
            // Nobody knows it. That is fine for one that had all of its memory.
            None => match machine.guest_memory().await {
                Ok(memory) if !memory.misses_what_it_came_from() => None,
                _ => Some("the pager that served its memory is gone".to_owned()),
            },
        }
    }

    /// Whether a machine depends on a pager that lives and does not answer: it stands still at its next fault.
    pub(crate) fn is_silent(&self, name: &str) -> bool {
        let Some(client) = self.pager.pager_of(name) else {
            return false;
        };
        let silent = *client.condition().borrow() == Condition::Silent;
        silent && client.machines().iter().any(|served| served == name)
    }

    /// All pagers that live.
    pub(crate) fn clients(&self) -> Vec<Arc<PagerClient>> {
        self.pager.clients()
    }

    fn events(&self) -> broadcast::Receiver<PagerEvent> {
        self.pager.events()
    }
}

/// Kills machines whose pages nobody gives any more, until the server ends.
pub(crate) async fn watch(shared: Arc<Shared>) {
    let mut events = shared.paging.events();
    // What happened before somebody listened.
    look_at_all(&shared).await;
    loop {
        let event = tokio::select! {
            () = shared.closing.cancelled() => return,
            event = events.recv() => event,
        };
        match event {
            Ok(PagerEvent::Machine { machine, state }) => match state {
                MachineState::Failed { reason, .. } => condemn(&shared, &machine, &reason).await,
                MachineState::Graduated => forget(&shared.paging.pager, &machine).await,
                MachineState::Waiting | MachineState::Serving | MachineState::Gone => {}
            },
            Ok(PagerEvent::Gone { machines, reason }) => {
                for machine in machines {
                    condemn(&shared, &machine, &format!("the pager is gone: {reason}")).await;
                }
            }
            Err(broadcast::error::RecvError::Lagged(_)) => {
                look_at_all(&shared).await;
            }
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

/// Looks whether machines are still served that should be.
async fn look_at_all(shared: &Shared) {
    for slot in shared.table.slots() {
        let run = slot.published.borrow().record.run.clone();
        if let Some(name) = run.and_then(|run| run.served)
            && let Some(machine) = slot.live.machine()
            && let Some(reason) = shared.paging.abandoned(&name, &machine).await
        {
            condemn(shared, &name, &reason).await;
        }
    }
}

/// Kills the machine that has this name at a pager, with the reason as that of its end.
async fn condemn(shared: &Shared, name: &str, reason: &str) {
    let Some((instance, _)) = name.rsplit_once('-') else {
        return;
    };
    let Ok(slot) = shared.table.get(instance) else {
        return;
    };
    // A machine that is being started fails by itself when it is killed; one of a later run has another name.
    let of_record = slot.published.borrow().record.run.clone();
    if of_record.is_some_and(|run| run.served.as_deref() != Some(name)) {
        return;
    }
    if let Some(machine) = slot.live.machine() {
        tracing::error!(
            instance,
            reason,
            "the memory of a machine is not served any more: killing it"
        );
        slot.live
            .condemn(format!("its memory is not served any more: {reason}"));
        if let Err(error) = machine.kill().await {
            tracing::error!(instance, %error, "not killed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use hypeman_pager::Refused;

    use super::*;

    #[test]
    fn what_no_pager_takes_is_expanded_unless_it_is_damaged_or_pagers_are_insisted_on() {
        let refused = |code| {
            PagerError::Refused(Refused {
                code,
                message: "no".to_owned(),
            })
        };
        let broken = || io::Error::from(io::ErrorKind::PermissionDenied);
        let socket = PathBuf::from("/run/pager.sock");
        let lacks = [
            PagerError::Start(broken()),
            PagerError::Connect {
                socket,
                source: broken(),
            },
            PagerError::Gone("it has ended".to_owned()),
            PagerError::Protocol("it does not say hello"),
            PagerError::Io(broken()),
            refused(RefusedCode::Protocol),
            refused(RefusedCode::Draining),
            refused(RefusedCode::Host),
            refused(RefusedCode::Other),
        ];
        for error in lacks {
            assert_eq!(unserved(PagingMode::Auto, &error), Unserved::Expanded, "{error}");
            assert_eq!(unserved(PagingMode::Always, &error), Unserved::Refused, "{error}");
        }
        for mode in [PagingMode::Auto, PagingMode::Always] {
            let damaged = refused(RefusedCode::Damaged);
            assert_eq!(unserved(mode, &damaged), Unserved::Damaged, "{mode:?}");
        }
    }

    #[test]
    fn only_memory_that_takes_long_to_expand_is_served_unasked() {
        let all = [None, Some(0), Some(999), Some(1000)];
        let served = |mode| all.map(|to_expand| wanted(mode, 1000, to_expand));
        assert_eq!(served(PagingMode::Auto), [false, false, false, true]);
        assert_eq!(served(PagingMode::Always), [true; 4]);
        assert_eq!(served(PagingMode::Off), [false; 4]);
    }

    #[tokio::test]
    async fn a_pager_that_cannot_be_started_is_missed_only_where_it_was_insisted_on() {
        let directory = tempfile::tempdir().unwrap();
        let served = async |mode| {
            let options = PagerOptions {
                program: directory.path().join("nothing"),
                directory: directory.path().join(DIRECTORY),
                log: directory.path().join("pager.log"),
                release: "1.0.0".to_owned(),
                cache_bytes: 1 << 20,
                graduate_after: None,
            };
            let paging = Paging {
                mode,
                served_from: 0,
                pager: Arc::new(Pager::new(options)),
                store: directory.path().to_owned(),
            };
            let image = "0".repeat(32).parse().unwrap();
            paging.serve("one", image, 1 << 20, directory.path()).await
        };
        assert!(served(PagingMode::Auto).await.unwrap().is_none());
        let refused = served(PagingMode::Always).await.unwrap_err();
        assert!(matches!(refused, EngineError::RestoreFailed(_)), "{refused}");
        assert!(refused.to_string().contains("cannot be started"), "{refused}");
    }
}
