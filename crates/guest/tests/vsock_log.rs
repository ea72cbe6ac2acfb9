//! What a workload prints, where only a vsock device leads out: a real machine in a real Cloud Hypervisor. In need of
//! much, so ignored by default; see `lab/mod.rs` and `lab/cloud_hypervisor.rs` for what it looks for.
// The lints' exception for tests does not reach helpers of integration tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod lab;

use std::{fs, path::Path, time::Duration};

use hypeman_guest_api::GuestEvent;
use lab::{
    KEY,
    cloud_hypervisor::{Hypervisor, PATIENCE},
    expect, is_possible, program, shell,
};

/// More lines than wait in the guest's memory.
const LINES: usize = 200_000;

fn size(log: &Path) -> u64 {
    fs::metadata(log).map_or(0, |metadata| metadata.len())
}

/// Waits until the file has grown.
async fn grown(log: &Path) {
    let before = size(log);
    while size(log) <= before {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "boots a machine"]
async fn every_byte_is_written_once_across_restarts_rotations_and_restores() {
    if !is_possible() {
        return;
    }
    let Some(mut machine) = Hypervisor::start() else {
        return;
    };
    let path = machine.file("app.log");
    let mut log = machine.log();
    let (client, mut events) = machine.connect(None).await;
    // It ends when we listen for that.
    let script = format!("seq 1 {LINES}; until [ -e /tmp/go ]; do sleep 1; done; echo the end");
    client
        .configure(&program(&["sh", "-c", &script]), PATIENCE)
        .await
        .unwrap();
    expect(&mut events, GuestEvent::ProgramStarted).await;
    expect(&mut events, GuestEvent::AgentReady).await;
    let mut parts = Vec::new();
    for round in 0..6 {
        grown(&path).await;
        // Another server.
        drop(log);
        if round % 2 == 1 {
            // The program fills what it can and waits.
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        log = machine.log();
        grown(&path).await;
        let old = machine.file(&format!("app.log.{round}"));
        fs::rename(&path, &old).unwrap();
        log.reopen().await.unwrap();
        parts.push(old);
        if round < 4 {
            grown(&path).await;
            println!("capturing after {} bytes", size(&path));
            machine.capture();
            if round % 2 == 0 {
                drop(log);
                log = machine.log();
            }
            machine.restore();
        }
    }
    let (client, mut events) = machine.connect(Some(&KEY)).await;
    shell(&client, "touch /tmp/go").await;
    loop {
        match events.next().await {
            Some(GuestEvent::Exited(reason)) => break assert_eq!(reason.code, 0),
            Some(_) => {}
            None => panic!("the machine went away"),
        }
    }
    // It was all there before the end was told.
    parts.push(path);
    let all: Vec<u8> = parts.iter().flat_map(|part| fs::read(part).unwrap()).collect();
    let mut expected: String = (1..=LINES).map(|line| format!("{line}\n")).collect();
    expected.push_str("the end\n");
    println!("{} bytes in {} files", all.len(), parts.len());
    assert!(
        all == expected.as_bytes(),
        "{} bytes instead of {}",
        all.len(),
        expected.len()
    );
    while !machine.has_ended() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    log.settled().await;
}
