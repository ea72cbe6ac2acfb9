//! Damage, lies and violence: no guest gets wrong bytes, and whoever depends on a pager hears of it.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test that cannot go on should panic"
)]

mod support;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use hypeman_pager::memory::{WatchedMemory, send_with};
use hypeman_pager::{MachineState, OverlayPage, PagerClient, PagerError, RefusedCode};
use hypeman_snapshots::{Codec, MemoryId, PAGE_BYTES};
use support::{GUEST_PAGES, Guest, Place, is_failed, until};

const MEMORY: usize = GUEST_PAGES * PAGE_BYTES;

/// Changes one bit of a file.
fn flip(path: &std::path::Path, at: u64) {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

/// Not a test of its own: a process that stands in a VMM's place, for one that will be killed.
#[test]
fn vmm_process() {
    let Some(socket) = std::env::var_os("HYPEMAN_TEST_VMM_SOCKET") else {
        return;
    };
    let memory = WatchedMemory::new(MEMORY).unwrap();
    let _stream = memory
        .send(socket.as_ref(), memory.firecracker_message().as_bytes())
        .unwrap();
    let page: usize = std::env::var("HYPEMAN_TEST_VMM_PAGE").unwrap().parse().unwrap();
    println!("read {}", memory.byte(page * PAGE_BYTES));
}

/// Starts a process that connects as a VMM and reads a byte of a page.
fn vmm(socket: &std::path::Path, page: usize) -> std::process::Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "vmm_process", "--nocapture"])
        .env("HYPEMAN_TEST_VMM_SOCKET", socket)
        .env("HYPEMAN_TEST_VMM_PAGE", page.to_string())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn a_flipped_bit_stops_the_machine_and_is_reported() {
    skip_unless_faults_can_be_served!();
    for framed in [false, true] {
        let place = Place::new();
        let client = place.connect().await;
        let image = place.capture(&Guest::busy(), None);
        let name = match framed {
            true => "frames.dat",
            false => "memory.raw",
        };
        if framed {
            place.frame(image, Codec::Zstd(1));
        }
        let mut events = client.events();
        let registration = place.registration("victim", image);
        let socket = registration.socket.clone();
        client.register(registration).await.unwrap();
        // After it was opened, and verified for the last time by anybody else.
        let length = std::fs::metadata(place.file(image, name)).unwrap().len();
        for at in (0..length).step_by(1000) {
            flip(&place.file(image, name), at);
        }
        let mut victim = vmm(&socket, 71);
        let MachineState::Failed { reason, damaged } = until(&mut events, "victim", is_failed).await else {
            panic!("it failed");
        };
        assert!(damaged && reason.contains(&image.to_string()), "{reason}");
        assert_eq!(client.machines(), ["victim"]);
        // It stands still; it can be killed, and nothing of it stays.
        victim.kill().unwrap();
        victim.wait().unwrap();
        let mut said = String::new();
        victim.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(!said.contains("read "), "{said}");
        until(&mut events, "victim", |state| *state == MachineState::Gone).await;
        assert_eq!(client.machines(), Vec::<String>::new());
        assert_eq!(client.stats().await.unwrap().machines, []);
    }
}

#[tokio::test]
async fn damage_elsewhere_stops_neither_a_machine_nor_its_neighbours() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let guest = Guest::busy();
    let good = place.capture(&guest, None);
    let bad = place.capture(&guest, None);
    let machine = place.machine(&client, place.registration("bad", bad)).await;
    let neighbour = place.machine(&client, place.registration("good", good)).await;
    flip(&place.file(bad, "memory.raw"), (290 * PAGE_BYTES) as u64);
    // The last chunk is damaged: the machine cannot be let go, and goes on.
    client.graduate("bad").await.unwrap();
    assert_eq!(machine.byte(1).await, support::page(2)[0]);
    assert_eq!(neighbour.read_all().await, guest.bytes());
    assert_eq!(client.machine("bad"), Some(MachineState::Serving));
}

/// Sends something else than Firecracker would, and returns why it was refused.
async fn refused(
    place: &Place,
    client: &PagerClient,
    image: MemoryId,
    message: &str,
    descriptors: usize,
) -> String {
    let memory = WatchedMemory::new(MEMORY).unwrap();
    let message = message.replace("BASE", &memory.address().to_string());
    let file = std::fs::File::open("/dev/zero").unwrap();
    let registration = place.registration("liar", image);
    let socket = registration.socket.clone();
    let mut events = client.events();
    client.register(registration).await.unwrap();
    let stream = match descriptors {
        1 => memory.send(&socket, message.as_bytes()).unwrap(),
        other => {
            let stream = UnixStream::connect(&socket).unwrap();
            let descriptors = vec![file.as_fd(); other];
            send_with(&stream, message.as_bytes(), &descriptors[..other.min(3)]).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            stream
        }
    };
    let MachineState::Failed { reason, damaged } = until(&mut events, "liar", is_failed).await else {
        panic!("it failed");
    };
    assert!(!damaged && !socket.exists());
    drop(stream);
    until(&mut events, "liar", |state| *state == MachineState::Gone).await;
    reason
}

#[tokio::test]
async fn what_a_vmm_says_never_leads_outside_of_its_image() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let image = place.capture(&Guest::busy(), None);
    let region = |base: &str, size: usize, offset: i128, page: usize| {
        format!(r#"{{"base_host_virt_addr":{base},"size":{size},"offset":{offset},"page_size":{page}}}"#)
    };
    let whole = region("BASE", MEMORY, 0, 4096);
    for (message, descriptors, reason) in [
        (
            format!("[{}]", region("BASE", MEMORY + 4096, 0, 4096)),
            1,
            "beyond the end",
        ),
        (
            format!("[{}]", region("BASE", MEMORY, 4096, 4096)),
            1,
            "beyond the end",
        ),
        (
            format!("[{}]", region("BASE", 4096, i128::from(u64::MAX) - 4095, 4096)),
            1,
            "beyond the end",
        ),
        (
            format!("[{}]", region("BASE", 4096, -4096, 4096)),
            1,
            "known form",
        ),
        (
            format!("[{}]", region("18446744073709547520", 4096, 0, 4096)),
            1,
            "no memory can be",
        ),
        (
            format!("[{}]", region("BASE", MEMORY, 0, 2 << 20)),
            1,
            "pages of 2097152",
        ),
        (format!("[{}]", region("BASE", 100, 0, 4096)), 1, "whole pages"),
        (format!("[{whole},{whole}]"), 1, "overlap"),
        ("[]".into(), 1, "names 0 regions"),
        ("{}".into(), 1, "known form"),
        ("not json".into(), 1, "known form"),
        (format!("[{whole}]"), 0, "0 descriptors"),
        (format!("[{whole}]"), 2, "2 descriptors"),
        ("[".into(), 0, "hung up"),
    ] {
        let said = refused(&place, &client, image, &message, descriptors).await;
        assert!(said.contains(reason), "{message}: {said}");
    }
    // A descriptor that is none of the right kind.
    let registration = place.registration("zero", image);
    let mut events = client.events();
    let socket = registration.socket.clone();
    client.register(registration).await.unwrap();
    let stream = UnixStream::connect(&socket).unwrap();
    let file = std::fs::File::open("/dev/zero").unwrap();
    let message = format!("[{}]", region("4096", MEMORY, 0, 4096));
    send_with(&stream, message.as_bytes(), &[file.as_fd()]).unwrap();
    let state = until(&mut events, "zero", is_failed).await;
    assert!(format!("{state:?}").contains("not a userfaultfd"), "{state:?}");
}

#[tokio::test]
async fn a_socket_is_for_one_vmm_once() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let image = place.capture(&Guest::busy(), None);
    let registration = place.registration("one", image);
    let socket = registration.socket.clone();
    let machine = place.machine(&client, registration.clone()).await;
    assert!(UnixStream::connect(&socket).is_err() && !socket.exists());
    let again = client.register(registration).await;
    assert!(matches!(again, Err(PagerError::Refused(refused)) if refused.code == RefusedCode::Exists));
    assert_eq!(client.machine("one"), Some(MachineState::Serving));
    // Its end is noticed without anybody saying so.
    let mut events = client.events();
    drop(machine.stream);
    until(&mut events, "one", |state| *state == MachineState::Gone).await;
}

#[tokio::test]
async fn what_cannot_be_served_is_not_registered() {
    let place = Place::new();
    let client = place.connect().await;
    let image = place.capture(&Guest::busy(), None);
    let good = place.registration("good", image);
    let code = async |registration| match client.register(registration).await {
        Err(PagerError::Refused(refused)) => refused.code,
        other => panic!("{other:?}"),
    };
    let own = |offset, length| OverlayPage {
        offset,
        bytes: vec![1; length],
    };
    let changes: [fn(&mut hypeman_pager::Registration); 5] = [
        |it| it.machine = "../x".into(),
        |it| it.machine = String::new(),
        |it| it.memory_bytes += 4096,
        |it| it.socket = "relative.sock".into(),
        |it| it.socket = format!("/{}", "x".repeat(107)).into(),
    ];
    for change in changes {
        let mut wrong = good.clone();
        change(&mut wrong);
        assert_eq!(code(wrong).await, RefusedCode::Invalid);
    }
    for pages in [
        vec![own(0, 4095)],
        vec![own(1, 4096)],
        vec![own(MEMORY as u64, 4096)],
        vec![own(0, 4096), own(0, 4096)],
    ] {
        let mut wrong = good.clone();
        wrong.overlay = pages;
        assert_eq!(code(wrong).await, RefusedCode::Invalid);
    }
    let mut missing = good.clone();
    missing.image = MemoryId::random().unwrap();
    assert_eq!(code(missing).await, RefusedCode::Image);
    let mut nowhere = good.clone();
    nowhere.socket = place.path("no such directory/socket");
    assert_eq!(code(nowhere).await, RefusedCode::Host);
    flip(&place.file(image, "index"), 100);
    assert_eq!(code(good).await, RefusedCode::Damaged);
    assert_eq!(client.machines(), Vec::<String>::new());
    let unknown = client.forget("good").await;
    assert!(matches!(unknown, Err(PagerError::Refused(refused)) if refused.code == RefusedCode::NotFound));
}

#[tokio::test]
async fn a_pager_that_drains_takes_nobody_and_ends_with_its_last_machine() {
    skip_unless_faults_can_be_served!();
    let place = Place::new();
    let client = place.connect().await;
    let guest = Guest::busy();
    let image = place.capture(&guest, None);
    let machine = place.machine(&client, place.registration("last", image)).await;
    client.register(place.registration("never", image)).await.unwrap();
    client.drain().await.unwrap();
    let refused = client.register(place.registration("late", image)).await;
    assert!(matches!(refused, Err(PagerError::Refused(refused)) if refused.code == RefusedCode::Draining));
    assert_eq!(machine.read_all().await, guest.bytes());
    client.forget("never").await.unwrap();
    drop(machine.stream);
    client.gone().await;
    assert!(client.is_gone() && matches!(client.stats().await, Err(PagerError::Gone(_))));
    assert!(!place.path("pager.sock").exists());
    place.join();
}

#[tokio::test]
async fn a_pager_that_nobody_needs_ends() {
    let place = Place::with(|options| options.lonely = std::time::Duration::from_millis(10));
    place.join();
}
