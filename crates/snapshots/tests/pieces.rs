//! Reading an image piece by piece, beside the store that owns it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

mod support;

use hypeman_snapshots::{
    CHUNK_BYTES, Codec, Error, MemoryId, MemoryReader, PAGE_BYTES, PieceBuffers, WorkingSet,
};
use proptest::prelude::*;
use support::{Guest, Place, flip, restore};

/// The memory that all pieces make together.
fn together(reader: &MemoryReader) -> Vec<u8> {
    let mut memory = vec![0; reader.memory_bytes() as usize];
    let mut buffers = PieceBuffers::new();
    for chunk in 0..reader.chunks() {
        let piece = reader.read(chunk, &mut buffers).unwrap();
        assert_eq!(piece.nonzero, reader.nonzero(chunk));
        assert_eq!(
            piece.pages.len(),
            piece.nonzero.count_ones() as usize * PAGE_BYTES
        );
        assert_eq!(piece.read == 0, piece.nonzero == 0);
        let pages = (0..64).filter(|page| piece.nonzero & (1 << page) != 0);
        for (page, bytes) in pages.zip(piece.pages.chunks(PAGE_BYTES)) {
            memory[chunk as usize * CHUNK_BYTES + page * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(bytes);
        }
    }
    memory
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn pieces_are_what_a_restore_maps(
        changes in prop::collection::vec(prop::collection::vec((0_usize..200, 0_u16..120), 0..30), 1..5),
        framed in any::<[bool; 5]>(),
    ) {
        let place = Place::new();
        let mut guest = Guest::busy();
        let mut parent = place.capture(&guest, None);
        for (change, framed) in changes.iter().zip(framed) {
            guest = guest.with(change);
            let id = place.capture(&guest, Some(&parent));
            if framed {
                place.compress(id, Codec::Zstd(1));
                place.store.drop_raw(id).unwrap();
            }
            parent = id;
        }
        let reader = MemoryReader::open(&place.root(), parent).unwrap();
        prop_assert_eq!(together(&reader), guest.bytes());
        prop_assert_eq!(together(&reader), restore(&place.store, parent).unwrap());
    }
}

#[test]
fn an_open_reader_outlives_names() {
    let place = Place::new();
    let guest = Guest::busy();
    let id = place.capture(&guest, None);
    let raw = MemoryReader::open(&place.root(), id).unwrap();
    place.compress(id, Codec::Lz4(1));
    place.store.drop_raw(id).unwrap();
    let framed = MemoryReader::open(&place.root(), id).unwrap();
    place.sweep(&[]);
    assert_eq!(together(&raw), guest.bytes());
    assert_eq!(together(&framed), guest.bytes());
    assert!(matches!(
        MemoryReader::open(&place.root(), id),
        Err(Error::NotFound(_))
    ));
}

#[test]
fn damage_after_opening_is_seen() {
    let place = Place::new();
    let id = place.capture(&Guest::busy(), None);
    // Verified just now, which a map of the whole file may rely on, and this may not.
    restore(&place.store, id).unwrap();
    let reader = MemoryReader::open(&place.root(), id).unwrap();
    flip(&place.file(id, "memory.raw"), 71 * PAGE_BYTES as u64 + 9);
    let mut buffers = PieceBuffers::new();
    assert!(reader.read(0, &mut buffers).is_ok());
    let damaged = reader.read(1, &mut buffers).map(|_| "read");
    assert!(damaged.unwrap_err().is_damage());
}

#[test]
fn children_share_what_they_did_not_change() {
    let place = Place::new();
    let guest = Guest::busy();
    let parent = place.capture(&guest, None);
    let children = [7, 8].map(|seed| place.capture(&guest.with(&[(3, seed)]), Some(&parent)));
    let [one, other] = children.map(|id| MemoryReader::open(&place.root(), id).unwrap());
    assert_eq!((one.origin(0), other.origin(0)), (children[0], children[1]));
    assert_eq!((one.origin(1), other.origin(1)), (parent, parent));
}

#[test]
fn a_working_set_goes_with_its_image() {
    let mut place = Place::new();
    let id = place.capture(&Guest::busy(), None);
    let reader = MemoryReader::open(&place.root(), id).unwrap();
    assert_eq!(reader.working_set(), None);
    let set = WorkingSet {
        chunks: vec![(2, 5), (0, u64::MAX)],
    };
    reader.keep_working_set(&set).unwrap();
    assert_eq!(reader.working_set(), Some(set.clone()));
    place.reopen();
    assert_eq!(reader.working_set(), Some(set.clone()));
    flip(&place.file(id, "touched"), 60);
    assert_eq!(reader.working_set(), None);
    reader.keep_working_set(&set).unwrap();
    assert_eq!(reader.working_set(), Some(set.clone()));
    place.sweep(&[]);
    assert_eq!(place.names(), Vec::<String>::new());
    assert!(reader.keep_working_set(&set).is_err());
    assert_eq!(place.names(), Vec::<String>::new());
}

#[test]
fn a_donor_of_frames_keeps_no_working_set() {
    let place = Place::new();
    let guest = Guest::busy();
    let [donor, user]: [MemoryId; 2] = [0, 1].map(|_| {
        let id = place.capture(&guest, None);
        place.compress(id, Codec::Zstd(1));
        place.store.drop_raw(id).unwrap();
        id
    });
    let reader = MemoryReader::open(&place.root(), donor).unwrap();
    reader
        .keep_working_set(&WorkingSet { chunks: vec![(1, 1)] })
        .unwrap();
    place.sweep(&[user]);
    assert!(place.file(donor, "frames.dat").exists() && !place.file(donor, "touched").exists());
}
