//! Holding a guest's workload still around a capture.
//!
//! ```text
//!  freeze in the guest ─► pause ─► captured ─► resume ─► thaw
//!                                     └─► restored or forked ─► told the time, or who it is ─► thaw
//! ```
//!
//! What goes on from a captured state does nothing before it was welcomed: see [`super::link`]. The source itself is
//! thawed at once, and by every connection that is made to it anew, so that no crash leaves it frozen.
//!
//! Where the VMM ends all connections to the guest with its device state, sessions are ended here with that reason, and a
//! connection is made anew.
//!
//! A guest that can't be held, because a process in it waits for a disk, or because its agent is gone, is captured all
//! the same: a copy of it cannot act on the network before it was told who it is, for the bridge lets nothing of it
//! pass, but its workload may run for some milliseconds before that.

use std::sync::Arc;

use hypeman_guest_api::ChannelError;
use hypeman_guest_api::host::GuestClient;
use hypeman_vmm::Machine;

use super::driver::Driver;
use super::request::Operation;
use super::standby::AGENT_PATIENCE;
use crate::{EngineError, faults};

/// A workload that stands still, to be let go by [`Driver::let_go`].
#[must_use]
pub(super) struct Held {
    client: Option<GuestClient>,
    /// The capture has ended all connections to the guest.
    cut: bool,
}

impl Held {
    fn by(client: Option<GuestClient>) -> Self {
        Self { client, cut: false }
    }
}

/// Who was asked to hold a workload still, and what came of it.
type Asked = Option<(GuestClient, Result<(), ChannelError>)>;

async fn ask(client: Option<GuestClient>) -> Asked {
    let client = client?;
    let outcome = client.freeze().await;
    Some((client, outcome))
}

impl Driver {
    /// Holds the workload of a running guest still.
    pub(super) async fn hold_still(&mut self) -> Held {
        let asked = ask(self.slot.live.client()).await;
        self.held(asked).await
    }

    /// Records what is intended, and meanwhile holds the workload still: whatever comes of the record, the next
    /// connection of any server would let it go.
    pub(super) async fn begin_held(
        &mut self,
        operation: Operation,
        recorded: &'static str,
    ) -> Result<Held, EngineError> {
        let record = async {
            let begun = self.begin(operation).await;
            faults::point(recorded);
            begun
        };
        let (begun, asked) = tokio::join!(record, ask(self.slot.live.client()));
        let held = self.held(asked).await;
        match begun {
            Ok(_) => Ok(held),
            Err(error) => {
                self.let_go(held).await;
                Err(error.into())
            }
        }
    }

    async fn held(&mut self, asked: Asked) -> Held {
        let Some((client, outcome)) = asked else {
            self.log.line("captured as it moves: its agent is not there");
            return Held::by(None);
        };
        match outcome {
            Ok(()) => Held::by(Some(client)),
            Err(error) => {
                self.log.line(&format!("captured as it moves: {error}"));
                // An answer that came too late may have frozen it.
                self.let_go(Held::by(Some(client))).await;
                Held::by(None)
            }
        }
    }

    /// Notes whether the capture has ended the connections to the guest, so that those who use them are told why. To be
    /// asked before the guest goes on: from then on it refuses what still comes on them.
    pub(super) fn note_cut(&self, machine: &Arc<dyn Machine>, held: Held) -> Held {
        let cut = held.cut || machine.connections_have_ended() || faults::cuts_connections();
        if cut && let Some(client) = self.slot.live.client() {
            client.note_captured();
        }
        Held { cut, ..held }
    }

    /// Lets the workload of a guest go on whose machine runs again.
    pub(super) async fn let_go(&mut self, held: Held) {
        let run = self.run.as_ref();
        if held.cut || run.is_some_and(|run| run.machine.connections_have_ended()) {
            return self.reach_anew().await;
        }
        let Some(client) = held.client else { return };
        if let Err(error) = client.thaw().await {
            self.log.line(&format!("thaw: {error}"));
            // The next connection thaws it.
            client.close();
        }
    }

    /// Leaves the workload of a guest still whose machine does not go on. Should it ever, the next connection lets the
    /// workload go on too; there is one only after this one has ended.
    pub(super) fn leave_still(&self, held: Held) {
        if let Some(client) = held.client {
            client.close();
        }
    }

    /// Connects anew to a guest whose connections its VMM has ended beside a capture, and tells who used them why. `what`
    /// it did that for, for people.
    pub(super) async fn mend_connections(&mut self, what: &str) {
        let run = self.run.as_ref();
        if run.is_some_and(|run| run.machine.connections_have_ended()) {
            self.log.line(&format!(
                "its hypervisor ended the connections to the guest {what}"
            ));
            self.reach_anew().await;
        }
    }

    /// Connects to a guest whose connections have ended, which is no news of the guest: it is thawed by the new one.
    async fn reach_anew(&mut self) {
        // Its sessions would wait for a guest that has forgotten them.
        if let Some(client) = self.slot.live.client() {
            client.note_captured();
            client.close();
        }
        let image = match self.shared.images.bootable(&self.record.image_digest) {
            Ok(image) => image,
            // The link sees the end of its connection, and thaws the guest by its next one.
            Err(error) => return self.log.line(&format!("not connected anew: {error}")),
        };
        let Some(machine) = self.run.as_ref().map(|run| Arc::clone(&run.machine)) else {
            return;
        };
        let link = self.link_to(&machine, &image, false, true);
        if let Some(run) = &mut self.run {
            run.link = link;
        }
        self.slot.live.set_client(None);
        self.await_agent(AGENT_PATIENCE).await;
    }
}
