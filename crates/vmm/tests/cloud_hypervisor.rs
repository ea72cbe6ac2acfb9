//! Real machines in Cloud Hypervisor: started, asked, captured, multiplied, broken and found again. Needs its binary,
//! KVM and a kernel that this host's KVM can run; prints what is missing and skips where they are not at hand.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests"
)]

mod lab;

use std::time::{Duration, Instant};

use hypeman_vmm::{ExitKind, MemoryBacking, Restore, RunState, VmmError, VmmKind};

use lab::captured::{Captured, capture, capture_where_possible, digest, number};
use lab::{Agent, Lab, PATIENCE, Running, assert_nothing_is_left, stories};

const KIND: VmmKind = VmmKind::CloudHypervisor;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_boots_sees_its_disks_in_order_pauses_and_powers_off() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    stories::a_machine_boots_sees_its_disks_in_order_pauses_and_powers_off(&lab, KIND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_disks_as_promised_fit_and_one_more_is_refused() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    stories::as_many_disks_as_promised_fit_and_one_more_is_refused(&lab, KIND, lab.vsock_spec("disks")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_goes_on_where_it_was_and_its_forks_do_not_disturb_each_other() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
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

    let Some(captured) = capture_where_possible(&lab, KIND, &source).await else {
        return;
    };
    assert!(
        number(&mut agent, "counter").await >= 5,
        "the connection survives a capture"
    );
    assert!(captured.bytes() >= 16 << 20);
    let identity = driver.state_identities().await.unwrap().remove(0);
    assert_eq!(source.state_identity(), Some(&identity));
    let base = lab.directory.path().join("base");
    captured.write_base(&base);
    let before = digest(&base);
    let restored = |name: &str, memory: MemoryBacking, captured: &Captured, patched: bool| {
        let mut spec = lab.vsock_spec(name);
        spec.memory = memory;
        let disk = lab.directory.path().join(format!("{name}-disk"));
        std::fs::copy(lab.directory.path().join("source-disk"), &disk).unwrap();
        spec.disks = vec![lab.disk(&format!("{name}-disk"), 8)];
        let restore = Restore {
            identity: identity.clone(),
            device_state: captured.state.clone(),
            patch: patched.then(|| captured.patch()),
        };
        let driver = lab.driver(KIND);
        async move {
            let start = Instant::now();
            let machine = Running::of(driver.restore(&spec, restore).await.unwrap());
            let loaded = start.elapsed();
            assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Paused);
            machine.resume().await.unwrap();
            let mut agent = Agent::connect(&*machine).await;
            let counter = number(&mut agent, "counter").await;
            println!(
                "{}: loaded in {loaded:?}, answers after {:?}",
                spec.id,
                start.elapsed()
            );
            assert!(counter >= 5);
            assert!(number(&mut agent, "counter").await >= counter);
            (machine, agent, spec)
        }
    };

    // Three at once, each with memory of its own.
    let private = || MemoryBacking::Private(base.clone());
    let (first, second, third) = tokio::join!(
        restored("fork0", private(), &captured, false),
        restored("fork1", private(), &captured, false),
        restored("fork2", private(), &captured, false),
    );
    let mut forks = [first, second, third];
    for (fork, agent, _) in &mut forks {
        assert_eq!(agent.ask("checksum").await, checksum);
        assert!(fork.guest_memory().await.unwrap().is_private_mapping());
    }
    assert_eq!(agent.ask("checksum").await, checksum);

    // A fork that writes 8 MiB changes that much of its own memory, and the base not at all.
    let (fork, agent, _) = &mut forks[0];
    agent.ask("dirty 8").await;
    let two = agent.ask("checksum").await;
    let delta = capture(&**fork).await;
    println!(
        "delta of {} MiB over {} MiB",
        delta.bytes() >> 20,
        captured.bytes() >> 20
    );
    assert!(delta.bytes() >= 8 << 20 && delta.bytes() < captured.bytes() / 2 + (8 << 20));
    assert_eq!(digest(&base), before);

    // Base and delta make the fork again; so does memory without any file, with all of it.
    let (again, mut agent, _) = restored("again", private(), &delta, true).await;
    assert_eq!(agent.ask("checksum").await, two);
    assert!(number(&mut agent, "counter").await > 5);
    let (whole, mut agent, _) = restored("whole", MemoryBacking::Anonymous, &captured, true).await;
    assert_eq!(agent.ask("checksum").await, checksum);
    assert!(!whole.guest_memory().await.unwrap().is_private_mapping());

    // Another server takes a fork back, and it can be captured like any other.
    let [first, (fork, agent, spec), third] = forks;
    drop(agent);
    let adopted = Running::of(
        driver
            .adopt(&spec, fork.process(), Some(&identity))
            .await
            .unwrap(),
    );
    assert_eq!(adopted.state_identity(), Some(&identity));
    let mut agent = Agent::connect(&*adopted).await;
    assert_eq!(agent.ask("checksum").await, checksum);
    let delta = capture(&*adopted).await;
    assert!(delta.bytes() < 30 << 20, "{}", delta.bytes());
    assert_eq!(digest(&base), before);
    adopted.kill().await.unwrap();
    assert_nothing_is_left(&lab, KIND, &spec);
    for (machine, _, spec) in [first, third] {
        machine.kill().await.unwrap();
        assert_nothing_is_left(&lab, KIND, &spec);
    }
    for machine in [&again, &whole, &source] {
        machine.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_device_state_is_refused_and_leaves_nothing() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    stories::what_is_no_device_state_is_refused_and_leaves_nothing(&lab, KIND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_says_why_it_ended() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    stories::a_machine_says_why_it_ended(&lab, KIND, &ExitKind::Reset).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_ends_that_nobody_watches_and_is_not_taken_back() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    stories::a_machine_ends_that_nobody_watches_and_is_not_taken_back(&lab, KIND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_takes_a_machine_back_and_finds_what_was_never_recorded() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    stories::another_server_takes_a_machine_back_and_finds_what_was_never_recorded(&lab, KIND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_tells_the_words_of_the_vmm_and_leaves_nothing() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    stories::a_start_that_fails_tells_the_words_of_the_vmm_and_leaves_nothing(&lab, KIND).await;

    // What a guest made look like another format is never read as such: Cloud Hypervisor stops there.
    let mut spec = lab.vsock_spec("guise");
    let disk = lab.disk("guise-disk", 1);
    let mut header = vec![0; 1 << 20];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[20..24].copy_from_slice(&16_u32.to_be_bytes());
    std::fs::write(&disk.path, header).unwrap();
    spec.disks = vec![disk];
    let refusal = lab.driver(KIND).launch(&spec).await.unwrap_err();
    println!("a disk in the guise of another format: {refusal}");
    assert!(matches!(refusal, VmmError::StartFailed(_)), "{refusal:?}");
    assert_nothing_is_left(&lab, KIND, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_above_the_hole_of_devices_is_captured_too() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    stories::memory_above_the_hole_of_devices_is_captured_too(&lab, KIND).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limited_disk_is_slower_than_its_guest_would_like() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    stories::a_limited_disk_is_slower_than_its_guest_would_like(&lab, KIND, lab.vsock_spec("limited")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_and_disks_change_while_a_machine_runs() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let mut spec = lab.vsock_spec("changes");
    spec.hotplug_bytes = 256 << 20;
    spec.disks = vec![lab.disk("first", 2)];
    let machine = lab.launch(KIND, &spec).await;
    let mut agent = Agent::connect(&*machine).await;
    let kibibytes = |line: String| -> u64 { line.split_whitespace().nth(1).unwrap().parse().unwrap() };
    let before = kibibytes(agent.ask("memory").await);
    let adjust = machine.adjust().unwrap();

    adjust.resize_disk(0, 6 << 20).await.unwrap();
    assert_eq!(std::fs::metadata(&spec.disks[0].path).unwrap().len(), 6 << 20);
    while agent.ask("disks").await != (6 << 20).to_string() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("the guest sees the larger disk");
    adjust.set_memory(spec.memory_bytes + (128 << 20)).await.unwrap();
    while kibibytes(agent.ask("memory").await) < before + (100 << 10) {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("the guest has more memory");
    assert_eq!(adjust.added_memory().await.unwrap(), 128 << 20);
    // Asked again, it is no other wish.
    adjust.set_memory(spec.memory_bytes + (128 << 20)).await.unwrap();
    adjust.set_balloon(32 << 20).await.unwrap();
    adjust.set_balloon(0).await.unwrap();
    let second = lab.disk("second", 3);
    adjust.attach_disk(1, &second).await.unwrap();
    assert!(matches!(
        adjust.attach_disk(1, &second).await,
        Err(VmmError::Refused { .. })
    ));
    adjust.detach_disk(1, &second).await.unwrap();
    assert!(matches!(
        adjust.detach_disk(7, &second).await,
        Err(VmmError::Refused { .. })
    ));
    // More than was promised.
    let too_much = spec.memory_bytes + (512 << 20);
    assert!(matches!(
        adjust.set_memory(too_much).await,
        Err(VmmError::Refused { .. })
    ));
    machine.kill().await.unwrap();
    assert_nothing_is_left(&lab, KIND, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_is_captured_without_memory_that_was_added_or_not_at_all() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let driver = lab.driver(KIND);
    let mut spec = lab.vsock_spec("larger");
    spec.hotplug_bytes = 256 << 20;
    let all = spec.memory_bytes + spec.hotplug_bytes;
    let source = lab.launch(KIND, &spec).await;
    let mut agent = Agent::connect(&*source).await;
    let adjust = source.adjust().unwrap();
    agent.ask("dirty 64").await;
    let checksum = agent.ask("checksum").await;
    adjust.set_memory(all).await.unwrap();
    until_added(&source, spec.hotplug_bytes).await;

    // With it, there is no state that would be whole; the guest goes on.
    source.pause().await.unwrap();
    let refusal = source.save_devices().await.unwrap_err();
    println!("captured with all of its memory: {refusal}");
    if !matches!(refusal, VmmError::MemoryInUse { bytes } if bytes == spec.hotplug_bytes) {
        assert!(refusal.to_string().contains("nested guest state"), "{refusal}");
        return;
    }
    source.resume().await.unwrap();
    assert_eq!(agent.ask("checksum").await, checksum);

    adjust.set_memory(spec.memory_bytes).await.unwrap();
    until_added(&source, 0).await;
    let Some(captured) = capture_where_possible(&lab, KIND, &source).await else {
        return;
    };
    assert_eq!(captured.length, spec.memory_bytes);
    source.kill().await.unwrap();

    // Where there is no room for more, it is another machine.
    let base = lab.directory.path().join("larger-base");
    captured.write_base(&base);
    let restore = || async {
        Restore {
            identity: driver.state_identities().await.unwrap().remove(0),
            device_state: captured.state.clone(),
            patch: None,
        }
    };
    let mut fork = lab.vsock_spec("largerfork");
    fork.memory = MemoryBacking::Private(base);
    let refusal = driver.restore(&fork, restore().await).await.unwrap_err();
    assert!(matches!(refusal, VmmError::StartFailed(_)), "{refusal:?}");

    fork.hotplug_bytes = spec.hotplug_bytes;
    let machine = Running::of(driver.restore(&fork, restore().await).await.unwrap());
    machine.resume().await.unwrap();
    let mut agent = Agent::connect(&*machine).await;
    assert_eq!(agent.ask("checksum").await, checksum);
    machine.adjust().unwrap().set_memory(all).await.unwrap();
    until_added(&machine, spec.hotplug_bytes).await;
    assert_eq!(agent.ask("checksum").await, checksum);
    machine.kill().await.unwrap();
}

/// Waits until the guest has taken or given back what it should.
async fn until_added(machine: &Running, bytes: u64) {
    while machine.adjust().unwrap().added_memory().await.unwrap() != bytes {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
