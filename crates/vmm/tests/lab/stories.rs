//! What each VMM that needs KVM is to show alike.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests"
)]

use std::time::{Duration, Instant};

use hypeman_vmm::{
    Capabilities, ExitKind, IoLimit, MachineSpec, MemoryBacking, Patch, ProcessIdentity, Restore, RunState,
    VmmError, VmmKind,
};

use super::captured::{capture_where_possible, damaged, restore};
use super::{Agent, Lab, PATIENCE, Running, assert_nothing_is_left, ended, is_stopped, signal};

pub async fn a_machine_boots_sees_its_disks_in_order_pauses_and_powers_off(lab: &Lab, kind: VmmKind) {
    let capabilities = lab.driver(kind).capabilities().await;
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
    let machine = lab.launch(kind, &spec).await;
    let launched = start.elapsed();
    let mut agent = Agent::connect(&*machine).await;
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
    // Some VMMs add words of their own after ours.
    let line = agent.ask("command-line").await;
    assert!(line.split(' ').any(|word| word == "hypeman.test.vsock"), "{line}");
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
    // Some versions cannot pause without an end of all connections, and say so.
    if machine.connections_have_ended() {
        agent = Agent::connect(&*machine).await;
    } else {
        assert_eq!(agent.answer().await, "pong");
    }

    // The console changes files, and nothing that was in the first is lost.
    let before = std::fs::read_to_string(&spec.vmm_log).unwrap();
    let old = spec.vmm_log.with_extension("log.1");
    std::fs::rename(&spec.vmm_log, &old).unwrap();
    machine.reopen_vmm_log().await.unwrap();
    if machine.connections_have_ended() {
        agent = Agent::connect(&*machine).await;
    }
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
    assert_nothing_is_left(lab, kind, &spec);
}

pub async fn as_many_disks_as_promised_fit_and_one_more_is_refused(
    lab: &Lab,
    kind: VmmKind,
    mut spec: MachineSpec,
) {
    let max = lab.driver(kind).max_disks();
    spec.disks = (0..max)
        .map(|index| lab.disk(&format!("disk{index}"), index as u64 + 1))
        .collect();
    let machine = lab.launch(kind, &spec).await;
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
        lab.driver(kind).launch(&spec).await,
        Err(VmmError::InvalidSpec(_))
    ));
}

pub async fn what_is_no_device_state_is_refused_and_leaves_nothing(lab: &Lab, kind: VmmKind) {
    let driver = lab.driver(kind);
    let source = lab.launch(kind, &lab.vsock_spec("whole")).await;
    Agent::connect(&*source).await.ask("ping").await;
    let Some(captured) = capture_where_possible(lab, kind, &source).await else {
        return;
    };
    source.kill().await.unwrap();
    let state = &captured.state;
    let restore = |device_state: &[u8], patch: Option<Patch>| Restore {
        identity: captured.identity.clone(),
        device_state: device_state.to_vec(),
        patch,
    };
    let base = lab.directory.path().join("whole-base");
    captured.write_base(&base);
    let spec = |id: &str| {
        let mut spec = lab.vsock_spec(id);
        // It takes no memory without a file.
        if kind == VmmKind::Firecracker {
            spec.memory = MemoryBacking::Private(base.clone());
        }
        spec
    };
    for (what, device_state) in damaged(state) {
        let spec = spec(what);
        let request = restore(&device_state, Some(captured.patch()));
        let error = driver.restore(&spec, request).await.unwrap_err();
        println!("{what}: {error}");
        assert!(matches!(error, VmmError::StartFailed(_)), "{error:?}");
        assert_nothing_is_left(lab, kind, &spec);
    }

    // No memory behind it: absent, too short, no file.
    let short = lab.directory.path().join("short");
    std::fs::write(&short, "short").unwrap();
    for memory in [
        lab.directory.path().join("absent"),
        short,
        lab.directory.path().to_owned(),
    ] {
        let mut spec = spec("memory");
        spec.memory = MemoryBacking::Private(memory.clone());
        let outcome = driver.restore(&spec, restore(state, None)).await;
        assert!(outcome.is_err(), "{memory:?}");
        assert_nothing_is_left(lab, kind, &spec);
    }

    // A patch that fails, another version, another size of memory.
    let patched = spec("patch");
    let broken: Patch = Box::new(|_| Err(std::io::Error::other("a frame is damaged")));
    let error = driver
        .restore(&patched, restore(state, Some(broken)))
        .await
        .unwrap_err();
    assert!(matches!(error, VmmError::Io { .. }), "{error:?}");
    assert_nothing_is_left(lab, kind, &patched);
    let mut other = restore(state, Some(captured.patch()));
    other.identity.version = "1.2.3".to_owned();
    let error = driver.restore(&patched, other).await.unwrap_err();
    println!("another version: {error}");
    assert!(error.to_string().contains("1.2.3"), "{error}");
    assert_nothing_is_left(lab, kind, &patched);
    let mut larger = spec("larger");
    larger.memory_bytes += 1 << 20;
    let error = driver
        .restore(&larger, restore(state, Some(captured.patch())))
        .await
        .unwrap_err();
    println!("another size of memory: {error}");
    // Some VMMs know by themselves; of others the memory is not found where it should be.
    assert!(
        matches!(error, VmmError::StartFailed(_) | VmmError::Io { .. }),
        "{error:?}"
    );
    assert_nothing_is_left(lab, kind, &larger);
}

/// `reboot`: what is told of a guest that rebooted.
pub async fn a_machine_says_why_it_ended(lab: &Lab, kind: VmmKind, reboot: &ExitKind) {
    for order in ["panic", "reboot", "signal"] {
        let spec = lab.vsock_spec(order);
        let machine = lab.launch(kind, &spec).await;
        let mut agent = Agent::connect(&*machine).await;
        if order == "signal" {
            signal(&machine, "-9");
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
            ("reboot", kind) if kind == reboot => {}
            ("signal", ExitKind::Signal { number: 9 }) => {}
            (_, kind) => panic!("{order}: {kind:?}\n{}", cause.console_tail),
        }
        machine.kill().await.unwrap();
        assert_nothing_is_left(lab, kind, &spec);
    }
}

pub async fn a_machine_ends_that_nobody_watches_and_is_not_taken_back(lab: &Lab, kind: VmmKind) {
    let spec = lab.vsock_spec("alone");
    // Its server goes with this runtime.
    let identity: ProcessIdentity = std::thread::scope(|scope| {
        let started = scope.spawn(|| {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let machine = lab.launch(kind, &spec).await;
                let mut agent = Agent::connect(&*machine).await;
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
    let driver = lab.driver(kind);
    assert!(matches!(
        driver.adopt(&spec, &identity, None).await,
        Err(VmmError::Gone)
    ));
    assert!(driver.find_orphans(&spec.runtime_directory).unwrap().is_empty());
}

pub async fn another_server_takes_a_machine_back_and_finds_what_was_never_recorded(lab: &Lab, kind: VmmKind) {
    let driver = lab.driver(kind);
    let spec = lab.vsock_spec("adopted");
    let first = lab.launch(kind, &spec).await;
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
    signal(&second, "-STOP");
    let pid = identity.pid.to_string();
    while !is_stopped(&pid) {
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
    assert_nothing_is_left(lab, kind, &spec);
}

pub async fn a_start_that_fails_tells_the_words_of_the_vmm_and_leaves_nothing(lab: &Lab, kind: VmmKind) {
    let mut spec = lab.vsock_spec("fails");
    let mut disk = lab.disk("gone", 1);
    std::fs::remove_file(&disk.path).unwrap();
    disk.path.set_file_name("gone");
    spec.disks = vec![disk];
    let Err(error) = lab.driver(kind).launch(&spec).await else {
        panic!("it should not start")
    };
    assert!(error.to_string().contains("No such file"), "{error:?}");
    assert_nothing_is_left(lab, kind, &spec);
}

pub async fn memory_above_the_hole_of_devices_is_captured_too(lab: &Lab, kind: VmmKind) {
    let mut spec = lab.vsock_spec("big");
    spec.memory_bytes = 5 << 30;
    let source = lab.launch(kind, &spec).await;
    let mut agent = Agent::connect(&*source).await;
    let memory = agent.ask("memory").await;
    // Linux gives out high memory first, so this lies above 4 GiB.
    agent.ask("dirty 64").await;
    let checksum = agent.ask("checksum").await;
    let Some(captured) = capture_where_possible(lab, kind, &source).await else {
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
    let machine = restore(lab, kind, &fork, &captured, None).await;
    let mut agent = Agent::connect(&*machine).await;
    assert_eq!(agent.ask("checksum").await, checksum);
    assert_eq!(agent.ask("memory").await, memory);
    machine.kill().await.unwrap();
}

pub async fn a_limited_disk_is_slower_than_its_guest_would_like(
    lab: &Lab,
    kind: VmmKind,
    mut spec: MachineSpec,
) {
    let mut disk = lab.disk("slow", 4);
    // The guest itself reads no more than two mebibytes a second on some hosts.
    disk.limit = Some(IoLimit {
        bytes_per_second: 256 << 10,
        burst_bytes_per_second: 512 << 10,
    });
    spec.disks = vec![disk];
    let machine = lab.launch(kind, &spec).await;
    let mut agent = Agent::connect(&*machine).await;
    let start = Instant::now();
    agent.ask(&format!("read {}", 2 << 20)).await;
    let taken = start.elapsed();
    println!("2 MiB at 256 KiB/s, 512 KiB in a burst: {taken:?}");
    // A bucket that lets more through than promised is the only failure; a busy host is not.
    assert!(taken > Duration::from_secs(5), "{taken:?}");
    machine.kill().await.unwrap();
}
