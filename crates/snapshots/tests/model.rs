//! Any order of captures, compressions, deletions and crashes, against guests that are kept in a list.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on should panic"
)]

mod support;

use std::collections::{BTreeMap, HashSet};

use hypeman_snapshots::{Codec, Elsewhere, MemoryId};
use proptest::prelude::*;
use proptest::sample::Index;
use support::{GUEST_PAGES, Guest, Place, at_steps, copy_tree, names, restore};

#[derive(Clone, Debug)]
enum Operation {
    /// A guest that begins like a stored one and changes; captured over that one or on its own.
    Capture {
        like: Index,
        alone: bool,
        changes: Vec<(usize, u16)>,
        elsewhere: bool,
    },
    Compress {
        image: Index,
        codec: Codec,
    },
    Reduce {
        image: Index,
        codec: Codec,
    },
    Delete {
        image: Index,
        sweep: bool,
    },
    Verify {
        image: Index,
    },
    /// The process ends, and what it was doing lies around.
    Crash {
        rubbish: bool,
    },
    /// The process ends at one of the steps of the next operation.
    CrashWithin {
        step: usize,
        next: Box<Operation>,
    },
}

fn operation() -> impl Strategy<Value = Operation> {
    let changes = prop::collection::vec(
        (0..GUEST_PAGES, prop_oneof![Just(0), 1_u16..100, 100..200_u16]),
        0..30,
    );
    let codec = prop_oneof![(1..4).prop_map(Codec::Zstd), (0..4).prop_map(Codec::Lz4)].boxed();
    let simple = prop_oneof![
        5 => (any::<Index>(), prop::bool::weighted(0.5), changes, any::<bool>()).prop_map(
            |(like, alone, changes, elsewhere)| Operation::Capture { like, alone, changes, elsewhere }
        ),
        2 => (any::<Index>(), codec.clone()).prop_map(|(image, codec)| Operation::Compress { image, codec }),
        5 => (any::<Index>(), codec).prop_map(|(image, codec)| Operation::Reduce { image, codec }),
        3 => (any::<Index>(), any::<bool>()).prop_map(|(image, sweep)| Operation::Delete { image, sweep }),
        1 => any::<Index>().prop_map(|image| Operation::Verify { image }),
        1 => any::<bool>().prop_map(|rubbish| Operation::Crash { rubbish }),
    ];
    (simple, prop::option::weighted(0.2, 0_usize..4)).prop_map(|(operation, step)| match step {
        Some(step) => Operation::CrashWithin {
            step,
            next: Box::new(operation),
        },
        None => operation,
    })
}

struct Model {
    place: Place,
    live: BTreeMap<MemoryId, Guest>,
    parents: BTreeMap<MemoryId, Option<MemoryId>>,
}

impl Model {
    fn pick(&self, index: &Index) -> Option<MemoryId> {
        let ids: Vec<MemoryId> = self.live.keys().copied().collect();
        (!ids.is_empty()).then(|| ids[index.index(ids.len())])
    }

    fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Capture {
                like,
                alone,
                changes,
                elsewhere,
            } => self.capture(like, *alone, changes, *elsewhere),
            Operation::Compress { image, codec } => {
                if let Some(id) = self.pick(image)
                    && self.place.store.forms(id).unwrap().framed.is_none()
                {
                    self.place.compress(id, *codec);
                }
            }
            Operation::Reduce { image, codec } => {
                if let Some(id) = self.pick(image) {
                    if self.place.store.forms(id).unwrap().framed.is_none() {
                        assert!(self.place.store.drop_raw(id).is_err());
                        self.place.compress(id, *codec);
                    }
                    self.place.store.drop_raw(id).unwrap();
                }
            }
            Operation::Delete { image, sweep } => {
                if let Some(id) = self.pick(image) {
                    self.live.remove(&id);
                }
                if *sweep {
                    self.sweep();
                }
            }
            Operation::Verify { image } => {
                if let Some(id) = self.pick(image) {
                    self.place.verify(id).unwrap();
                }
            }
            Operation::Crash { rubbish } => {
                if *rubbish {
                    std::fs::create_dir(self.place.root().join(".tmp-capture-of-old")).unwrap();
                    std::fs::write(self.place.root().join(".tmp-capture-of-old/memory.raw"), "half").unwrap();
                }
                self.place.reopen();
            }
            Operation::CrashWithin { step, next } => self.crash_within(*step, next),
        }
    }

    fn capture(&mut self, like: &Index, alone: bool, changes: &[(usize, u16)], elsewhere: bool) {
        let like = self.pick(like);
        let before = like.map_or_else(Guest::busy, |id| self.live[&id].clone());
        let guest = before.with(changes);
        let parent = like.filter(|_| !alone);
        let id = MemoryId::random().unwrap();
        let changed: Vec<usize> = changes.iter().map(|(page, _)| *page).collect();
        let (source, elsewhere) = if elsewhere && parent.is_some() {
            (guest.partly(&changed), Elsewhere::Parent)
        } else {
            (guest.source(), Elsewhere::Zero)
        };
        let captured = self
            .place
            .store
            .capture(&id, guest.memory_bytes(), parent.as_ref(), &source, elsewhere)
            .unwrap();
        self.parents.insert(id, captured.parent);
        self.live.insert(id, guest);
    }

    fn sweep(&self) {
        let live: Vec<MemoryId> = self.live.keys().copied().collect();
        self.place.sweep(&live);
        // Nothing is left but what is live, its ancestors, and frames of others.
        let mut needed = HashSet::new();
        for id in live {
            let mut next = Some(id);
            while let Some(id) = next {
                needed.insert(id.to_string());
                next = self.parents[&id];
            }
        }
        for name in self.place.names() {
            let files = names(&self.place.root().join(&name));
            assert!(
                needed.contains(&name) || files == ["frames.dat", "frames.index"],
                "{name}: {files:?}"
            );
        }
    }

    /// Keeps the disk as it is at one step, finishes the operation elsewhere, and goes on with what was kept: whatever
    /// was live before the operation, and was not deleted by it, must be there.
    fn crash_within(&mut self, step: usize, next: &Operation) {
        let kept = tempfile::tempdir().unwrap();
        let (root, target) = (self.place.root(), kept.path().join("store"));
        let mut left = step;
        let copy = target.clone();
        let hook = move |_| {
            if left == 0 {
                copy_tree(&root, &copy);
            }
            left = left.wrapping_sub(1);
        };
        let live = self.live.clone();
        at_steps(hook, || self.apply(next));
        if target.exists() {
            std::fs::remove_dir_all(self.place.root()).unwrap();
            copy_tree(&target, &self.place.root());
            // The client was not told of an image that was being captured. One that was being deleted is deleted.
            self.live.retain(|id, _| live.contains_key(id));
        }
        self.place.reopen();
    }

    fn check(&self) {
        for (id, guest) in &self.live {
            assert!(
                restore(&self.place.store, *id).unwrap() == guest.bytes(),
                "{id} is not what was captured"
            );
        }
        assert!(self.place.names().iter().all(|name| !name.starts_with('.')));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_live_image_is_what_was_captured(operations in prop::collection::vec(operation(), 1..25)) {
        let mut model = Model { place: Place::new(), live: BTreeMap::new(), parents: BTreeMap::new() };
        for operation in &operations {
            model.apply(operation);
            model.check();
        }
        model.sweep();
        model.check();
        model.live.clear();
        model.sweep();
        prop_assert_eq!(model.place.names(), Vec::<String>::new());
    }
}
