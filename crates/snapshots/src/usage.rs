//! What an image really costs.

use std::collections::HashSet;

use crate::layout::directory;
use crate::sweep::{kept, occupied, used_frames};
use crate::{Error, MemoryId, MemoryStore, Result};

/// What an image takes on the disk, in bytes of whole blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// What is stored for the image itself.
    pub own: u64,
    /// What it uses of others: its ancestors, and frames that lie elsewhere.
    pub shared: u64,
    /// What would come back if it alone were no longer live.
    pub freed: u64,
}

impl MemoryStore {
    /// What an image costs, given all that are live.
    ///
    /// # Errors
    /// [`Error::NotFound`], and [`Error::Damaged`] when an image does not say what it needs.
    pub fn usage(&self, id: &MemoryId, live: &HashSet<MemoryId>) -> Result<Usage> {
        let shared = &*self.shared;
        if !self.contains(*id) {
            return Err(Error::NotFound(*id));
        }
        let needs = |id| shared.needs(id).map(Some);
        let home = |id: &MemoryId| occupied(&directory(shared.root(), *id));
        let own = home(id);

        let alone = kept([*id], needs)?;
        let ancestors: u64 = alone.images.iter().filter(|image| *image != id).map(home).sum();
        let borrowed = self.frame_bytes(&alone.donors, &used_frames(shared, &alone)?)?;

        let with = kept(live.iter().copied().chain([*id]), needs)?;
        let without = kept(live.iter().copied().filter(|image| image != id), needs)?;
        let gone: Vec<MemoryId> = with.images.difference(&without.images).copied().collect();
        let donors_before = self.frame_bytes(&with.donors, &used_frames(shared, &with)?)?;
        let donors_after = self.frame_bytes(&without.donors, &used_frames(shared, &without)?)?;
        let images: u64 = gone.iter().map(home).sum();
        let freed = (images + donors_before).saturating_sub(donors_after);
        Ok(Usage {
            own,
            shared: ancestors + borrowed,
            freed,
        })
    }

    /// Bytes of the frames at the given offsets.
    fn frame_bytes(
        &self,
        donors: &HashSet<MemoryId>,
        used: &std::collections::HashMap<MemoryId, HashSet<u64>>,
    ) -> Result<u64> {
        let mut bytes = 0;
        for donor in donors {
            let (Some(table), Some(offsets)) = (self.shared.frame_table(*donor)?, used.get(donor)) else {
                continue;
            };
            let own = table.frames.iter().filter(|frame| {
                table.donors[frame.donor as usize] == *donor && offsets.contains(&frame.offset)
            });
            let distinct: HashSet<(u64, u32)> = own.map(|frame| (frame.offset, frame.stored)).collect();
            bytes += distinct.iter().map(|(_, stored)| u64::from(*stored)).sum::<u64>();
        }
        Ok(bytes)
    }
}
