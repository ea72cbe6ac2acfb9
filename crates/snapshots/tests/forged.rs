//! Files that only pretend to be exported snapshots.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on should panic"
)]

mod support;

use hypeman_snapshots::{Error, Manifest};
use support::travel::{Arrival, DEVICES, DISK, Snapshot};

/// A block as an attacker would write it: properly linked, and saying anything.
struct Forged {
    kind: u32,
    encoding: u32,
    content: u32,
    offset: u64,
    stored: Vec<u8>,
}

fn plain(kind: u32, offset: u64, stored: Vec<u8>) -> Forged {
    Forged {
        kind,
        encoding: 0,
        content: stored.len() as u32,
        offset,
        stored,
    }
}

fn forge(blocks: &[Forged]) -> Vec<u8> {
    let mut file = b"hypemPRT\x01\0\0\0\0\0\0\0".to_vec();
    let mut last = blake3::hash(&file);
    for block in blocks {
        let mut head = Vec::new();
        for number in [
            block.kind,
            block.encoding,
            block.stored.len() as u32,
            block.content,
        ] {
            head.extend_from_slice(&number.to_le_bytes());
        }
        head.extend_from_slice(&block.offset.to_le_bytes());
        let mut hasher = blake3::Hasher::new();
        last = hasher
            .update(last.as_bytes())
            .update(&head)
            .update(&block.stored)
            .finalize();
        file.extend_from_slice(&head);
        file.extend_from_slice(last.as_bytes());
        file.extend_from_slice(&block.stored);
    }
    file
}

const MANIFEST: u32 = 0;
const DESCRIPTION: u32 = 1;
const DEVICE_STATE: u32 = 2;
const MEMORY: u32 = 3;
const DISK_LENGTH: u32 = 4;
const DISK_BLOCK: u32 = 5;
const ROOT_LENGTH: u32 = 6;
const ROOT_BLOCK: u32 = 7;
const END: u32 = 8;

/// Pages behind a mask.
fn memory(mask: u64, pages: usize) -> Vec<u8> {
    [mask.to_le_bytes().to_vec(), vec![7; pages * 4096]].concat()
}

#[test]
fn well_formed_lies_are_refused() {
    let snapshot = Snapshot::standby();
    let manifest = || plain(MANIFEST, 0, snapshot.manifest.seal().unwrap());
    let description = || plain(DESCRIPTION, 0, Vec::new());
    let end = |blocks: u64| plain(END, 0, blocks.to_le_bytes().to_vec());
    let arrival = Arrival::new();
    let lies: Vec<(&str, Vec<Forged>)> = vec![
        ("no manifest", vec![description(), end(1)]),
        ("two descriptions", vec![description(), description()]),
        ("an unknown kind", vec![plain(9, 0, Vec::new())]),
        (
            "an unknown encoding",
            vec![Forged {
                encoding: 3,
                ..description()
            }],
        ),
        (
            "more content than a block has",
            vec![Forged {
                kind: DEVICE_STATE,
                encoding: 1,
                content: 1 << 30,
                offset: 0,
                stored: vec![1; 9],
            }],
        ),
        (
            "content that is not there",
            vec![Forged {
                kind: DEVICE_STATE,
                encoding: 1,
                content: 5000,
                offset: 0,
                stored: vec![1; 9],
            }],
        ),
        (
            "devices with a gap",
            vec![plain(DEVICE_STATE, 5, DEVICES.to_vec())],
        ),
        (
            "more devices than the manifest says",
            vec![
                plain(DEVICE_STATE, 0, vec![1; 21]),
                plain(DEVICE_STATE, 21, vec![1; 21]),
            ],
        ),
        (
            "memory outside of the guest",
            vec![plain(MEMORY, 1 << 20, memory(1, 1))],
        ),
        (
            "memory far outside",
            vec![plain(MEMORY, u64::MAX - 0x3ffff, memory(1, 1))],
        ),
        (
            "pages outside of the guest",
            vec![plain(MEMORY, 3 * 0x40000, memory(1 << 40, 1))],
        ),
        ("crooked memory", vec![plain(MEMORY, 4096, memory(1, 1))]),
        ("more pages than the mask", vec![plain(MEMORY, 0, memory(1, 2))]),
        ("fewer pages than the mask", vec![plain(MEMORY, 0, memory(3, 1))]),
        ("no mask", vec![plain(MEMORY, 0, vec![1; 5])]),
        (
            "memory twice",
            vec![plain(MEMORY, 0, memory(1, 1)), plain(MEMORY, 0, memory(1, 1))],
        ),
        (
            "a disk without a length",
            vec![plain(DISK_BLOCK, 0, vec![1; 1 << 20])],
        ),
        ("a length of three bytes", vec![plain(DISK_LENGTH, 0, vec![1; 3])]),
        (
            "an endless disk",
            vec![plain(DISK_LENGTH, 0, u64::MAX.to_le_bytes().to_vec())],
        ),
        (
            "two disks",
            vec![
                plain(DISK_LENGTH, 0, DISK.to_le_bytes().to_vec()),
                plain(DISK_LENGTH, 0, DISK.to_le_bytes().to_vec()),
            ],
        ),
        (
            "a block behind the disk",
            vec![
                plain(DISK_LENGTH, 0, DISK.to_le_bytes().to_vec()),
                plain(DISK_BLOCK, 4 << 20, vec![1; 1 << 20]),
            ],
        ),
        (
            "a block too long",
            vec![
                plain(DISK_LENGTH, 0, DISK.to_le_bytes().to_vec()),
                plain(DISK_BLOCK, 3 << 20, vec![1; 1 << 20]),
            ],
        ),
        (
            "another disk",
            vec![plain(DISK_LENGTH, 0, DISK.to_le_bytes().to_vec())],
        ),
        (
            "a root disk without a length",
            vec![plain(ROOT_BLOCK, 0, vec![1; 4096])],
        ),
        (
            "an endless root disk",
            vec![plain(ROOT_LENGTH, 0, u64::MAX.to_le_bytes().to_vec())],
        ),
        (
            "a disk after the root disk",
            vec![
                plain(ROOT_LENGTH, 0, 8192_u64.to_le_bytes().to_vec()),
                plain(DISK_LENGTH, 0, DISK.to_le_bytes().to_vec()),
            ],
        ),
        (
            "memory after the disk",
            vec![
                plain(DISK_LENGTH, 0, DISK.to_le_bytes().to_vec()),
                plain(MEMORY, 0, memory(1, 1)),
            ],
        ),
        (
            "a second manifest",
            vec![plain(MANIFEST, 0, snapshot.manifest.seal().unwrap())],
        ),
        ("nothing at all", vec![]),
    ];
    for (what, blocks) in lies {
        let mut all = if what == "no manifest" {
            Vec::new()
        } else {
            vec![manifest(), description()]
        };
        all.extend(blocks);
        let blocks = all.len() as u64;
        all.push(end(blocks));
        let error = arrival.refuses(&forge(&all));
        assert!(
            error.is_damage() || matches!(error, Error::Invalid(_)),
            "{what}: {error}"
        );
    }
    let wrong_count = [manifest(), description(), end(7)];
    assert!(
        arrival
            .refuses(&forge(&wrong_count))
            .to_string()
            .contains("blocks are missing")
    );
}

#[test]
fn hostile_manifests_are_refused() {
    let snapshot = Snapshot::standby();
    let arrival = Arrival::new();
    let huge = Manifest {
        memory_bytes: 1 << 40,
        ..snapshot.manifest.clone()
    };
    assert!(matches!(
        arrival.refuses(&forge(&[plain(MANIFEST, 0, huge.seal().unwrap())])),
        Error::Invalid(_)
    ));
    for bytes in [
        Vec::new(),
        vec![b'{'; 100_000],
        snapshot.manifest.seal().unwrap()[..70].to_vec(),
    ] {
        assert!(arrival.refuses(&forge(&[plain(MANIFEST, 0, bytes)])).is_damage());
    }
}
