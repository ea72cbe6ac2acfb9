//! What a guest reads is what its image holds, whatever the image is made of and whoever reads at the same time.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on should panic"
)]

mod support;

use hypeman_pager::{MachineState, OverlayPage};
use hypeman_snapshots::{Codec, PAGE_BYTES};
use proptest::prelude::*;
use support::{GUEST_PAGES, Guest, Place, page, until};

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap()
}

#[derive(Clone, Debug)]
struct Layer {
    changes: Vec<(usize, u16)>,
    form: u8,
}

fn layer() -> impl Strategy<Value = Layer> {
    let changes = prop::collection::vec((0..GUEST_PAGES, 0_u16..140), 0..40);
    (changes, 0_u8..3).prop_map(|(changes, form)| Layer { changes, form })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]
    #[test]
    fn guests_read_what_their_images_hold(
        layers in prop::collection::vec(layer(), 1..5),
        orders in prop::collection::vec(Just((0..GUEST_PAGES).collect::<Vec<_>>()).prop_shuffle(), 3),
        writes in prop::collection::vec((0..GUEST_PAGES, 1_u8..), 0..20),
        cache_chunks in 0_u64..4,
    ) {
        check(&layers, &orders, &writes, cache_chunks);
    }
}

fn check(layers: &[Layer], orders: &[Vec<usize>], writes: &[(usize, u8)], cache_chunks: u64) {
    skip_unless_faults_can_be_served!();
    runtime().block_on(async {
        // A cache that is too small for the image, most of the time.
        let place = Place::with(|options| options.cache_bytes = cache_chunks * 300_000);
        let client = place.connect().await;
        let mut guest = Guest::busy();
        let mut parent = place.capture(&guest, None);
        for layer in layers {
            guest = guest.with(&layer.changes);
            let id = place.capture(&guest, Some(&parent));
            match layer.form {
                0 => {}
                1 => place.frame(id, Codec::Zstd(1)),
                _ => place.frame(id, Codec::Lz4(0)),
            }
            parent = id;
        }
        // Several machines of one image, read at the same time; another one writes meanwhile.
        let mut machines = Vec::new();
        for number in 0..3 {
            machines.push(
                place
                    .machine(&client, place.registration(&format!("m{number}"), parent))
                    .await,
            );
        }
        let writer = place.machine(&client, place.registration("writer", parent)).await;
        let writing = async {
            for (page, value) in writes {
                writer.set_byte(*page, *value).await;
            }
        };
        let reading = futures_of(&machines, orders);
        let (_, read) = tokio::join!(writing, reading);
        for bytes in read {
            assert!(
                bytes == guest.bytes(),
                "a guest reads what its image does not hold"
            );
        }
        let mut expected = guest.bytes();
        for (page, value) in writes {
            expected[page * PAGE_BYTES] = *value;
        }
        assert!(
            writer.read_all().await == expected,
            "a guest does not read what it wrote"
        );
    });
}

async fn futures_of(machines: &[support::Vmm], orders: &[Vec<usize>]) -> Vec<Vec<u8>> {
    let [a, b, c] = [0, 1, 2].map(|number| machines[number].read_in(orders[number].clone()));
    let (a, b, c) = tokio::join!(a, b, c);
    vec![a, b, c]
}

#[tokio::test]
async fn pages_of_one_machine_go_before_the_image() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let guest = Guest::busy();
    let image = place.capture(&guest, None);
    // One in place of a page, one in place of zeros.
    let own = [(3, 120), (7, 121), (8, 122)];
    let mut registration = place.registration("own", image);
    registration.overlay = own
        .iter()
        .map(|(number, seed)| OverlayPage {
            offset: (number * PAGE_BYTES) as u64,
            bytes: page(*seed),
        })
        .collect();
    let machine = place.machine(&client, registration).await;
    let other = place.machine(&client, place.registration("other", image)).await;
    assert_eq!(machine.read_all().await, guest.with(&own).bytes());
    assert_eq!(other.read_all().await, guest.bytes());
}

#[tokio::test]
async fn what_a_guest_gives_back_is_zero_when_it_asks_again() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let guest = Guest::busy();
    let image = place.capture(&guest, None);
    place.frame(image, Codec::Zstd(1));
    let machine = place.machine(&client, place.registration("balloon", image)).await;
    machine.set_byte(70, 9).await;
    // Some of it was touched before, most was not.
    machine.discard(60..150).await;
    let mut expected = guest.clone();
    expected.0[60..150].fill(0);
    assert_eq!(machine.read_all().await, expected.bytes());
    machine.set_byte(70, 9).await;
    machine.discard(70..71).await;
    assert_eq!(machine.byte(70).await, 0);
}

#[tokio::test]
async fn numbers_tell_what_a_machine_has_and_how_long_it_waited() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let image = place.capture(&Guest::busy(), None);
    let machine = place.machine(&client, place.registration("counted", image)).await;
    let bytes = Some((GUEST_PAGES * PAGE_BYTES) as u64);
    let report = async || client.stats().await.unwrap().machines.remove(0);

    let fresh = report().await;
    assert_eq!((fresh.memory_bytes, fresh.populated_bytes), (bytes, Some(0)));
    assert_eq!((fresh.faults, fresh.latency), (0, None));
    machine.read_all().await;
    // Whoever asked may go on before its page is counted; settling waits for that.
    client.settle("counted").await.unwrap();
    let full = report().await;
    assert_eq!(full.populated_bytes, bytes);
    let latency = full.latency.unwrap();
    assert!(latency.p50_us <= latency.p99_us && latency.p99_us <= latency.max_us);
    machine.discard(100..140).await;
    client.settle("counted").await.unwrap();
    assert_eq!(report().await.populated_bytes, bytes, "zeros are there as well");
    machine.discard(100..140).await;
    assert_eq!(machine.byte(110).await, 0);
    let fewer = report().await.populated_bytes;
    assert!(fewer < bytes && fewer > Some(0), "{fewer:?}");
}

#[tokio::test]
async fn page_tables_tell_the_truth_of_a_settled_machine() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let image = place.capture(&Guest::busy(), None);
    let machine = place.machine(&client, place.registration("still", image)).await;
    assert_eq!(machine.byte(200).await, page(201)[0]);
    machine.discard(100..140).await;
    client.settle("still").await.unwrap();
    let shown = machine.shown();
    assert!(shown[200] && shown[100..140].iter().all(|shown| *shown));
    assert!(!shown[50] && !shown[280]);
    assert!(machine.is_watched());
    assert_eq!(machine.byte(110).await, 0);
}

#[tokio::test]
async fn a_machine_with_all_of_its_memory_needs_nobody() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let guest = Guest::busy();
    let image = place.capture(&guest, None);
    place.frame(image, Codec::Zstd(1));
    let mut registration = place.registration("long", image);
    registration.overlay.push(OverlayPage {
        offset: 0,
        bytes: page(7),
    });
    let machine = place.machine(&client, registration).await;
    machine.set_byte(5, 77).await;
    machine.discard(30..40).await;
    let mut events = client.events();
    client.graduate("long").await.unwrap();
    until(&mut events, "long", |state| *state == MachineState::Graduated).await;
    assert!(!machine.is_watched());
    let mut expected = guest.with(&[(0, 7)]);
    expected.0[30..40].fill(0);
    let mut expected = expected.bytes();
    expected[5 * PAGE_BYTES] = 77;
    assert_eq!(machine.read_all().await, expected);
    machine.discard(90..95).await;
    assert_eq!(machine.byte(91).await, 0);
    // It is still known, holds up nobody, and is forgotten when told so.
    assert_eq!(client.machine("long"), Some(MachineState::Graduated));
    assert_eq!(client.machines(), Vec::<String>::new());
    client.drain().await.unwrap();
    client.gone().await;
    place.join();
}

#[tokio::test]
async fn machines_graduate_by_themselves_and_are_read_meanwhile() {
    skip_unless_faults_can_be_served!();
    let place = Place::with(|options| options.graduate_after = Some(std::time::Duration::from_millis(1)));
    let client = place.connect().await;
    let guest = Guest::busy();
    let image = place.capture(&guest, None);
    place.frame(image, Codec::Lz4(1));
    let mut events = client.events();
    let mut machines = Vec::new();
    for number in 0..4 {
        let machine = place
            .machine(&client, place.registration(&format!("m{number}"), image))
            .await;
        assert_eq!(
            machine.read_in((0..GUEST_PAGES).rev().collect()).await,
            guest.bytes()
        );
        machines.push(machine);
    }
    let mut graduated = 0;
    while graduated < 4 {
        let event = events.recv().await.unwrap();
        graduated += usize::from(event.state == MachineState::Graduated);
        assert!(!support::is_failed(&event.state), "{:?}", event.state);
    }
    for machine in &machines {
        assert_eq!(machine.read_all().await, guest.bytes());
    }
}
