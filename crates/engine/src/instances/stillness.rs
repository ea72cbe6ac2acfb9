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
//! A guest that can't be held, because a process in it waits for a disk, or because its agent is gone, is captured all
//! the same: a copy of it cannot act on the network before it was told who it is, for the bridge lets nothing of it
//! pass, but its workload may run for some milliseconds before that.

use hypeman_guest_api::host::GuestClient;

use super::driver::Driver;

/// A workload that stands still, to be let go by [`Driver::let_go`].
#[must_use]
pub(super) struct Held(Option<GuestClient>);

impl Driver {
    /// Holds the workload of a running guest still.
    pub(super) async fn hold_still(&mut self) -> Held {
        let Some(client) = self.slot.live.client() else {
            self.log.line("captured as it moves: its agent is not there");
            return Held(None);
        };
        match client.freeze().await {
            Ok(()) => Held(Some(client)),
            Err(error) => {
                self.log.line(&format!("captured as it moves: {error}"));
                // An answer that came too late may have frozen it.
                self.let_go(Held(Some(client))).await;
                Held(None)
            }
        }
    }

    /// Lets the workload of a guest go on whose machine runs again.
    pub(super) async fn let_go(&mut self, held: Held) {
        let Held(Some(client)) = held else { return };
        if let Err(error) = client.thaw().await {
            self.log.line(&format!("thaw: {error}"));
            // The next connection thaws it.
            client.close();
        }
    }
}
