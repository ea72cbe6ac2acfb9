//! Real machines, captured and restored: what was in memory and devices goes on where it was.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests"
)]

mod lab;

use std::os::fd::AsRawFd;
use std::time::Instant;

use hypeman_vmm::{ExitKind, MachineSpec, MemoryBacking, Restore, RunState, VmmError, VmmKind};

use lab::captured::{capture, digest, number, restore, take};
use lab::{Agent, BOARDS, Lab, PATIENCE, Running, ended};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_goes_on_where_it_was_and_its_forks_do_not_disturb_each_other() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        let name = format!("{board:?}").to_lowercase();
        let source = lab.launch(board, &lab.spec(&format!("source-{name}"))).await;
        let mut agent = Agent::connect(&*source).await;
        agent.ask("dirty 40").await;
        let checksum = agent.ask("checksum").await;
        agent.ask("count").await;
        while number(&mut agent, "counter").await < 20 {}

        let captured = capture(&*source).await;
        let at_capture = number(&mut agent, "counter").await;
        assert!(captured.bytes() >= 40 << 20);
        let base = lab.directory.path().join(format!("base-{name}"));
        captured.write_base(&base);
        let before = digest(&base);

        let mut forks = Vec::new();
        for index in 0..2 {
            let mut spec = lab.spec(&format!("fork{index}-{name}"));
            spec.memory = MemoryBacking::Private(base.clone());
            let start = Instant::now();
            let fork = restore(&lab, board, &spec, &captured, None).await;
            let mut agent = Agent::connect(&*fork).await;
            let counter = number(&mut agent, "counter").await;
            println!(
                "{board:?}: fork answers after {:?}, counter {counter}",
                start.elapsed()
            );
            assert!(counter >= 20);
            // It goes on from the capture, not from the source's present.
            assert!(number(&mut agent, "counter").await >= counter);
            assert_eq!(agent.ask("checksum").await, checksum);
            assert!(fork.guest_memory().await.unwrap().is_private_mapping());
            forks.push((fork, agent));
        }
        // The source never noticed.
        assert!(number(&mut agent, "counter").await > at_capture);
        assert_eq!(agent.ask("checksum").await, checksum);

        // A fork that writes 20 MiB changes that much of its own memory, and the base not at all.
        let (fork, agent) = &mut forks[0];
        agent.ask("dirty 20").await;
        let two = agent.ask("checksum").await;
        let delta = capture(&**fork).await;
        println!(
            "{board:?}: delta of {} MiB over {} MiB",
            delta.bytes() >> 20,
            captured.bytes() >> 20
        );
        assert!(delta.bytes() >= 20 << 20 && delta.bytes() < captured.bytes() / 2 + (20 << 20));
        assert_eq!(digest(&base), before);

        // Base and delta make the fork again.
        let mut spec = lab.spec(&format!("again-{name}"));
        spec.memory = MemoryBacking::Private(base.clone());
        let again = restore(&lab, board, &spec, &delta, Some(delta.patch())).await;
        let mut agent = Agent::connect(&*again).await;
        assert_eq!(agent.ask("checksum").await, two);
        assert!(number(&mut agent, "counter").await > 20);
        // A copy that is not on a disk yet serves as well as a file.
        let mut spec = lab.spec(&format!("memfd-{name}"));
        let number = captured.memory.as_raw_fd();
        spec.memory = MemoryBacking::Private(format!("/proc/{}/fd/{number}", std::process::id()).into());
        let early = restore(&lab, board, &spec, &captured, None).await;
        assert_eq!(Agent::connect(&*early).await.ask("checksum").await, checksum);
        assert!(early.guest_memory().await.unwrap().is_private_mapping());
        early.kill().await.unwrap();
        // So does memory without any file.
        let spec = lab.spec(&format!("anonymous-{name}"));
        let whole = restore(&lab, board, &spec, &captured, Some(captured.patch())).await;
        let mut agent = Agent::connect(&*whole).await;
        assert_eq!(agent.ask("checksum").await, checksum);
        assert!(!whole.guest_memory().await.unwrap().is_private_mapping());
        assert_eq!(digest(&base), before);
        for machine in [&again, &whole, &source] {
            machine.kill().await.unwrap();
        }
    }
}

/// A fork of a machine that has done nothing.
async fn plain_fork(lab: &Lab, board: VmmKind, name: &str) -> (Running, MachineSpec) {
    let mut spec = lab.spec(&format!("{name}-source"));
    // A guest with less reports no free memory.
    spec.memory_bytes = 512 << 20;
    let source = lab.launch(board, &spec).await;
    let mut agent = Agent::connect(&*source).await;
    agent.ask("dirty 30").await;
    agent.ask("dirty 40").await;
    let captured = capture(&*source).await;
    let base = lab.directory.path().join(format!("{name}-base"));
    captured.write_base(&base);
    source.kill().await.unwrap();
    let mut spec = lab.spec(name);
    spec.memory_bytes = 512 << 20;
    spec.memory = MemoryBacking::Private(base);
    (restore(lab, board, &spec, &captured, None).await, spec)
}

/// The process's own output, wherever it goes.
fn output_of(machine: &Running) -> String {
    let bytes = std::fs::read(format!("/proc/{}/fd/2", machine.process().pid)).unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_gives_memory_back_does_no_harm_to_the_file_behind_it() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        let name = format!("gives-{board:?}").to_lowercase();
        let (machine, spec) = plain_fork(&lab, board, &name).await;
        let MemoryBacking::Private(base) = &spec.memory else {
            panic!("no file")
        };
        let before = digest(base);
        let mut agent = Agent::connect(&*machine).await;
        // Of its memory that the file holds, it gives back the part that was dirtied last.
        agent.ask("clean").await;
        let checksum = agent.ask("checksum").await;
        // The guest reports free pages after a while, and QEMU tries to make holes in their place.
        while !output_of(&machine).contains("ram_block_discard_range") {
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        assert_eq!(digest(base), before);
        assert_eq!(agent.ask("checksum").await, checksum);
        agent.order("poweroff").await;
        ended(&*machine).await;
        let cause = machine.exit_cause().await;
        assert_eq!(cause.kind, ExitKind::PowerOff);
        assert!(
            !cause.console_tail.contains("ram_block_discard_range"),
            "{}",
            cause.console_tail
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_device_state_is_refused_and_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        let name = format!("{board:?}").to_lowercase();
        let source = lab.launch(board, &lab.spec(&format!("whole-{name}"))).await;
        Agent::connect(&*source).await.ask("ping").await;
        source.pause().await.unwrap();
        let captured = take(&*source).await;
        source.kill().await.unwrap();
        let state = &captured.state;
        let mut flipped = state.clone();
        flipped[4] ^= 1;
        let states = [
            ("empty", Vec::new()),
            (
                "text",
                b"this is no device state at all, but it is quite long".repeat(1000),
            ),
            ("half", state[..state.len() / 2].to_vec()),
            ("flipped", flipped),
        ];
        for (what, device_state) in states {
            let spec = lab.spec(&format!("{what}-{name}"));
            let restore = Restore {
                identity: captured.identity.clone(),
                device_state,
                patch: Some(captured.patch()),
            };
            let error = lab.driver(board).restore(&spec, restore).await.unwrap_err();
            println!("{board:?}, {what}: {error}");
            assert!(matches!(error, VmmError::StartFailed(_)), "{error:?}");
            assert_nothing_is_left(&lab, board, &spec);
        }

        // No memory behind it: absent, too short, no file.
        let short = lab.directory.path().join(format!("short-{name}"));
        std::fs::write(&short, "short").unwrap();
        for memory in [
            lab.directory.path().join("absent"),
            short,
            lab.directory.path().to_owned(),
        ] {
            let mut spec = lab.spec(&format!("memory-{name}"));
            spec.memory = MemoryBacking::Private(memory.clone());
            let restore = Restore {
                identity: captured.identity.clone(),
                device_state: state.clone(),
                patch: None,
            };
            assert!(
                lab.driver(board).restore(&spec, restore).await.is_err(),
                "{memory:?}"
            );
            assert_nothing_is_left(&lab, board, &spec);
        }
        assert!(!lab.directory.path().join("absent").exists());

        // A patch that fails is no better.
        let spec = lab.spec(&format!("patch-{name}"));
        let restore = Restore {
            identity: captured.identity.clone(),
            device_state: state.clone(),
            patch: Some(Box::new(|_| Err(std::io::Error::other("a frame is damaged")))),
        };
        let error = lab.driver(board).restore(&spec, restore).await.unwrap_err();
        assert!(matches!(error, VmmError::Io { .. }), "{error:?}");
        assert_nothing_is_left(&lab, board, &spec);
    }
}

fn assert_nothing_is_left(lab: &Lab, board: VmmKind, spec: &MachineSpec) {
    let left: Vec<_> = std::fs::read_dir(&spec.runtime_directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !name.ends_with(".log"))
        .collect();
    assert_eq!(left, [""; 0]);
    let orphans = lab.driver(board).find_orphans(&spec.runtime_directory).unwrap();
    assert!(orphans.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_nobody_waits_for_any_more_leaves_no_process() {
    let Some(lab) = Lab::new() else { return };
    let source = lab.launch(VmmKind::Qemu, &lab.spec("waited-for")).await;
    Agent::connect(&*source).await.ask("ping").await;
    let captured = capture(&*source).await;
    let spec = lab.spec("forgotten");
    let (reached, patching) = tokio::sync::oneshot::channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let restore = Restore {
        identity: captured.identity.clone(),
        device_state: captured.state.clone(),
        patch: Some(Box::new(move |_| {
            let _ = reached.send(());
            let _ = released.recv();
            Ok(())
        })),
    };
    let driver = lab.driver(VmmKind::Qemu);
    tokio::select! {
        outcome = driver.restore(&spec, restore) => panic!("{outcome:?}"),
        reached = patching => reached.unwrap(),
    }
    drop(release);
    while !driver.find_orphans(&spec.runtime_directory).unwrap().is_empty() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    assert!(!spec.runtime_directory.join("qmp.sock").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_above_the_hole_of_devices_is_captured_too() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        let name = format!("{board:?}").to_lowercase();
        let mut spec = lab.spec(&format!("big-{name}"));
        spec.memory_bytes = 5 << 30;
        let source = lab.launch(board, &spec).await;
        let mut agent = Agent::connect(&*source).await;
        let memory = agent.ask("memory").await;
        println!("{board:?}: {memory}");
        // Linux gives out high memory first, so this lies above 4 GiB.
        agent.ask("dirty 64").await;
        let checksum = agent.ask("checksum").await;
        let captured = capture(&*source).await;
        assert_eq!(captured.length, 5 << 30);
        let above = captured.ranges.iter().filter(|range| range.start >= 3 << 30);
        assert!(above.map(|range| range.end - range.start).sum::<u64>() >= 64 << 20);
        source.kill().await.unwrap();
        let base = lab.directory.path().join(format!("big-base-{name}"));
        captured.write_base(&base);
        let mut fork = lab.spec(&format!("bigfork-{name}"));
        fork.memory_bytes = 5 << 30;
        fork.memory = MemoryBacking::Private(base);
        let machine = restore(&lab, board, &fork, &captured, None).await;
        let mut agent = Agent::connect(&*machine).await;
        assert_eq!(agent.ask("checksum").await, checksum);
        assert_eq!(agent.ask("memory").await, memory);
        machine.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn states_are_told_apart_by_what_they_need() {
    let Some(lab) = Lab::new() else { return };
    let q35 = lab
        .driver(VmmKind::Qemu)
        .state_identities()
        .await
        .unwrap()
        .remove(0);
    let microvm = lab
        .driver(VmmKind::QemuMicrovm)
        .state_identities()
        .await
        .unwrap()
        .remove(0);
    println!("{q35:?}\n{microvm:?}");
    assert_ne!(q35, microvm);
    assert!(q35.machine.starts_with("pc-q35-"), "{}", q35.machine);
    assert_eq!(
        q35,
        lab.driver(VmmKind::Qemu)
            .state_identities()
            .await
            .unwrap()
            .remove(0)
    );
    assert!(!q35.version.is_empty() && !q35.cpu.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_machine_is_taken_back_by_another_server() {
    let Some(lab) = Lab::new() else { return };
    let (machine, spec) = plain_fork(&lab, VmmKind::QemuMicrovm, "taken").await;
    let identity = machine.process().clone();
    let state = machine.state_identity().cloned();
    machine.abandon();
    let driver = lab.driver(VmmKind::QemuMicrovm);
    let machine = Running::of(driver.adopt(&spec, &identity, state.as_ref()).await.unwrap());
    let mut agent = Agent::connect(&*machine).await;
    assert_eq!(agent.ask("ping").await, "pong");
    // It can be captured like any other, and its delta is small.
    let delta = capture(&*machine).await;
    assert!(delta.bytes() < 20 << 20);
    assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Running);
    machine.kill().await.unwrap();
}
