//! Memory is kept while sweeps go on beside it.

use std::os::unix::fs::FileExt;

use hypeman_snapshots::Codec;

use super::frozen::Content;
use super::*;
use crate::events::Events;
use crate::instances::Table;

const PAGE: u64 = 4096;
const MEMORY: u64 = 1 << 20;

/// Guest memory with one page that says which round it is.
fn memory(round: u64) -> Frozen {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    file.write_all_at(&[7; PAGE as usize], 0).unwrap();
    file.write_all_at(&round.to_le_bytes(), PAGE).unwrap();
    Frozen {
        ranges: std::iter::once(0..2 * PAGE).collect(),
        content: Content::Copied(file),
        over_base: true,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_is_not_built_upon_what_a_sweep_removes() {
    let directory = tempfile::tempdir().unwrap();
    let vault = Vault::open(directory.path().join("memory"), CancellationToken::new()).unwrap();
    let base = vault.keep(MEMORY, Lineage::default(), memory(0)).await.unwrap();
    for round in 1..=300 {
        let over_base = Lineage {
            base: Some(base.image.clone()),
            last: None,
        };
        // A snapshot of the machine that is deleted at once: the machine still names its image as the last one.
        let last = vault.keep(MEMORY, over_base, memory(round)).await.unwrap();
        let lineage = Lineage {
            base: Some(base.image.clone()),
            last: Some(last.image.clone()),
        };
        drop(last.hold);
        let (swept, kept) = tokio::join!(vault.sweep(), vault.keep(MEMORY, lineage, memory(round + 1)));
        swept.unwrap();
        let kept = kept.unwrap_or_else(|error| panic!("round {round}: {error}"));
        let laid_out = vault.materialize(&kept.image).await.unwrap();
        assert_eq!(laid_out.digest(), kept.digest);
    }
}

#[tokio::test]
async fn a_raw_form_that_a_crash_left_beside_the_frames_is_dropped() {
    let directory = tempfile::tempdir().unwrap();
    let closing = CancellationToken::new();
    let vault = Vault::open(directory.path().join("memory"), closing.clone()).unwrap();
    let kept = vault.keep(MEMORY, Lineage::default(), memory(0)).await.unwrap();
    let id = parse(&kept.image).unwrap();
    let never = AtomicBool::new(false);
    vault
        .store
        .compress(&id, Codec::Zstd(1), &never, &|_, _| {})
        .unwrap();
    vault.learn(&kept.image);
    let (events, table) = (Events::new(closing).unwrap(), Table::default());
    let gone = async {
        while vault.store.outline(id).unwrap().raw {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        () = vault.compress_forever(&events, &table) => panic!("the server does not close"),
        () = gone => {}
    }
    assert_eq!(
        vault.materialize(&kept.image).await.unwrap().digest(),
        kept.digest
    );
}
