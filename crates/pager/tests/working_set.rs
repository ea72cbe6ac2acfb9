//! The second restore of an image fetches what the first one asked for.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on should panic"
)]

mod support;

use std::time::Duration;

use hypeman_pager::{MachineReport, PagerClient, Recording};
use hypeman_snapshots::{Codec, MemoryReader};
use support::{GUEST_PAGES, Guest, Place, page};

async fn report(client: &PagerClient, machine: &str) -> MachineReport {
    let machines = client.stats().await.unwrap().machines;
    machines
        .into_iter()
        .find(|report| report.machine == machine)
        .unwrap()
}

/// Looks until something holds; nothing tells of it.
async fn eventually(client: &PagerClient, machine: &str, holds: impl Fn(&MachineReport) -> bool) {
    while !holds(&report(client, machine).await) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn what_was_asked_for_is_fetched_ahead_the_next_time() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let image = place.capture(&Guest::busy(), None);
    place.frame(image, Codec::Zstd(1));
    let mut registration = place.registration("first", image);
    registration.working_set = true;
    let first = place.machine(&client, registration).await;
    let touched = [200, 3, 201, 70, 7];
    for number in touched {
        assert_eq!(
            first.byte(number).await,
            page(if number.is_multiple_of(7) {
                0
            } else {
                number as u16 + 1
            })[0]
        );
    }
    // Pages are there before they are counted; page 201 comes with its neighbour.
    eventually(&client, "first", |report| report.faults == 4).await;
    // Nobody has to wait until nothing new was asked for.
    client.graduate("first").await.unwrap();
    eventually(&client, "first", |report| !report.recording).await;
    let reader = MemoryReader::open(&place.path("memory"), image).unwrap();
    let wanted: u32 = reader
        .working_set()
        .unwrap()
        .chunks
        .iter()
        .map(|(_, pages)| pages.count_ones())
        .sum();
    let order: Vec<u32> = reader
        .working_set()
        .unwrap()
        .chunks
        .iter()
        .map(|(chunk, _)| *chunk)
        .collect();
    assert_eq!(order, [3, 0, 1]);

    // A fresh pager, so that nothing is in its cache.
    let after = Place::new();
    let other = after.connect().await;
    let mut registration = after.registration("second", image);
    registration.store = place.path("memory");
    registration.working_set = true;
    let second = after.machine(&other, registration).await;
    eventually(&other, "second", |report| {
        report.fetched_pages + report.faulted_pages >= u64::from(wanted)
    })
    .await;
    let faults = report(&other, "second").await.faults;
    for number in touched {
        second.byte(number).await;
    }
    let now = report(&other, "second").await;
    assert_eq!(
        (now.faults, now.working_set_chunks, now.recording),
        (faults, 3, false)
    );
    // What was read is what the three chunks take, each once.
    let mut buffers = hypeman_snapshots::PieceBuffers::new();
    let stored: u64 = order
        .iter()
        .map(|chunk| reader.read(*chunk, &mut buffers).unwrap().read)
        .sum();
    assert_eq!(other.stats().await.unwrap().cache.read_bytes, stored);
}

#[tokio::test]
async fn recording_ends_when_nothing_new_is_asked_for() {
    skip_unless_faults_can_be_served!();
    let place = Place::with(|options| {
        options.recording = Recording {
            idle: Duration::from_millis(20),
            limit: Duration::from_secs(3600),
        };
    });
    let client = place.connect().await;
    let image = place.capture(&Guest::busy(), None);
    let mut registration = place.registration("quiet", image);
    registration.working_set = true;
    let machine = place.machine(&client, registration).await;
    machine.byte(1).await;
    eventually(&client, "quiet", |report| !report.recording).await;
    let reader = MemoryReader::open(&place.path("memory"), image).unwrap();
    assert_eq!(reader.working_set().unwrap().chunks[0].0, 0);
}

#[tokio::test]
async fn a_machine_that_ends_early_leaves_no_working_set() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let image = place.capture(&Guest::busy(), None);
    let mut registration = place.registration("short", image);
    registration.working_set = true;
    let mut events = client.events();
    let machine = place.machine(&client, registration).await;
    machine.byte(1).await;
    drop(machine.stream);
    support::until(&mut events, "short", |state| {
        *state == hypeman_pager::MachineState::Gone
    })
    .await;
    assert!(!place.file(image, "touched").exists());
}

#[tokio::test]
async fn a_wrong_working_set_does_no_harm() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let guest = Guest::busy();
    let image = place.capture(&guest, None);
    for content in [
        "",
        "not a working set at all, and long enough to look like one, perhaps, to somebody",
    ] {
        std::fs::write(place.file(image, "touched"), content).unwrap();
        let name = format!("m{}", content.len());
        let mut registration = place.registration(&name, image);
        registration.working_set = true;
        let machine = place.machine(&client, registration).await;
        assert_eq!(
            machine.read_in((0..GUEST_PAGES).rev().collect()).await,
            guest.bytes()
        );
        assert!(report(&client, &name).await.recording);
    }
}
