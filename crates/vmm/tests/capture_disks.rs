//! Real machines whose disks are copied while they write: the copies are of the instant of the memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests"
)]

mod lab;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use hypeman_vmm::{
    Disk, DiskCopies, DiskCopy, IoLimit, MachineSpec, MemoryBacking, Restore, RunState, VmmError, VmmKind,
};

use lab::captured::{restore, take, used_bytes};
use lab::{Agent, BOARDS, Lab, PATIENCE, Running};

/// A disk of which the guest uses the first mebibytes and the rest is a hole.
fn sparse_disk(lab: &Lab, name: &str, gibibytes: u64) -> Disk {
    let disk = lab.disk(name, gibibytes << 10);
    let file = File::options().write(true).open(&disk.path).unwrap();
    file.write_all_at(b"far", (gibibytes << 29) + 12345).unwrap();
    disk
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_and_memory_of_a_busy_machine_are_of_one_instant() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        let name = format!("{board:?}").to_lowercase();
        let mut spec = lab.spec(&format!("busy-{name}"));
        spec.cpus = 2;
        spec.disks = vec![
            sparse_disk(&lab, &format!("disk-{name}"), 10),
            lab.disk(&format!("other-{name}"), 16),
        ];
        spec.disks[1].limit = Some(IoLimit {
            bytes_per_second: 64 << 20,
            burst_bytes_per_second: 64 << 20,
        });
        let source = lab.launch(board, &spec).await;
        let mut agent = Agent::connect(&*source).await;
        agent.ask("load 3").await;
        let mut pauses = Vec::new();
        for round in 0..captures() {
            let copies: Vec<_> = (0..2)
                .map(|disk| DiskCopy {
                    disk,
                    target: lab.directory.path().join(format!("copy{disk}-{name}-{round}")),
                })
                .collect();
            let mut running = source.prepare_disk_copies(&copies).await.unwrap();
            let start = Instant::now();
            source.pause().await.unwrap();
            let paused = start.elapsed();
            running.begin().await.unwrap();
            let begun = start.elapsed();
            let captured = take(&*source).await;
            source.resume().await.unwrap();
            let resumed = start.elapsed();
            running.finish().await.unwrap();
            pauses.push(resumed);
            println!(
                "{board:?} {round}: stopped {paused:?}, copies begun {begun:?}, resumed {resumed:?}, copied {:?}; \
                 {} MiB in memory, {} of {} KiB on the disk",
                start.elapsed(),
                captured.bytes() >> 20,
                used_bytes(&copies[0].target) >> 10,
                used_bytes(&spec.disks[0].path) >> 10,
            );
            // What is copied is copied in clusters of 64 KiB, and the writers use the first 3 MiB.
            assert!(used_bytes(&copies[0].target) <= 4 << 20);
            assert_eq!(used_bytes(&copies[1].target), 0);

            let base = lab.directory.path().join(format!("base-{name}-{round}"));
            captured.write_base(&base);
            let mut fork = lab.spec(&format!("fork-{name}-{round}"));
            fork.cpus = 2;
            fork.memory = MemoryBacking::Private(base.clone());
            fork.disks = spec.disks.clone();
            for (disk, copy) in fork.disks.iter_mut().zip(&copies) {
                disk.path = copy.target.clone();
            }
            let machine = restore(&lab, board, &fork, &captured, None).await;
            let mut agent = Agent::connect(&*machine).await;
            let verdict = agent.ask("verdict").await;
            println!("{board:?} {round}: {verdict}");
            assert!(verdict.starts_with("good "), "{verdict}");
            machine.kill().await.unwrap();
            let mut far = [0; 3];
            File::open(&copies[0].target)
                .unwrap()
                .read_exact_at(&mut far, (10 << 29) + 12345)
                .unwrap();
            assert_eq!(&far, b"far");
            for path in copies.iter().map(|copy| &copy.target).chain([&base]) {
                std::fs::remove_file(path).unwrap();
            }
        }
        pauses.sort();
        println!(
            "{board:?}: median pause {:?}, longest {:?}",
            pauses[pauses.len() / 2],
            pauses[pauses.len() - 1]
        );
        let verdict = agent.ask("verdict").await;
        assert!(verdict.starts_with("good "), "the source: {verdict}");
        source.kill().await.unwrap();
    }
}

/// `HYPEMAN_TEST_CAPTURES` makes the test more thorough than its place in the suite allows.
fn captures() -> usize {
    std::env::var("HYPEMAN_TEST_CAPTURES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(10)
}

fn copies_of(lab: &Lab, name: &str, disks: &[usize]) -> Vec<DiskCopy> {
    disks
        .iter()
        .map(|disk| DiskCopy {
            disk: *disk,
            target: lab.directory.path().join(format!("{name}-{disk}")),
        })
        .collect()
}

/// A machine with a disk that takes a moment to copy.
async fn with_full_disk(lab: &Lab, name: &str) -> (Running, MachineSpec) {
    let mut spec = lab.spec(name);
    spec.disks = vec![
        lab.disk(&format!("{name}-disk"), 256),
        lab.disk(&format!("{name}-root"), 1),
    ];
    spec.disks[1].read_only = true;
    std::fs::write(&spec.disks[0].path, vec![7; 256 << 20]).unwrap();
    let machine = lab.launch(VmmKind::QemuMicrovm, &spec).await;
    Agent::connect(&*machine).await.ask("ping").await;
    (machine, spec)
}

async fn begin(machine: &Running, copies: &[DiskCopy]) -> Box<dyn DiskCopies> {
    let mut running = machine.prepare_disk_copies(copies).await.unwrap();
    machine.pause().await.unwrap();
    running.begin().await.unwrap();
    machine.resume().await.unwrap();
    running
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn copies_that_are_given_up_leave_the_machine_as_it_was() {
    let Some(lab) = Lab::new() else { return };
    let (machine, spec) = with_full_disk(&lab, "given-up").await;
    let mut agent = Agent::connect(&*machine).await;

    // Never begun, cancelled in the middle, and dropped: the next ones find everything free.
    let prepared = machine
        .prepare_disk_copies(&copies_of(&lab, "never", &[0]))
        .await
        .unwrap();
    let second = machine
        .prepare_disk_copies(&copies_of(&lab, "second", &[0]))
        .await;
    assert!(matches!(second, Err(VmmError::Refused { .. })), "{second:?}");
    assert!(!lab.directory.path().join("second-0").exists());
    prepared.cancel().await;
    begin(&machine, &copies_of(&lab, "cancelled", &[0]))
        .await
        .cancel()
        .await;
    drop(begin(&machine, &copies_of(&lab, "dropped", &[0])).await);
    let copies = copies_of(&lab, "whole", &[0]);
    let running = loop {
        // What was dropped goes in its own time.
        match machine.prepare_disk_copies(&copies).await {
            Ok(running) => break running,
            Err(VmmError::Refused { .. }) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            Err(error) => panic!("{error}"),
        }
    };
    running.cancel().await;
    std::fs::remove_file(&copies[0].target).unwrap();

    // The guest overwrites all of it meanwhile; the copy is of the instant.
    let running = begin(&machine, &copies).await;
    let filled = agent.ask("fill 512").await;
    assert_eq!(filled, "Ok(())");
    running.finish().await.unwrap();
    assert!(
        std::fs::read(&copies[0].target)
            .unwrap()
            .iter()
            .all(|byte| *byte == 7)
    );
    let disk = std::fs::read(&spec.disks[0].path).unwrap();
    assert!(disk[..32 << 20].iter().all(|byte| *byte == 0xa5));
    assert!(disk[32 << 20..].iter().all(|byte| *byte == 7));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_copied_is_refused_before_anything_is_made() {
    let Some(lab) = Lab::new() else { return };
    let (machine, _) = with_full_disk(&lab, "refused").await;
    for disks in [[1].as_slice(), &[2], &[0, 0]] {
        let outcome = machine.prepare_disk_copies(&copies_of(&lab, "bad", disks)).await;
        assert!(
            matches!(outcome, Err(VmmError::InvalidSpec(_))),
            "{disks:?}: {outcome:?}"
        );
    }
    // What exists is not overwritten, and what was made before it is taken away again.
    let copies = copies_of(&lab, "exists", &[0]);
    std::fs::write(&copies[0].target, "precious").unwrap();
    let outcome = machine.prepare_disk_copies(&copies).await;
    assert!(matches!(outcome, Err(VmmError::Io { .. })), "{outcome:?}");
    assert_eq!(std::fs::read_to_string(&copies[0].target).unwrap(), "precious");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_ends_the_copies_that_the_last_one_began() {
    let Some(lab) = Lab::new() else { return };
    // The server dies with its runtime: nothing is cancelled, and its connections end.
    let first = std::thread::scope(|scope| {
        let server = scope.spawn(|| {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let (machine, spec) = with_full_disk(&lab, "left").await;
                let identity = machine.process().clone();
                std::mem::forget(begin(&machine, &copies_of(&lab, "left", &[0])).await);
                machine.abandon();
                (spec, identity)
            })
        });
        server.join()
    });
    let (spec, identity) = first.unwrap();
    let driver = lab.driver(VmmKind::QemuMicrovm);
    let machine = Running::of(driver.adopt(&spec, &identity, None).await.unwrap());
    assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Running);
    let copies = copies_of(&lab, "after", &[0]);
    begin(&machine, &copies).await.finish().await.unwrap();
    assert!(
        std::fs::read(&copies[0].target)
            .unwrap()
            .iter()
            .all(|byte| *byte == 7)
    );
    let open = std::fs::read_dir(format!("/proc/{}/fd", identity.pid)).unwrap();
    let names: Vec<_> = open
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .collect();
    assert!(
        !names
            .iter()
            .any(|name| name.ends_with("left-0") || name.ends_with("after-0")),
        "{names:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_a_machine_that_ends_meanwhile_is_an_error() {
    let Some(lab) = Lab::new() else { return };
    let (machine, _) = with_full_disk(&lab, "ends").await;
    let running = begin(&machine, &copies_of(&lab, "ends", &[0])).await;
    machine.kill().await.unwrap();
    let outcome = running.finish().await;
    assert!(matches!(outcome, Err(VmmError::Gone)), "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_machines_do_not_write_to_one_disk() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        let name = format!("{board:?}").to_lowercase();
        let mut spec = lab.spec(&format!("owner-{name}"));
        spec.disks = vec![lab.disk(&format!("owned-{name}"), 4)];
        let source = lab.launch(board, &spec).await;
        Agent::connect(&*source).await.ask("ping").await;
        source.pause().await.unwrap();
        let captured = take(&*source).await;
        let mut second = lab.spec(&format!("second-{name}"));
        second.disks = spec.disks.clone();
        let request = || Restore {
            identity: captured.identity.clone(),
            device_state: captured.state.clone(),
            patch: Some(captured.patch()),
        };
        // Restored beside its source it may come up, but it never runs.
        if let Ok(machine) = lab.driver(board).restore(&second, request()).await {
            let machine = Running::of(machine);
            let outcome = machine.resume().await;
            println!("{board:?}: {outcome:?}");
            assert!(matches!(outcome, Err(VmmError::Refused { .. })), "{outcome:?}");
            machine.kill().await.unwrap();
        }
        // The source has lost nothing by it.
        source.resume().await.unwrap();
        assert_eq!(Agent::connect(&*source).await.ask("ping").await, "pong");
        source.kill().await.unwrap();
        let machine = Running::of(lab.driver(board).restore(&second, request()).await.unwrap());
        machine.resume().await.unwrap();
        assert_eq!(Agent::connect(&*machine).await.ask("fill 8").await, "Ok(())");
        machine.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_stalls_can_be_captured_and_does_not_go_on_in_the_middle() {
    let Some(lab) = Lab::new() else { return };
    let small = lab.directory.path().join("small");
    std::fs::create_dir_all(&small).unwrap();
    let Some(small) = lab::SmallDisk::mount(small) else {
        return;
    };
    for board in BOARDS {
        let name = format!("{board:?}").to_lowercase();
        let mut spec = lab.spec(&format!("stalls-{name}"));
        spec.disks = vec![lab.disk(&format!("small/{name}"), 16)];
        let machine = lab.launch(board, &spec).await;
        let mut agent = Agent::connect(&*machine).await;
        agent.order("fill 128").await;
        while machine.run_state(PATIENCE).await.unwrap() != RunState::Stalled {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        machine.pause().await.unwrap();
        small.grow();
        let captured = take(&*machine).await;
        let copy = lab.directory.path().join(format!("stalled-{name}"));
        std::fs::copy(&spec.disks[0].path, &copy).unwrap();
        // Longer than it takes to try a stalled write again.
        tokio::time::sleep(std::time::Duration::from_millis(2500)).await;
        assert_ne!(machine.run_state(PATIENCE).await.unwrap(), RunState::Running);
        machine.resume().await.unwrap();
        assert_eq!(agent.answer().await, "Ok(())");
        machine.kill().await.unwrap();

        // The write that stalled is in the state, and is tried again.
        let mut fork = lab.spec(&format!("goes-on-{name}"));
        fork.disks = spec.disks.clone();
        fork.disks[0].path = copy.clone();
        let restored = restore(&lab, board, &fork, &captured, Some(captured.patch())).await;
        let mut agent = Agent::connect(&*restored).await;
        while agent.ask("ping").await != "pong" {}
        restored.kill().await.unwrap();
        let written = std::fs::read(&copy).unwrap();
        assert!(written[..128 * 65536].iter().all(|byte| *byte == 0xa5));
        std::fs::remove_file(&spec.disks[0].path).unwrap();
        small.shrink();
    }
}
