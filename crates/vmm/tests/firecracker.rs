//! Real machines in Firecracker: started, asked, captured, multiplied, broken and found again. Needs its binary, KVM and
//! a kernel that this host's KVM can run; prints what is missing and skips where they are not at hand.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests"
)]

mod lab;

use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hypeman_vmm::{
    DiskCopy, ExitKind, MachineSpec, MemoryBacking, ProcessIdentity, Restore, RunState, VmmError, VmmKind,
};

use lab::captured::{Captured, capture, digest, number, restore, take, used_bytes};
use lab::{Agent, Lab, PATIENCE, Running, assert_nothing_is_left, stories};

const KIND: VmmKind = VmmKind::Firecracker;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_boots_sees_its_disks_in_order_pauses_and_powers_off() {
    let Some(lab) = Lab::firecracker() else { return };
    stories::a_machine_boots_sees_its_disks_in_order_pauses_and_powers_off(&lab, KIND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_disks_as_promised_fit_and_one_more_is_refused() {
    let Some(lab) = Lab::firecracker() else { return };
    stories::as_many_disks_as_promised_fit_and_one_more_is_refused(&lab, KIND, lab.vsock_spec("disks")).await;
}

/// A copy of a captured machine that runs.
struct Fork {
    machine: Running,
    agent: Agent,
    spec: MachineSpec,
}

impl Fork {
    /// Gives it memory above `base` and a disk of its own with the content of `disk`. `patched`: what was captured lies
    /// above the base, and is not all of it.
    async fn of(
        captured: &Captured,
        lab: &Lab,
        name: &str,
        base: PathBuf,
        disk: &Path,
        patched: bool,
    ) -> Self {
        let mut spec = lab.vsock_spec(name);
        spec.memory = MemoryBacking::Private(base);
        spec.disks = vec![lab.disk(&format!("{name}-disk"), 8)];
        std::fs::copy(disk, &spec.disks[0].path).unwrap();
        let patch = patched.then(|| captured.patch());
        let machine = restore(lab, KIND, &spec, captured, patch).await;
        let mut agent = Agent::connect(&*machine).await;
        let counter = number(&mut agent, "counter").await;
        assert!(counter >= 5);
        assert!(number(&mut agent, "counter").await >= counter);
        Self { machine, agent, spec }
    }

    async fn end(self, lab: &Lab) {
        self.machine.kill().await.unwrap();
        assert_nothing_is_left(lab, KIND, &self.spec);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_goes_on_where_it_was_and_its_forks_need_nothing_of_it_or_of_each_other() {
    let Some(lab) = Lab::firecracker() else { return };
    let driver = lab.driver(KIND);
    let mut spec = lab.vsock_spec("source");
    spec.disks = vec![lab.disk("source-disk", 8)];
    let source = lab.launch(KIND, &spec).await;
    let mut agent = Agent::connect(&*source).await;
    agent.ask("dirty 16").await;
    let checksum = agent.ask("checksum").await;
    // Seldom: where a guest's kernel is slow, its clock alone keeps a core busy.
    agent.ask("count 200").await;
    while number(&mut agent, "counter").await < 5 {}

    let captured = capture(&*source).await;
    assert!(captured.bytes() >= 16 << 20 && captured.bytes() < captured.length);
    let identity = driver.state_identities().await.unwrap().remove(0);
    assert_eq!(captured.identity, identity);
    // The guest lost its connections and nothing else, and that is said once.
    assert!(source.connections_have_ended());
    assert!(!source.connections_have_ended());
    drop(agent);
    let mut agent = Agent::connect(&*source).await;
    assert!(number(&mut agent, "counter").await >= 5);
    assert_eq!(agent.ask("checksum").await, checksum);

    // Its disk gets another name, and its directory goes: nothing of it is where it was.
    source.kill().await.unwrap();
    let disk = lab.directory.path().join("kept");
    std::fs::rename(&spec.disks[0].path, &disk).unwrap();
    std::fs::remove_dir_all(&spec.runtime_directory).unwrap();
    let base = lab.directory.path().join("base");
    captured.write_base(&base);
    let before = digest(&base);
    let (mut first, mut second) = tokio::join!(
        Fork::of(&captured, &lab, "fork0", base.clone(), &disk, false),
        Fork::of(&captured, &lab, "fork1", base.clone(), &disk, false),
    );

    // A fork that writes 8 MiB changes that much of its own memory, and neither base nor disk of the other.
    assert_eq!(first.agent.ask("fill 4").await, "Ok(())");
    first.agent.ask("dirty 8").await;
    let two = first.agent.ask("checksum").await;
    let delta = capture(&*first.machine).await;
    println!(
        "delta of {} MiB over {} MiB",
        delta.bytes() >> 20,
        captured.bytes() >> 20
    );
    assert!(delta.bytes() >= 8 << 20 && delta.bytes() < captured.bytes() / 2 + (8 << 20));
    assert_eq!(digest(&base), before);
    let written = std::fs::read(&first.spec.disks[0].path).unwrap();
    assert!(written[..4 << 16].iter().all(|byte| *byte == 0xa5));
    assert!(written[4 << 16..].iter().all(|byte| *byte == 0));
    let untouched = std::fs::read(&second.spec.disks[0].path).unwrap();
    assert!(untouched.iter().all(|byte| *byte == 0));
    assert_eq!(second.agent.ask("checksum").await, checksum);
    assert!(second.machine.guest_memory().await.unwrap().is_private_mapping());

    // Base and delta make the first again. A copy that is not on a disk yet serves as well as a file.
    let again = first.spec.disks[0].path.clone();
    let mut again = Fork::of(&delta, &lab, "again", base.clone(), &again, true).await;
    assert_eq!(again.agent.ask("checksum").await, two);
    let early = format!("/proc/{}/fd/{}", std::process::id(), captured.memory.as_raw_fd());
    let mut early = Fork::of(&captured, &lab, "early", early.into(), &disk, false).await;
    assert_eq!(early.agent.ask("checksum").await, checksum);
    for fork in [first, again, early] {
        fork.end(&lab).await;
    }

    // Another server takes a fork back, and it can be captured like any other.
    let Fork { machine, agent, spec } = second;
    drop(agent);
    let adopted = driver.adopt(&spec, machine.process(), Some(&identity)).await;
    let adopted = Running::of(adopted.unwrap());
    assert_eq!(adopted.state_identity(), Some(&identity));
    assert_eq!(Agent::connect(&*adopted).await.ask("checksum").await, checksum);
    let delta = capture(&*adopted).await;
    assert!(delta.bytes() < 30 << 20, "{}", delta.bytes());
    assert_eq!(digest(&base), before);
    adopted.kill().await.unwrap();
    assert_nothing_is_left(&lab, KIND, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_and_memory_of_a_busy_machine_are_of_one_instant() {
    let Some(lab) = Lab::firecracker() else { return };
    let mut spec = lab.vsock_spec("busy");
    spec.disks = vec![lab.disk("busy-disk", 16)];
    let source = lab.launch(KIND, &spec).await;
    Agent::connect(&*source).await.ask("load 1").await;
    while used_bytes(&spec.disks[0].path) == 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for round in 0..3 {
        let copy = DiskCopy {
            disk: 0,
            target: lab.directory.path().join(format!("busy-copy{round}")),
        };
        let wanted = std::slice::from_ref(&copy);
        let mut copies = source.prepare_disk_copies(wanted).await.unwrap();
        source.pause().await.unwrap();
        // What the guest has asked of its disk is still done after a pause, until the devices stand still as well: who
        // believes the machine when it says that it rests must not be wrong.
        let rests = source.rests_while_saving();
        if rests {
            copies.begin().await.unwrap();
        }
        let captured = take(&*source).await;
        if !rests {
            copies.begin().await.unwrap();
        }
        source.resume().await.unwrap();
        copies.finish().await.unwrap();

        let base = lab.directory.path().join(format!("busy-base{round}"));
        captured.write_base(&base);
        let mut fork = lab.vsock_spec(&format!("busy-fork{round}"));
        fork.memory = MemoryBacking::Private(base);
        fork.disks = spec.disks.clone();
        fork.disks[0].path = copy.target;
        let machine = restore(&lab, KIND, &fork, &captured, None).await;
        let verdict = Agent::connect(&*machine).await.ask("verdict").await;
        println!("{round}: {verdict}");
        assert!(verdict.starts_with("good "), "{verdict}");
        machine.kill().await.unwrap();
    }
    let verdict = Agent::connect(&*source).await.ask("verdict").await;
    assert!(verdict.starts_with("good "), "the source: {verdict}");
    source.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_dies_in_the_middle_of_a_capture_leaves_a_machine_that_goes_on() {
    let Some(lab) = Lab::firecracker() else { return };
    let spec = lab.vsock_spec("left");
    let process: ProcessIdentity = std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let machine = lab.launch(KIND, &spec).await;
                Agent::connect(&*machine).await.ask("dirty 4").await;
                machine.pause().await.unwrap();
                machine.save_devices().await.unwrap();
                let process = machine.process().clone();
                // Nothing of a server that is killed is dropped.
                std::mem::forget(machine);
                process
            })
        });
        server.join().unwrap()
    });
    let hold = spec.runtime_directory.join("vmm/hold");
    assert!(hold.exists(), "it waits for who captures it");

    let driver = lab.driver(KIND);
    let identity = driver.state_identities().await.unwrap().remove(0);
    let machine = driver.adopt(&spec, &process, Some(&identity)).await;
    let machine = Running::of(machine.unwrap());
    assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Paused);
    assert!(!hold.exists());
    machine.resume().await.unwrap();
    let checksum = Agent::connect(&*machine).await.ask("checksum").await;
    assert!(!checksum.is_empty());
    assert!(capture(&*machine).await.bytes() >= 4 << 20);
    assert_eq!(Agent::connect(&*machine).await.ask("checksum").await, checksum);
    machine.kill().await.unwrap();
    assert_nothing_is_left(&lab, KIND, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_device_state_is_refused_and_leaves_nothing() {
    let Some(lab) = Lab::firecracker() else { return };
    stories::what_is_no_device_state_is_refused_and_leaves_nothing(&lab, KIND).await;

    // It takes a file or somebody who serves; the state is not even looked at.
    let driver = lab.driver(KIND);
    let spec = lab.vsock_spec("nothing");
    let request = Restore {
        identity: driver.state_identities().await.unwrap().remove(0),
        device_state: b"never read".to_vec(),
        patch: None,
    };
    let error = driver.restore(&spec, request).await.unwrap_err();
    assert!(matches!(error, VmmError::InvalidSpec(_)), "{error:?}");
    assert_nothing_is_left(&lab, KIND, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_says_why_it_ended() {
    let Some(lab) = Lab::firecracker() else { return };
    // It has no other way to switch itself off.
    stories::a_machine_says_why_it_ended(&lab, KIND, &ExitKind::PowerOff).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_ends_that_nobody_watches_and_is_not_taken_back() {
    let Some(lab) = Lab::firecracker() else { return };
    stories::a_machine_ends_that_nobody_watches_and_is_not_taken_back(&lab, KIND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_takes_a_machine_back_and_finds_what_was_never_recorded() {
    let Some(lab) = Lab::firecracker() else { return };
    stories::another_server_takes_a_machine_back_and_finds_what_was_never_recorded(&lab, KIND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_tells_the_words_of_the_vmm_and_leaves_nothing() {
    let Some(lab) = Lab::firecracker() else { return };
    stories::a_start_that_fails_tells_the_words_of_the_vmm_and_leaves_nothing(&lab, KIND).await;

    // What a guest made look like another format is never read as such: these bytes claim a disk of another size.
    let mut spec = lab.vsock_spec("guise");
    let disk = lab.disk("guise-disk", 1);
    let mut header = vec![0; 1 << 20];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[20..24].copy_from_slice(&16_u32.to_be_bytes());
    header[24..32].copy_from_slice(&(64_u64 << 20).to_be_bytes());
    std::fs::write(&disk.path, header).unwrap();
    spec.disks = vec![disk];
    let machine = lab.launch(KIND, &spec).await;
    let disks = Agent::connect(&*machine).await.ask("disks").await;
    assert_eq!(disks, (1 << 20).to_string());
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_above_the_hole_of_devices_is_captured_too() {
    let Some(lab) = Lab::firecracker() else { return };
    stories::memory_above_the_hole_of_devices_is_captured_too(&lab, KIND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limited_disk_is_slower_than_its_guest_would_like() {
    let Some(lab) = Lab::firecracker() else { return };
    stories::a_limited_disk_is_slower_than_its_guest_would_like(&lab, KIND, lab.vsock_spec("limited")).await;
}

/// By the balloon, waiting for the guest each time.
async fn take_memory_and_give_it_back(machine: &Running, agent: &mut Agent) {
    let before = free_kibibytes(agent).await;
    let adjust = machine.adjust().unwrap();
    adjust.set_balloon(32 << 20).await.unwrap();
    while free_kibibytes(agent).await + (24 << 10) > before {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("the guest has less memory");
    adjust.set_balloon(0).await.unwrap();
    while free_kibibytes(agent).await + (8 << 10) < before {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("the guest has it again");
}

async fn free_kibibytes(agent: &mut Agent) -> u64 {
    let line = agent.ask("free").await;
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_balloon_takes_memory_and_gives_it_back_and_nothing_else_changes() {
    let Some(lab) = Lab::firecracker() else { return };
    let mut spec = lab.vsock_spec("changes");
    spec.disks = vec![lab.disk("first", 2)];
    let machine = lab.launch(KIND, &spec).await;
    let mut agent = Agent::connect(&*machine).await;
    take_memory_and_give_it_back(&machine, &mut agent).await;

    let adjust = machine.adjust().unwrap();
    let second = lab.disk("second", 3);
    let outcomes = [
        adjust.set_memory(spec.memory_bytes + (128 << 20)).await,
        adjust.attach_disk(1, &second).await,
        adjust.detach_disk(0, &spec.disks[0]).await,
        adjust.resize_disk(0, 6 << 20).await,
    ];
    for outcome in outcomes {
        assert!(
            matches!(outcome, Err(VmmError::Unsupported { .. })),
            "{outcome:?}"
        );
    }
    assert_eq!(std::fs::metadata(&spec.disks[0].path).unwrap().len(), 2 << 20);
    assert_eq!(agent.ask("disks").await, (2 << 20).to_string());
    machine.kill().await.unwrap();
    assert_nothing_is_left(&lab, KIND, &spec);

    // What it would need for more is refused before anything starts.
    spec.hotplug_bytes = 256 << 20;
    let outcome = lab.driver(KIND).launch(&spec).await;
    assert!(
        matches!(outcome, Err(VmmError::Unsupported { .. })),
        "{outcome:?}"
    );
    assert_nothing_is_left(&lab, KIND, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_whose_guest_has_given_memory_back_is_captured_like_any_other() {
    let Some(lab) = Lab::firecracker() else { return };
    let source = lab.launch(KIND, &lab.vsock_spec("gives-source")).await;
    let mut agent = Agent::connect(&*source).await;
    agent.ask("dirty 16").await;
    let checksum = agent.ask("checksum").await;
    let captured = capture(&*source).await;
    source.kill().await.unwrap();
    let base = lab.directory.path().join("gives-base");
    captured.write_base(&base);
    let before = digest(&base);
    let on_base = |id: &str| MachineSpec {
        memory: MemoryBacking::Private(base.clone()),
        ..lab.vsock_spec(id)
    };

    // Where it gives pages back, Firecracker puts empty ones in the place of the file's.
    let fork = restore(&lab, KIND, &on_base("gives"), &captured, None).await;
    let mut agent = Agent::connect(&*fork).await;
    take_memory_and_give_it_back(&fork, &mut agent).await;
    assert_eq!(agent.ask("checksum").await, checksum);
    let delta = capture(&*fork).await;
    fork.kill().await.unwrap();
    assert_eq!(digest(&base), before);
    let patch = Some(delta.patch());
    let again = restore(&lab, KIND, &on_base("gives-again"), &delta, patch).await;
    assert_eq!(Agent::connect(&*again).await.ask("checksum").await, checksum);
    again.kill().await.unwrap();
}
