//! Giving back the space of images that nobody needs.
//!
//! ```text
//!  begin: list what is there ─► note what is held ──(the caller reads what is live)──► finish(live)
//!         roots = live + held then + held since
//!         needed = roots with all their ancestors, and the frames that those use
//!         not needed                    ─► renamed to a temporary name ─► removed
//!         not needed but for its frames ─► raw form and index removed ─► table cut ─► superfluous frames punched out
//! ```
//! The order of the first three steps is what makes it safe: an image that was listed was then either still held, or
//! released before, which its owner does only after making it live. Each step is idempotent, and the next sweep
//! continues what a crash cut short.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, SeekFrom};

use crate::error::at;
use crate::frames::FrameTable;
use crate::layout::{FRAME_TABLE, FRAMES, INDEX, MEMO, RAW, TEMPORARY, WORKING_SET, directory};
use crate::store::{Needs, Shared};
use crate::{MemoryId, MemoryStore, Result, files};

/// A sweep that waits to be told what is live.
#[must_use = "a sweep does nothing until it is finished"]
pub struct Sweep {
    store: MemoryStore,
    number: u64,
    listed: Vec<MemoryId>,
}

/// What a sweep did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// Images that are gone altogether.
    pub images: u64,
    /// Bytes that the file system got back. Less as long as machines map removed files.
    pub bytes: u64,
}

impl Drop for Sweep {
    fn drop(&mut self) {
        self.store.shared.users().sweeps.remove(&self.number);
    }
}

impl MemoryStore {
    /// Begins a sweep. What is live must be read after this, and told to [`Sweep::finish`].
    ///
    /// # Errors
    /// Those of the file system.
    pub fn begin_sweep(&self) -> Result<Sweep> {
        let listed = self.shared.list()?;
        let mut users = self.shared.users();
        users.sweeps_begun += 1;
        let number = users.sweeps_begun;
        let held = Shared::held(&users);
        users.sweeps.insert(number, held);
        drop(users);
        Ok(Sweep {
            store: self.clone(),
            number,
            listed,
        })
    }
}

/// Images that must stay, and others of which only frames must.
pub(crate) struct Kept {
    pub(crate) images: HashSet<MemoryId>,
    pub(crate) donors: HashSet<MemoryId>,
}

/// Everything that roots need.
pub(crate) fn kept(
    roots: impl IntoIterator<Item = MemoryId>,
    mut needs: impl FnMut(MemoryId) -> Result<Option<std::sync::Arc<Needs>>>,
) -> Result<Kept> {
    let mut images = HashSet::new();
    let mut donors = HashSet::new();
    let mut open: Vec<MemoryId> = roots.into_iter().collect();
    while let Some(id) = open.pop() {
        if images.insert(id)
            && let Some(needs) = needs(id)?
        {
            open.extend(needs.parent);
            donors.extend(&needs.donors);
        }
    }
    donors.retain(|donor| !images.contains(donor));
    Ok(Kept { images, donors })
}

/// For each donor the offsets of the frames that kept images use.
pub(crate) fn used_frames(shared: &Shared, kept: &Kept) -> Result<HashMap<MemoryId, HashSet<u64>>> {
    let mut used: HashMap<MemoryId, HashSet<u64>> =
        kept.donors.iter().map(|donor| (*donor, HashSet::new())).collect();
    if used.is_empty() {
        return Ok(used);
    }
    for image in &kept.images {
        if !shared
            .needs(*image)?
            .donors
            .iter()
            .any(|donor| used.contains_key(donor))
        {
            continue;
        }
        let Some(table) = shared.frame_table(*image)? else {
            continue;
        };
        for frame in &table.frames {
            if let Some(offsets) = used.get_mut(&table.donors[frame.donor as usize]) {
                offsets.insert(frame.offset);
            }
        }
    }
    Ok(used)
}

/// Bytes that the files of a directory take on the disk.
pub(crate) fn occupied(directory: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(directory) else {
        return 0;
    };
    entries
        .flatten()
        .filter_map(|entry| entry.metadata().ok())
        .map(|facts| facts.blocks() * 512)
        .sum()
}

impl Sweep {
    /// Removes what neither the live images, nor those that were held since the sweep began, need.
    ///
    /// # Errors
    /// [`Error::Damaged`](crate::Error::Damaged) when an image that must stay does not say what it needs: then
    /// nothing is removed. Otherwise those of the file system; what was not removed is removed by the next sweep.
    pub fn finish(self, live: &HashSet<MemoryId>) -> Result<Swept> {
        let shared = &*self.store.shared;
        // Read what can be read before anybody has to wait.
        kept(live.iter().copied(), |id| shared.needs(id).map(Some))?;

        let mut users = shared.users();
        let touched = users.sweeps.get(&self.number).cloned().unwrap_or_default();
        let roots = live.iter().copied().chain(touched);
        let kept = kept(roots, |id| match users.needs.get(&id) {
            Some(needs) => Ok(Some(std::sync::Arc::clone(needs))),
            None => Ok(shared.read_needs(id)?.map(std::sync::Arc::new)),
        })?;
        let mut trash = Vec::new();
        let mut cut = Vec::new();
        let mut failed = None;
        for id in self.listed.iter().filter(|id| !kept.images.contains(id)) {
            if kept.donors.contains(id) {
                if users.condemned.insert(*id) {
                    cut.push(*id);
                }
            } else if !users.condemned.contains(id) {
                let aside = shared.root().join(format!("{TEMPORARY}trash-{id}"));
                match std::fs::rename(directory(shared.root(), *id), &aside) {
                    Ok(()) => trash.push(aside),
                    // Another sweep was faster.
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => failed = Some(at("rename", &aside)(error)),
                }
                users.needs.remove(id);
            }
        }
        drop(users);
        let _condemned = Condemned(shared, &cut);
        if let Some(error) = failed {
            return Err(error);
        }

        let mut swept = Swept {
            images: trash.len() as u64,
            bytes: 0,
        };
        if !trash.is_empty() {
            files::sync_directory(shared.root())?;
            shared.step("memory.sweep.renamed");
            for aside in &trash {
                swept.bytes += occupied(aside);
                files::remove_tree(aside)?;
            }
            shared.step("memory.sweep.removed");
        }
        if !cut.is_empty() {
            let used = used_frames(shared, &kept)?;
            for id in &cut {
                let before = occupied(&directory(shared.root(), *id));
                reduce(shared, *id, used.get(id).unwrap_or(&HashSet::new()))?;
                swept.bytes += before.saturating_sub(occupied(&directory(shared.root(), *id)));
            }
        }
        Ok(swept)
    }
}

/// Lets others use the images again, or what is left of them.
struct Condemned<'a>(&'a Shared, &'a [MemoryId]);

impl Drop for Condemned<'_> {
    fn drop(&mut self) {
        let mut users = self.0.users();
        for id in self.1 {
            users.condemned.remove(id);
            users.needs.remove(id);
        }
    }
}

/// Leaves nothing of an image but the frames that others use.
fn reduce(shared: &Shared, id: MemoryId, used: &HashSet<u64>) -> Result<()> {
    let home = directory(shared.root(), id);
    // Without its index it is no image any more, whatever happens next.
    let mut removed = false;
    for name in [INDEX, RAW, MEMO, WORKING_SET] {
        removed |= files::remove(&home.join(name))?;
    }
    if removed {
        files::sync_directory(&home)?;
    }
    shared.step("memory.sweep.reduced");
    let Some(table) = shared.frame_table(id)? else {
        return Ok(());
    };
    let own = |frame: &&crate::frames::Frame| {
        table.donors[frame.donor as usize] == id && used.contains(&frame.offset)
    };
    let mut frames: Vec<_> = table.frames.iter().filter(own).copied().collect();
    frames.sort_unstable_by_key(|frame| frame.offset);
    frames.dedup_by_key(|frame| frame.offset);
    frames.iter_mut().for_each(|frame| frame.donor = 0);
    let rest = FrameTable {
        image: id,
        index_seal: None,
        donors: vec![id],
        frames,
    };
    if rest != table {
        // The table first: what it names must be there.
        let workspace = shared.workspace("sweep", id)?;
        let path = workspace.path().join(FRAME_TABLE);
        files::write(&path, &rest.to_bytes())?;
        files::rename(&path, &home.join(FRAME_TABLE))?;
    }
    shared.step("memory.sweep.cut");
    punch(&home.join(FRAMES), &rest)
}

/// Gives back what no frame of a table uses.
fn punch(path: &Path, table: &FrameTable) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .open(path)
        .map_err(at("open", path))?;
    let length = file.metadata().map_err(at("inspect", path))?.len();
    let mut start = 0;
    for frame in &table.frames {
        punch_range(&file, start, frame.offset).map_err(at("cut", path))?;
        start = frame.offset + u64::from(frame.stored);
    }
    punch_range(&file, start, length).map_err(at("cut", path))
}

fn punch_range(file: &File, start: u64, end: u64) -> std::io::Result<()> {
    let data = |start| matches!(rustix::fs::seek(file, SeekFrom::Data(start)), Ok(data) if data < end);
    if start >= end || !data(start) {
        return Ok(());
    }
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, flags, start, end - start) {
        // A file system without holes keeps the bytes until the last user is gone.
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        other => Ok(other?),
    }
}
