//! Real machines: started, asked, paused, broken and found again. Needs QEMU and a guest kernel; prints what is
//! missing and skips where they are not at hand.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests"
)]

mod lab;

use std::time::{Duration, Instant};

use hypeman_vmm::{ExitKind, RunState, VmmError, VmmKind};

use lab::{Agent, BOARDS, Lab, PATIENCE, SmallDisk, ended, stories};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_kernel_boots_on_every_board_sees_its_disks_in_order_and_powers_off() {
    for kernel in lab::kernels() {
        let Some(lab) = Lab::with_kernel(&kernel) else {
            return;
        };
        for board in BOARDS {
            let mut spec = lab.spec(&format!("boot-{board:?}").to_lowercase());
            spec.disks = vec![
                lab.disk("a", 3),
                lab.disk("b,comma \"quote\"", 5),
                lab.disk("c", 7),
            ];
            spec.disks[0].read_only = true;
            spec.kernel_arguments = vec!["hypeman.test=1".to_owned()];
            let start = Instant::now();
            let machine = lab.launch(board, &spec).await;
            let launched = start.elapsed();
            let mut agent = Agent::connect(&*machine).await;
            assert_eq!(agent.ask("ping").await, "pong");
            let answered = start.elapsed();
            println!(
                "{} on {board:?}: QMP {launched:?}, agent {answered:?}",
                lab.release()
            );
            assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Running);
            assert_eq!(agent.ask("release").await, lab.release());
            assert_eq!(
                agent.ask("disks").await,
                format!("{} {} {}", 3 << 20, 5 << 20, 7 << 20)
            );
            assert_eq!(agent.ask("read-only").await, "1");
            assert!(agent.ask("command-line").await.ends_with(" hypeman.test=1"));
            assert!(machine.stats().unwrap().memory_rss_bytes > 0);
            assert_eq!(machine.exit_cause().await.kind, ExitKind::Running);
            agent.order("poweroff").await;
            ended(&*machine).await;
            assert_eq!(machine.exit_cause().await.kind, ExitKind::PowerOff);
            assert!(matches!(machine.run_state(PATIENCE).await, Err(VmmError::Gone)));
            assert!(matches!(machine.stats(), Err(VmmError::Gone)));
            machine.kill().await.unwrap();
            assert!(!spec.runtime_directory.join("qmp.sock").exists());
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_disks_as_promised_fit_and_one_more_is_refused() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        let spec = lab.spec(&format!("disks-{board:?}").to_lowercase());
        stories::as_many_disks_as_promised_fit_and_one_more_is_refused(&lab, board, spec).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_machine_keeps_still_until_it_is_resumed() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        let spec = lab.spec(&format!("pause-{board:?}").to_lowercase());
        let machine = lab.launch(board, &spec).await;
        let mut agent = Agent::connect(&*machine).await;
        agent.ask("ping").await;
        machine.pause().await.unwrap();
        assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Paused);
        let silent = tokio::time::timeout(Duration::from_millis(300), agent.ask("ping")).await;
        assert!(silent.is_err());
        machine.resume().await.unwrap();
        assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Running);
        assert_eq!(agent.ask("ping").await, "pong");
        machine.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_changes_files_under_a_flood_without_losing_or_doubling_a_byte() {
    let Some(lab) = Lab::new() else { return };
    const LINES: u64 = 40_000;
    for board in BOARDS {
        let spec = lab.spec(&format!("flood-{board:?}").to_lowercase());
        let machine = lab.launch(board, &spec).await;
        let mut agent = Agent::connect(&*machine).await;
        agent.ask("ping").await;
        let mut parts = Vec::new();
        let order = format!("flood {LINES}");
        let flood = agent.ask(&order);
        let rotate = async {
            for number in 0..30 {
                let old = spec.runtime_directory.join(format!("app.log.{number}"));
                std::fs::rename(&spec.workload_log, &old).unwrap();
                machine.reopen_workload_log().await.unwrap();
                parts.push(old);
                tokio::time::sleep(Duration::from_millis(15)).await;
            }
        };
        let (answer, ()) = tokio::join!(flood, rotate);
        assert_eq!(answer, "flooded");
        // The guest's last writes may still be on their way through the device.
        machine.pause().await.unwrap();
        parts.push(spec.workload_log.clone());
        let expected: String = (0..LINES).map(|count| format!("line {count}\n")).collect();
        let mut written = 0;
        let mut all = Vec::new();
        for part in &parts {
            let bytes = std::fs::read(part).unwrap();
            written += usize::from(!bytes.is_empty());
            all.extend(bytes);
        }
        println!("{board:?}: {written} of {} files got lines", parts.len());
        assert!(
            all == expected.as_bytes(),
            "{} bytes instead of {}",
            all.len(),
            expected.len()
        );
        machine.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_console_changes_files_too() {
    let Some(lab) = Lab::new() else { return };
    let spec = lab.spec("console");
    let machine = lab.launch(VmmKind::QemuMicrovm, &spec).await;
    let mut agent = Agent::connect(&*machine).await;
    agent.ask("ping").await;
    std::fs::rename(&spec.vmm_log, spec.vmm_log.with_extension("old")).unwrap();
    machine.reopen_vmm_log().await.unwrap();
    agent.ask("console").await;
    let shows = || {
        std::fs::read_to_string(&spec.vmm_log)
            .unwrap()
            .contains("words on the console")
    };
    while !shows() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    machine.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_says_why_it_ended() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        for order in ["panic", "die", "reboot", "signal"] {
            let spec = lab.spec(&format!("{order}-{board:?}").to_lowercase());
            let machine = lab.launch(board, &spec).await;
            let mut agent = Agent::connect(&*machine).await;
            agent.ask("ping").await;
            if order == "signal" {
                let pid = machine.process().pid.to_string();
                std::process::Command::new("kill")
                    .args(["-9", &pid])
                    .status()
                    .unwrap();
            } else {
                agent.order(order).await;
            }
            ended(&*machine).await;
            let cause = machine.exit_cause().await;
            println!("{board:?} {order}: {:?}", cause.kind);
            match (order, &cause.kind) {
                (
                    "panic" | "die",
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
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_takes_a_machine_back_and_finds_what_was_never_recorded() {
    let Some(lab) = Lab::new() else { return };
    let driver = lab.driver(VmmKind::QemuMicrovm);
    let spec = lab.spec("adopted");
    let first = lab.launch(VmmKind::QemuMicrovm, &spec).await;
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

    // The old server's connection goes with it.
    first.abandon();
    let second = lab::Running::of(driver.adopt(&spec, &identity, None).await.unwrap());
    assert_eq!(second.run_state(PATIENCE).await.unwrap(), RunState::Running);
    let mut agent = Agent::connect(&*second).await;
    assert_eq!(agent.ask("ping").await, "pong");
    agent.order("poweroff").await;
    ended(&*second).await;
    assert_eq!(second.exit_cause().await.kind, ExitKind::PowerOff);

    assert!(matches!(
        driver.adopt(&spec, &identity, None).await,
        Err(VmmError::Gone)
    ));
    assert!(driver.find_orphans(&spec.runtime_directory).unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vmm_that_hangs_is_told_so_in_time_and_can_be_killed() {
    let Some(lab) = Lab::new() else { return };
    let driver = lab.driver(VmmKind::Qemu);
    let spec = lab.spec("hung");
    let machine = lab.launch(VmmKind::Qemu, &spec).await;
    let pid = machine.process().pid.to_string();
    std::process::Command::new("kill")
        .args(["-STOP", &pid])
        .status()
        .unwrap();
    // Each of its threads stops in its own time.
    while !lab::is_stopped(&pid) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let outcome = machine.run_state(Duration::from_millis(100)).await;
    assert!(
        matches!(outcome, Err(VmmError::Unresponsive { .. })),
        "{outcome:?}"
    );
    let adopted = driver.adopt(&spec, machine.process(), None).await.unwrap();
    adopted.kill().await.unwrap();
    ended(&*machine).await;
    // Of two handles on one child, only that which reaps it learns how it ended.
    let kind = machine.exit_cause().await.kind;
    assert!(
        matches!(kind, ExitKind::Signal { number: 9 } | ExitKind::Unknown),
        "{kind:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_tells_the_words_of_the_vmm_and_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    for board in BOARDS {
        let mut spec = lab.spec(&format!("fails-{board:?}").to_lowercase());
        let mut disk = lab.disk("gone", 1);
        std::fs::remove_file(&disk.path).unwrap();
        disk.path.set_file_name("gone");
        spec.disks = vec![disk];
        let Err(VmmError::StartFailed(words)) = lab.driver(board).launch(&spec).await else {
            panic!("it should not start")
        };
        assert!(words.contains("No such file"), "{words}");
        let left: Vec<_> = std::fs::read_dir(&spec.runtime_directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.ends_with(".log"))
            .collect();
        assert_eq!(left, [""; 0]);
        assert!(
            lab.driver(board)
                .find_orphans(&spec.runtime_directory)
                .unwrap()
                .is_empty()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limited_disk_is_slower_than_its_guest_would_like() {
    let Some(lab) = Lab::new() else { return };
    stories::a_limited_disk_is_slower_than_its_guest_would_like(
        &lab,
        VmmKind::QemuMicrovm,
        lab.spec("limited"),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_host_disk_stalls_the_machine_and_room_lets_it_go_on_without_loss() {
    let Some(lab) = Lab::new() else { return };
    let Some(small) = SmallDisk::mount(lab.directory.path().join("small")) else {
        return;
    };
    for board in BOARDS {
        let mut spec = lab.spec(&format!("full-{board:?}").to_lowercase());
        spec.disks = vec![lab.disk("small/disk", 16)];
        let machine = lab.launch(board, &spec).await;
        let mut agent = Agent::connect(&*machine).await;
        agent.order("fill 128").await;
        while machine.run_state(PATIENCE).await.unwrap() != RunState::Stalled {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        small.grow();
        assert_eq!(agent.answer().await, "Ok(())");
        assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Running);
        let written = std::fs::read(&spec.disks[0].path).unwrap();
        assert!(written[..128 * 65536].iter().all(|byte| *byte == 0xa5));
        machine.kill().await.unwrap();
        std::fs::remove_file(&spec.disks[0].path).unwrap();
        small.shrink();
    }
}
