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

use hypeman_vmm::{
    Capabilities, ExitKind, Feature, IoLimit, MemoryBacking, Restore, RunState, VmmError, VmmKind,
};

use lab::captured::{Captured, capture, digest, number, take};
use lab::{Agent, Lab, PATIENCE, Running, ended};

const KIND: VmmKind = VmmKind::CloudHypervisor;

/// `None`, with the reason printed, where this host's KVM does not give what a capture needs.
async fn captured(lab: &Lab, machine: &Running) -> Option<Captured> {
    machine.pause().await.unwrap();
    match machine.save_devices().await {
        Err(VmmError::Refused { message, .. }) if message.contains("nested guest state") => {
            println!(
                "SKIPPED: this host's KVM has no state of nested guests, without which nothing is captured"
            );
            let Capabilities::Available { features, .. } = lab.driver(KIND).capabilities().await else {
                panic!("it was just used")
            };
            assert!(!features.contains(&Feature::Snapshots), "{features:?}");
            None
        }
        outcome => {
            outcome.unwrap();
            let start = Instant::now();
            let captured = take(&**machine).await;
            println!(
                "pause {:?}: state of {} bytes, memory of {} MiB in {} ranges",
                start.elapsed(),
                captured.state.len(),
                captured.bytes() >> 20,
                captured.ranges.len()
            );
            machine.resume().await.unwrap();
            Some(captured)
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_boots_sees_its_disks_in_order_pauses_and_powers_off() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let driver = lab.driver(KIND);
    let capabilities = driver.capabilities().await;
    println!("{capabilities:?}");
    assert!(matches!(capabilities, Capabilities::Available { .. }));
    let mut spec = lab.vsock_spec("boot");
    spec.disks = vec![
        lab.disk("a", 3),
        lab.disk("b,comma \"quote\"", 5),
        lab.disk("c", 7),
    ];
    spec.disks[0].read_only = true;
    let start = Instant::now();
    let machine = lab.launch(KIND, &spec).await;
    let launched = start.elapsed();
    let mut agent = Agent::connect(&*machine).await;
    assert_eq!(agent.ask("ping").await, "pong");
    println!(
        "{}: boot ordered {launched:?}, agent {:?}",
        lab.release(),
        start.elapsed()
    );
    assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Running);
    assert_eq!(agent.ask("release").await, lab.release());
    assert_eq!(
        agent.ask("disks").await,
        format!("{} {} {}", 3 << 20, 5 << 20, 7 << 20)
    );
    assert_eq!(agent.ask("read-only").await, "1");
    assert!(agent.ask("command-line").await.ends_with(" hypeman.test.vsock"));
    assert!(machine.stats().unwrap().memory_rss_bytes > 0);
    assert_eq!(machine.exit_cause().await.kind, ExitKind::Running);

    let start = Instant::now();
    machine.pause().await.unwrap();
    machine.pause().await.unwrap();
    println!("paused twice in {:?}", start.elapsed());
    assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Paused);
    let silent = tokio::time::timeout(Duration::from_millis(500), agent.ask("ping")).await;
    assert!(silent.is_err());
    machine.resume().await.unwrap();
    assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Running);
    assert_eq!(agent.answer().await, "pong");

    // The console changes files, and nothing that was in the first is lost.
    let before = std::fs::read_to_string(&spec.vmm_log).unwrap();
    let old = spec.vmm_log.with_extension("log.1");
    std::fs::rename(&spec.vmm_log, &old).unwrap();
    machine.reopen_vmm_log().await.unwrap();
    agent.ask("console").await;
    let all = || {
        std::fs::read_to_string(&old).unwrap_or_default() + &std::fs::read_to_string(&spec.vmm_log).unwrap()
    };
    while !all().contains("words on the console") {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(all().starts_with(&before), "{}", all());

    agent.order("poweroff").await;
    ended(&*machine).await;
    let cause = machine.exit_cause().await;
    assert_eq!(cause.kind, ExitKind::PowerOff, "{}", cause.console_tail);
    assert!(matches!(machine.run_state(PATIENCE).await, Err(VmmError::Gone)));
    assert!(matches!(machine.stats(), Err(VmmError::Gone)));
    machine.kill().await.unwrap();
    assert_nothing_is_left(&lab, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_disks_as_promised_fit_and_one_more_is_refused() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let mut spec = lab.vsock_spec("disks");
    let max = lab.driver(KIND).max_disks();
    spec.disks = (0..max)
        .map(|index| lab.disk(&format!("disk{index}"), index as u64 + 1))
        .collect();
    let machine = lab.launch(KIND, &spec).await;
    let expected: Vec<String> = (0..max as u64)
        .map(|index| ((index + 1) << 20).to_string())
        .collect();
    assert_eq!(
        Agent::connect(&*machine).await.ask("disks").await,
        expected.join(" ")
    );
    machine.kill().await.unwrap();
    assert_eq!(machine.exit_cause().await.kind, ExitKind::Stopped);
    spec.disks.push(lab.disk("more", 1));
    assert!(matches!(
        lab.driver(KIND).launch(&spec).await,
        Err(VmmError::InvalidSpec(_))
    ));
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

    let Some(captured) = captured(&lab, &source).await else {
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
    assert_nothing_is_left(&lab, &spec);
    for (machine, _, spec) in [first, third] {
        machine.kill().await.unwrap();
        assert_nothing_is_left(&lab, &spec);
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
    let driver = lab.driver(KIND);
    let source = lab.launch(KIND, &lab.vsock_spec("whole")).await;
    Agent::connect(&*source).await.ask("ping").await;
    let Some(captured) = captured(&lab, &source).await else {
        return;
    };
    source.kill().await.unwrap();
    let identity = driver.state_identities().await.unwrap().remove(0);
    let state = &captured.state;
    let mut flipped = state.clone();
    flipped[4] ^= 1;
    // The body of the VMM's own part: whatever it says, it is read as data.
    let mut scrambled = state.clone();
    let middle = scrambled.len() / 4;
    scrambled[middle..middle + 64].fill(b'x');
    let states = [
        ("empty", Vec::new()),
        (
            "text",
            b"this is no device state at all, but it is quite long".repeat(1000),
        ),
        ("half", state[..state.len() / 2].to_vec()),
        ("flipped", flipped),
        ("scrambled", scrambled),
    ];
    for (what, device_state) in states {
        let spec = lab.vsock_spec(what);
        let restore = Restore {
            identity: identity.clone(),
            device_state,
            patch: Some(captured.patch()),
        };
        let error = driver.restore(&spec, restore).await.unwrap_err();
        println!("{what}: {error}");
        assert!(matches!(error, VmmError::StartFailed(_)), "{error:?}");
        assert_nothing_is_left(&lab, &spec);
    }

    // No memory behind it: absent, too short, no file.
    let short = lab.directory.path().join("short");
    std::fs::write(&short, "short").unwrap();
    for memory in [
        lab.directory.path().join("absent"),
        short,
        lab.directory.path().to_owned(),
    ] {
        let mut spec = lab.vsock_spec("memory");
        spec.memory = MemoryBacking::Private(memory.clone());
        let restore = Restore {
            identity: identity.clone(),
            device_state: state.clone(),
            patch: None,
        };
        assert!(driver.restore(&spec, restore).await.is_err(), "{memory:?}");
        assert_nothing_is_left(&lab, &spec);
    }
    // A patch that fails, another version, another size of memory.
    let spec = lab.vsock_spec("patch");
    let restore = |identity, patch| Restore {
        identity,
        device_state: state.clone(),
        patch,
    };
    let broken: hypeman_vmm::Patch = Box::new(|_| Err(std::io::Error::other("a frame is damaged")));
    let error = driver
        .restore(&spec, restore(identity.clone(), Some(broken)))
        .await
        .unwrap_err();
    assert!(matches!(error, VmmError::Io { .. }), "{error:?}");
    assert_nothing_is_left(&lab, &spec);
    let mut other = identity.clone();
    other.version = "1.2.3".to_owned();
    let error = driver
        .restore(&spec, restore(other, Some(captured.patch())))
        .await
        .unwrap_err();
    println!("another version: {error}");
    assert!(error.to_string().contains("1.2.3"), "{error}");
    assert_nothing_is_left(&lab, &spec);
    let mut spec = lab.vsock_spec("larger");
    spec.memory_bytes += 1 << 20;
    let error = driver
        .restore(&spec, restore(identity, Some(captured.patch())))
        .await
        .unwrap_err();
    assert!(matches!(error, VmmError::StartFailed(_)), "{error:?}");
    assert_nothing_is_left(&lab, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_says_why_it_ended() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    for order in ["panic", "reboot", "signal"] {
        let spec = lab.vsock_spec(order);
        let machine = lab.launch(KIND, &spec).await;
        let mut agent = Agent::connect(&*machine).await;
        agent.ask("ping").await;
        if order == "signal" {
            kill(&machine, "-9");
        } else {
            agent.order(order).await;
        }
        ended(&*machine).await;
        let cause = machine.exit_cause().await;
        println!("{order}: {:?}", cause.kind);
        match (order, &cause.kind) {
            (
                "panic",
                ExitKind::Panic {
                    message: Some(message),
                },
            ) => {
                assert!(message.starts_with("Kernel panic - not syncing: "), "{message}");
            }
            ("reboot", ExitKind::Reset) | ("signal", ExitKind::Signal { number: 9 }) => {}
            (_, kind) => panic!("{order}: {kind:?}\n{}", cause.console_tail),
        }
        machine.kill().await.unwrap();
        assert_nothing_is_left(&lab, &spec);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_ends_a_machine_that_nobody_watches() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let spec = lab.vsock_spec("alone");
    // Its server goes with this runtime.
    let identity = std::thread::scope(|scope| {
        let started = scope.spawn(|| {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let machine = lab.launch(KIND, &spec).await;
                let mut agent = Agent::connect(&*machine).await;
                agent.ask("ping").await;
                let identity = machine.process().clone();
                machine.abandon();
                agent.order("reboot").await;
                // Sent before the runtime ends.
                tokio::time::sleep(Duration::from_millis(200)).await;
                identity
            })
        });
        started.join().unwrap()
    });
    while std::fs::read_to_string(format!("/proc/{}/stat", identity.pid))
        .is_ok_and(|stat| !stat.contains(") Z "))
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_takes_a_machine_back_and_finds_what_was_never_recorded() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let driver = lab.driver(KIND);
    let spec = lab.vsock_spec("adopted");
    let first = lab.launch(KIND, &spec).await;
    Agent::connect(&*first).await.ask("ping").await;
    let identity = first.process().clone();
    let orphans = driver.find_orphans(&spec.runtime_directory).unwrap();
    assert_eq!(orphans, std::slice::from_ref(&identity));
    assert!(
        driver
            .find_orphans(&lab.directory.path().join("adopte"))
            .unwrap()
            .is_empty()
    );
    first.abandon();

    let second = Running::of(driver.adopt(&spec, &identity, None).await.unwrap());
    assert_eq!(second.run_state(PATIENCE).await.unwrap(), RunState::Running);
    // Its memory is where it was: what the kernel was told lies where the VMM put it.
    let memory = second.guest_memory().await.unwrap();
    let line = Agent::connect(&*second).await.ask("command-line").await;
    let mut bytes = vec![0; line.len()];
    memory.read(0x20000, &mut bytes).unwrap();
    assert_eq!(String::from_utf8(bytes).unwrap(), line);

    // One that hangs is told so in time, and can be killed.
    kill(&second, "-STOP");
    let pid = identity.pid.to_string();
    while !lab::is_stopped(&pid) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let outcome = second.run_state(Duration::from_millis(100)).await;
    assert!(
        matches!(outcome, Err(VmmError::Unresponsive { .. })),
        "{outcome:?}"
    );
    let third = driver.adopt(&spec, &identity, None).await.unwrap();
    third.kill().await.unwrap();
    ended(&*second).await;
    assert!(matches!(
        driver.adopt(&spec, &identity, None).await,
        Err(VmmError::Gone)
    ));
    assert_nothing_is_left(&lab, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_tells_the_words_of_the_vmm_and_leaves_nothing() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let mut spec = lab.vsock_spec("fails");
    let mut disk = lab.disk("gone", 1);
    std::fs::remove_file(&disk.path).unwrap();
    disk.path.set_file_name("gone");
    spec.disks = vec![disk];
    let Err(VmmError::StartFailed(words)) = lab.driver(KIND).launch(&spec).await else {
        panic!("it should not start")
    };
    assert!(words.contains("No such file"), "{words}");
    assert_nothing_is_left(&lab, &spec);

    // What a guest made look like another format is never read as such: Cloud Hypervisor stops there.
    let disk = lab.disk("guise", 1);
    let mut header = vec![0; 1 << 20];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[20..24].copy_from_slice(&16_u32.to_be_bytes());
    std::fs::write(&disk.path, header).unwrap();
    spec.disks = vec![disk];
    let refusal = lab.driver(KIND).launch(&spec).await.unwrap_err();
    println!("a disk in the guise of another format: {refusal}");
    assert!(matches!(refusal, VmmError::StartFailed(_)), "{refusal:?}");
    assert_nothing_is_left(&lab, &spec);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_above_the_hole_of_devices_is_captured_too() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let driver = lab.driver(KIND);
    let mut spec = lab.vsock_spec("big");
    spec.memory_bytes = 5 << 30;
    let source = lab.launch(KIND, &spec).await;
    let mut agent = Agent::connect(&*source).await;
    let memory = agent.ask("memory").await;
    // Linux gives out high memory first, so this lies above 4 GiB.
    agent.ask("dirty 64").await;
    let checksum = agent.ask("checksum").await;
    let Some(captured) = captured(&lab, &source).await else {
        return;
    };
    assert_eq!(captured.length, 5 << 30);
    let above = captured.ranges.iter().filter(|range| range.start >= 3 << 30);
    assert!(above.map(|range| range.end - range.start).sum::<u64>() >= 64 << 20);
    source.kill().await.unwrap();
    let base = lab.directory.path().join("big-base");
    captured.write_base(&base);
    let mut fork = lab.vsock_spec("bigfork");
    fork.memory_bytes = 5 << 30;
    fork.memory = MemoryBacking::Private(base);
    let restore = Restore {
        identity: driver.state_identities().await.unwrap().remove(0),
        device_state: captured.state.clone(),
        patch: None,
    };
    let machine = Running::of(driver.restore(&fork, restore).await.unwrap());
    machine.resume().await.unwrap();
    let mut agent = Agent::connect(&*machine).await;
    assert_eq!(agent.ask("checksum").await, checksum);
    assert_eq!(agent.ask("memory").await, memory);
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limited_disk_is_slower_than_its_guest_would_like() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let mut spec = lab.vsock_spec("limited");
    let mut disk = lab.disk("slow", 4);
    // The guest itself reads no more than two mebibytes a second on some hosts.
    disk.limit = Some(IoLimit {
        bytes_per_second: 256 << 10,
        burst_bytes_per_second: 512 << 10,
    });
    spec.disks = vec![disk];
    let machine = lab.launch(KIND, &spec).await;
    let mut agent = Agent::connect(&*machine).await;
    agent.ask("ping").await;
    let start = Instant::now();
    agent.ask(&format!("read {}", 2 << 20)).await;
    let taken = start.elapsed();
    println!("2 MiB at 256 KiB/s, 512 KiB in a burst: {taken:?}");
    // A bucket that lets more through than promised is the only failure; a busy host is not.
    assert!(taken > Duration::from_secs(5), "{taken:?}");
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_and_disks_change_while_a_machine_runs() {
    let Some(lab) = Lab::cloud_hypervisor() else {
        return;
    };
    let mut spec = lab.vsock_spec("changes");
    // Where nothing in the guest takes new memory into use.
    spec.kernel_arguments
        .push("memhp_default_state=online_movable".to_owned());
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
    machine.pause().await.unwrap();
    assert!(matches!(
        machine.save_devices().await,
        Err(VmmError::Unsupported { .. })
    ));
    machine.kill().await.unwrap();
    assert_nothing_is_left(&lab, &spec);
}

fn kill(machine: &Running, signal: &str) {
    let pid = machine.process().pid.to_string();
    let status = std::process::Command::new("kill").args([signal, &pid]).status();
    assert!(status.unwrap().success());
}

fn assert_nothing_is_left(lab: &Lab, spec: &hypeman_vmm::MachineSpec) {
    let left: Vec<_> = std::fs::read_dir(&spec.runtime_directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.contains(".log") && !name.starts_with("vsock.sock_"))
        .collect();
    assert_eq!(left, [""; 0]);
    let orphans = lab.driver(KIND).find_orphans(&spec.runtime_directory).unwrap();
    assert!(orphans.is_empty());
}
