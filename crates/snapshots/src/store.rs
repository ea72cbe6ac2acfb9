//! The directory of memory images, and who uses which of them in this process.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::error::{Part, at};
use crate::files::{self, Workspace};
use crate::frames::FrameTable;
use crate::index::Index;
use crate::layout::{self, FRAME_TABLE, FRAMES, INDEX, RAW, TEMPORARY};
use crate::{Error, MemoryId, Result};

/// The largest small file that is read, bytes. An index of the largest guest is about half of it.
const SMALL: u64 = 8 << 30;

/// How a store behaves.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Called between the steps of every operation that writes, with the name of the step. Tests cut there.
    pub step: fn(&'static str),
}

impl Default for Options {
    fn default() -> Self {
        Self { step: |_| () }
    }
}

/// All memory images below one directory. Clones are the same store. Only one process may use a directory; others
/// read what it holds for them by [`MemoryReader`](crate::MemoryReader).
#[derive(Clone)]
pub struct MemoryStore {
    pub(crate) shared: Arc<Shared>,
}

pub(crate) struct Shared {
    root: PathBuf,
    options: Options,
    pub(crate) users: Mutex<Users>,
}

/// One expansion of a framed image, shared by all that need it at the same time.
pub(crate) type Expansion = Arc<Mutex<Weak<OwnedFd>>>;

/// Who uses what. Never locked while bytes of memory are read or written.
#[derive(Default)]
pub(crate) struct Users {
    held: HashMap<MemoryId, usize>,
    /// Machines are about to map the raw files of these chains.
    pub(crate) mapped: HashMap<MemoryId, usize>,
    pub(crate) compressing: HashSet<MemoryId>,
    /// Dead images whose superfluous frames are being cut out: nobody may begin to use them.
    pub(crate) condemned: HashSet<MemoryId>,
    pub(crate) expansions: HashMap<MemoryId, Expansion>,
    /// What images need. Cannot change but by compression, which sets it anew.
    pub(crate) needs: HashMap<MemoryId, Arc<Needs>>,
    /// For each running sweep what was held since it began.
    pub(crate) sweeps: HashMap<u64, HashSet<MemoryId>>,
    pub(crate) sweeps_begun: u64,
}

/// Images that an image cannot do without.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    pub(crate) parent: Option<MemoryId>,
    /// Others in whose files frames lie.
    pub(crate) donors: Vec<MemoryId>,
}

/// Keeps an image, its ancestors and the frames that it uses, whatever sweeps are told. Drop it once something that
/// sweeps are told of names the image.
pub struct Hold {
    shared: Arc<Shared>,
    id: MemoryId,
}

impl Hold {
    /// The image.
    #[must_use]
    pub fn id(&self) -> MemoryId {
        self.id
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut users = self.shared.users();
        release(&mut users.held, self.id);
    }
}

pub(crate) fn release(counts: &mut HashMap<MemoryId, usize>, id: MemoryId) {
    if let Some(count) = counts.get_mut(&id) {
        *count -= 1;
        if *count == 0 {
            counts.remove(&id);
        }
    }
}

/// Which forms of an image exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forms {
    /// The raw form: restoring maps it.
    pub raw: bool,
    /// The framed form, with the bytes that its frames take, shared ones included.
    pub framed: Option<u64>,
}

impl MemoryStore {
    /// Opens a store, creating its directory if need be, and removes what a crash left in it.
    ///
    /// # Errors
    /// When the directory cannot be read or written.
    pub fn open(root: &Path, options: Options) -> Result<Self> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(at("create", root))?;
        let shared = Shared {
            root: root.to_owned(),
            options,
            users: Mutex::default(),
        };
        for entry in fs::read_dir(root).map_err(at("list", root))? {
            let entry = entry.map_err(at("list", root))?;
            let path = entry.path();
            if entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(TEMPORARY.as_bytes())
            {
                if path.is_dir() {
                    files::remove_tree(&path)?
                } else {
                    files::remove(&path).map(|_| ())?
                }
            } else if !path.join(FRAME_TABLE).exists() {
                // A table is the last to be written: frames without one were never finished.
                files::remove(&path.join(FRAMES))?;
                if path.is_dir() && !path.join(INDEX).exists() {
                    files::remove_tree(&path)?;
                }
            }
        }
        files::sync_directory(root)?;
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Whether the image exists.
    #[must_use]
    pub fn contains(&self, id: MemoryId) -> bool {
        self.shared.path(id, INDEX).exists()
    }

    /// The forms in which an image exists.
    ///
    /// # Errors
    /// [`Error::NotFound`], or when its frame table is damaged.
    pub fn forms(&self, id: MemoryId) -> Result<Forms> {
        if !self.contains(id) {
            return Err(Error::NotFound(id));
        }
        let framed = self
            .shared
            .frame_table(id)?
            .filter(|table| table.index_seal.is_some());
        let bytes = |table: FrameTable| table.frames.iter().map(|frame| u64::from(frame.stored)).sum();
        Ok(Forms {
            raw: self.shared.path(id, RAW).exists(),
            framed: framed.map(bytes),
        })
    }

    /// The seal of an image's index: it commits to every byte of the image and its ancestors.
    ///
    /// # Errors
    /// [`Error::NotFound`], or when the index is damaged.
    pub fn digest(&self, id: MemoryId) -> Result<crate::Digest> {
        self.shared.index(id).map(|index| index.seal)
    }

    /// Keeps an image from being swept while the result lives.
    ///
    /// # Errors
    /// [`Error::NotFound`]
    pub fn hold(&self, id: MemoryId) -> Result<Hold> {
        self.shared.hold(id, true)
    }

    /// Removes the raw form of an image that has frames. Machines that map it keep it.
    ///
    /// # Errors
    /// [`Error::Busy`] while a [`Materialized`](crate::Materialized) names the file; [`Error::Invalid`] when there
    /// are no usable frames.
    pub fn drop_raw(&self, id: MemoryId) -> Result<()> {
        let hold = self.hold(id)?;
        let index = self.shared.index(id)?;
        if crate::reader::Layer::framed(&self.shared, &index)?.is_none() {
            return Err(Error::Invalid(format!(
                "memory image {id} has no frames that could replace its raw form"
            )));
        }
        {
            let users = self.shared.users();
            if users.mapped.contains_key(&id) {
                return Err(Error::Busy(id));
            }
            files::remove(&self.shared.path(id, RAW))?;
        }
        self.shared.step("memory.raw.dropped");
        files::remove(&self.shared.path(id, layout::MEMO))?;
        files::sync_directory(&layout::directory(&self.shared.root, id))?;
        drop(hold);
        Ok(())
    }
}

impl Shared {
    /// The view of a process beside the one that owns the directory: for reading.
    pub(crate) fn beside(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            options: Options::default(),
            users: Mutex::default(),
        }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn step(&self, name: &'static str) {
        (self.options.step)(name);
    }

    /// A file of an image.
    pub(crate) fn path(&self, id: MemoryId, file: &str) -> PathBuf {
        layout::directory(&self.root, id).join(file)
    }

    /// A directory for work in progress on an image.
    pub(crate) fn workspace(&self, purpose: &str, id: MemoryId) -> Result<Workspace> {
        Workspace::create(self.root.join(format!("{TEMPORARY}{purpose}-{id}")))
    }

    pub(crate) fn index(&self, id: MemoryId) -> Result<Index> {
        let bytes = files::read(&self.path(id, INDEX), SMALL)?.ok_or(Error::NotFound(id))?;
        Index::parse(id, &bytes)
    }

    pub(crate) fn frame_table(&self, id: MemoryId) -> Result<Option<FrameTable>> {
        files::read(&self.path(id, FRAME_TABLE), SMALL)?
            .map(|bytes| FrameTable::parse(id, &bytes))
            .transpose()
    }

    /// Holds an image; one that does not exist yet only when `must_exist` is not asked for.
    pub(crate) fn hold(self: &Arc<Self>, id: MemoryId, must_exist: bool) -> Result<Hold> {
        let mut users = self.users();
        if users.condemned.contains(&id) || (must_exist && !self.path(id, INDEX).exists()) {
            return Err(Error::NotFound(id));
        }
        *users.held.entry(id).or_default() += 1;
        users.sweeps.values_mut().for_each(|touched| {
            touched.insert(id);
        });
        Ok(Hold {
            shared: Arc::clone(self),
            id,
        })
    }

    /// All images, and remains of images, by their names.
    pub(crate) fn list(&self) -> Result<Vec<MemoryId>> {
        let mut ids = Vec::new();
        for entry in fs::read_dir(&self.root).map_err(at("list", &self.root))? {
            let entry = entry.map_err(at("list", &self.root))?;
            ids.extend(
                entry
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse::<MemoryId>().ok()),
            );
        }
        Ok(ids)
    }

    /// What an image needs: read once, and then remembered. An image that does not exist needs nothing.
    pub(crate) fn needs(&self, id: MemoryId) -> Result<Arc<Needs>> {
        if let Some(needs) = self.users().needs.get(&id) {
            return Ok(Arc::clone(needs));
        }
        let Some(needs) = self.read_needs(id)? else {
            return Ok(Arc::default());
        };
        // A compression that ended meanwhile knows better than what was read before.
        Ok(Arc::clone(
            self.users().needs.entry(id).or_insert_with(|| Arc::new(needs)),
        ))
    }

    pub(crate) fn read_needs(&self, id: MemoryId) -> Result<Option<Needs>> {
        let index = match self.index(id) {
            Err(Error::NotFound(_)) => return Ok(None),
            other => other?,
        };
        let table = self.frame_table(id)?;
        let donors = table.map(|table| table.donors).unwrap_or_default();
        Ok(Some(Needs {
            parent: index.parent.map(|(parent, _)| parent),
            donors: donors.into_iter().filter(|donor| *donor != id).collect(),
        }))
    }

    /// Ids that are held now.
    pub(crate) fn held(users: &Users) -> HashSet<MemoryId> {
        users.held.keys().copied().collect()
    }

    /// Damage that shows when files contradict each other.
    pub(crate) fn missing(id: MemoryId) -> Error {
        Error::Damaged {
            part: Part::Index(id),
            reason: "it is missing",
        }
    }
}

impl std::fmt::Debug for MemoryStore {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("MemoryStore")
            .field("root", &self.shared.root)
            .finish_non_exhaustive()
    }
}
