use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

/// A connection, with what is on its way in either direction.
#[derive(Default)]
struct Wire {
    to_host: VecDeque<u8>,
    to_guest: VecDeque<u8>,
    /// Where the host is on it, once it has answered.
    host: Option<Position>,
}

/// Both ends, and what would be the file.
#[derive(Default)]
struct World {
    guest: Outbox,
    /// All that the present guest has printed since its boot.
    printed: Vec<u8>,
    wire: Option<Wire>,
    written: Option<Position>,
    file: Vec<u8>,
    tokens: u8,
    words: u16,
}

impl World {
    fn print(&mut self, count: usize) {
        for _ in 0..count {
            let word = self.words.to_be_bytes();
            if self.guest.room() < word.len() {
                return;
            }
            assert_eq!(self.guest.push(&word), word.len());
            self.printed.extend(word);
            self.words += 1;
        }
    }

    /// Whatever was on its way is gone.
    fn connect(&mut self) {
        let hello = self.guest.greet();
        self.wire = Some(Wire {
            to_host: hello.into(),
            ..Wire::default()
        });
    }

    fn guest_sends(&mut self, most: usize) {
        let Some(wire) = &mut self.wire else { return };
        let piece = self.guest.unsent();
        let count = piece.len().min(most);
        wire.to_host.extend(&piece[..count]);
        self.guest.left(count);
    }

    fn guest_hears(&mut self, most: usize) {
        let Some(wire) = &mut self.wire else { return };
        let count = wire.to_guest.len().min(most);
        let said: Vec<u8> = wire.to_guest.drain(..count).collect();
        self.guest.hear(&said).unwrap();
    }

    fn host_works(&mut self, most: usize, acknowledges: bool) {
        let Some(wire) = &mut self.wire else { return };
        let position = match &mut wire.host {
            Some(position) => position,
            None => {
                if wire.to_host.len() < HELLO {
                    return;
                }
                let hello: Vec<u8> = wire.to_host.drain(..HELLO).collect();
                let hello = Hello::decode(&hello.try_into().unwrap()).unwrap();
                self.tokens += 1;
                let token = [self.tokens; TOKEN];
                let offset = resume(self.written, &hello);
                wire.to_guest.extend(start(token, offset));
                wire.host.insert(Position { token, offset })
            }
        };
        let count = wire.to_host.len().min(most);
        if count > 0 {
            self.file.extend(wire.to_host.drain(..count));
            position.offset += count as u64;
            self.written = Some(*position);
        }
        if acknowledges {
            wire.to_guest.extend(acknowledgement(position.offset));
        }
    }

    fn finish(&mut self) {
        self.connect();
        while !self.guest.is_empty() {
            self.guest_sends(HELD);
            self.host_works(HELD, true);
            self.guest_hears(HELD);
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    Print(usize),
    Connect,
    GuestSends(usize),
    GuestHears(usize),
    HostWorks(usize, bool),
    /// A capture of which nothing is left but the memory: the connection ends at both sides.
    Restored,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1_usize..40).prop_map(Step::Print),
        Just(Step::Connect),
        (1_usize..60).prop_map(Step::GuestSends),
        (1_usize..60).prop_map(Step::GuestHears),
        (1_usize..60, any::<bool>()).prop_map(|(most, acknowledges)| Step::HostWorks(most, acknowledges)),
        Just(Step::Restored),
    ]
}

fn take(world: &mut World, step: &Step) {
    match *step {
        Step::Print(count) => world.print(count),
        Step::Connect => world.connect(),
        Step::GuestSends(most) => world.guest_sends(most),
        Step::GuestHears(most) => world.guest_hears(most),
        Step::HostWorks(most, acknowledges) => world.host_works(most, acknowledges),
        Step::Restored => world.wire = None,
    }
}

fn contains_in_order(whole: &[u8], part: &[u8]) -> bool {
    let mut rest = whole.iter();
    part.iter().all(|byte| rest.any(|other| other == byte))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn the_file_is_what_was_printed_wherever_connections_end(steps in prop::collection::vec(step(), 0..200)) {
        let mut world = World::default();
        for step in &steps {
            take(&mut world, step);
            prop_assert!(world.printed.starts_with(&world.file));
        }
        world.finish();
        prop_assert_eq!(world.file, world.printed);
    }

    #[test]
    fn a_guest_taken_back_to_an_older_instant_loses_nothing(
        before in prop::collection::vec(step(), 0..60),
        between in prop::collection::vec(step(), 0..60),
        after in prop::collection::vec(step(), 0..60),
    ) {
        let mut world = World::default();
        for step in &before {
            take(&mut world, step);
        }
        let (guest, printed) = (world.guest.clone(), world.printed.clone());
        let held = HELD - guest.room();
        for step in &between {
            take(&mut world, step);
        }
        let (history, captured) = (world.file.len(), printed.len());
        (world.guest, world.printed, world.wire) = (guest, printed, None);
        for step in &after {
            take(&mut world, step);
        }
        world.finish();
        prop_assert!(contains_in_order(&world.file, &world.printed));
        // Nothing is written again but what had not been acknowledged.
        prop_assert!(world.file.len() - history <= held + world.printed.len() - captured);
    }

    #[test]
    fn a_lying_host_is_found_out_or_harmless(said in prop::collection::vec(any::<u8>(), 0..100), sent in 0_usize..20) {
        let mut guest = Outbox::new();
        guest.push(b"what was printed");
        guest.greet();
        let _ = guest.hear(&start([1; TOKEN], 0));
        let count = guest.unsent().len().min(sent);
        guest.left(count);
        let heard = guest.hear(&said);
        prop_assert!(heard.is_err() || HELD - guest.room() >= b"what was printed".len() - count);
    }

    #[test]
    fn a_hello_comes_through_and_anything_else_does_not(
        token in any::<Token>(),
        first in any::<u64>(),
        more in any::<u32>(),
        broken in 0..MARK.len(),
    ) {
        let hello = Hello { token, first, sent: first.saturating_add(more.into()) };
        let mut bytes = hello.encode();
        prop_assert_eq!(Hello::decode(&bytes), Some(hello));
        bytes[broken] ^= 1;
        prop_assert_eq!(Hello::decode(&bytes), None);
        if more > 0 && first < u64::MAX {
            let backwards = Hello { token, first: hello.sent, sent: first };
            prop_assert_eq!(Hello::decode(&backwards.encode()), None);
        }
    }

    #[test]
    fn the_host_never_asks_for_what_the_guest_has_not(
        written in prop::option::of((0_u8..3, any::<u64>())),
        first in any::<u64>(),
        more in any::<u32>(),
    ) {
        let written = written.map(|(token, offset)| Position { token: [token; TOKEN], offset });
        let hello = Hello { token: [1; TOKEN], first, sent: first.saturating_add(more.into()) };
        let offset = resume(written, &hello);
        prop_assert!(hello.first <= offset && offset <= hello.sent);
        if written.is_none_or(|written| written.token != hello.token) {
            prop_assert_eq!(offset, first);
        }
    }
}

#[test]
fn the_outbox_is_bounded() {
    let mut guest = Outbox::new();
    let much = vec![b'x'; HELD + 7];
    assert_eq!(guest.push(&much), HELD);
    assert_eq!(guest.push(b"more"), 0);
    guest.greet();
    assert_eq!(guest.unsent(), b"");
    assert_eq!(guest.hear(&start([1; TOKEN], 0)), Ok(false));
    let count = guest.unsent().len();
    guest.left(count);
    assert_eq!(guest.hear(&acknowledgement(5)), Ok(true));
    assert_eq!(guest.room(), 5);
}

#[test]
fn a_stream_that_wraps_around_in_memory_leaves_in_order() {
    let mut guest = Outbox::new();
    guest.greet();
    guest.hear(&start([1; TOKEN], 0)).unwrap();
    let mut left = Vec::new();
    let mut printed = Vec::new();
    for round in 0..200_u32 {
        let line = vec![round as u8; 9_973];
        guest.push(&line);
        printed.extend(line);
        while !guest.unsent().is_empty() {
            let piece = guest.unsent().to_vec();
            guest.left(piece.len());
            left.extend(piece);
        }
        let told = left.len() as u64 - u64::from(round % 7).min(left.len() as u64);
        guest.hear(&acknowledgement(told)).unwrap();
    }
    assert!(left == printed);
}

#[test]
fn an_answer_in_single_bytes_is_understood() {
    let mut guest = Outbox::new();
    guest.push(b"hello");
    guest.greet();
    for byte in start([7; TOKEN], 0) {
        assert_eq!(guest.hear(&[byte]), Ok(false));
    }
    assert_eq!(guest.unsent(), b"hello");
    guest.left(5);
    assert!(guest.waits());
    assert_eq!(guest.hear(&acknowledgement(6)), Err(Nonsense));
    let hello = Hello::decode(&guest.greet()).unwrap();
    assert_eq!((hello.token, hello.first, hello.sent), ([7; TOKEN], 0, 5));
    assert_eq!(guest.hear(&start([8; TOKEN], 5)), Ok(true));
    assert!(guest.is_empty() && !guest.waits());
}
