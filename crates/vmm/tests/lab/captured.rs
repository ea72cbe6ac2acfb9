//! Machines at one instant, taken and made again.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "helpers of tests"
)]

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Instant;

use hypeman_vmm::{
    Capabilities, Feature, Machine, MachineSpec, Patch, Restore, RunState, StateIdentity, VmmError, VmmKind,
};

use super::{Agent, Lab, PATIENCE, Running};

/// A machine at one instant.
pub struct Captured {
    pub identity: StateIdentity,
    pub state: Vec<u8>,
    pub ranges: Vec<Range<u64>>,
    pub memory: OwnedFd,
    pub length: u64,
}

impl Captured {
    pub fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.end - range.start).sum()
    }

    /// A base file with all of it.
    pub fn write_base(&self, path: &Path) {
        let file = File::create(path).unwrap();
        file.set_len(self.length).unwrap();
        let memory = File::from(self.memory.try_clone().unwrap());
        let mut buffer = vec![0; 1 << 20];
        self.each_piece(|at, length| {
            memory.read_exact_at(&mut buffer[..length], at).unwrap();
            file.write_all_at(&buffer[..length], at).unwrap();
        });
    }

    /// The same pages, to be written over another base.
    pub fn patch(&self) -> Patch {
        let memory = File::from(self.memory.try_clone().unwrap());
        let mut pieces = Vec::new();
        self.each_piece(|at, length| pieces.push((at, length)));
        Box::new(move |target| {
            let mut buffer = vec![0; 1 << 20];
            for (at, length) in pieces {
                memory.read_exact_at(&mut buffer[..length], at)?;
                target.write(at, &buffer[..length])?;
            }
            Ok(())
        })
    }

    fn each_piece(&self, mut each: impl FnMut(u64, usize)) {
        for range in &self.ranges {
            for at in range.clone().step_by(1 << 20) {
                each(at, (range.end - at).min(1 << 20) as usize);
            }
        }
    }
}

/// Takes everything of a paused machine.
pub async fn take(machine: &dyn Machine) -> Captured {
    let memory = machine.guest_memory().await.unwrap();
    let state = machine.save_devices().await.unwrap();
    let ranges = memory.populated().unwrap();
    let copy = memory.copy_to_memfd(&ranges).unwrap();
    Captured {
        identity: machine.state_identity().unwrap().clone(),
        state,
        ranges,
        memory: copy,
        length: memory.len(),
    }
}

pub async fn capture(machine: &dyn Machine) -> Captured {
    let start = Instant::now();
    machine.pause().await.unwrap();
    take_and_resume(machine, start).await
}

async fn take_and_resume(machine: &dyn Machine, start: Instant) -> Captured {
    let captured = take(machine).await;
    machine.resume().await.unwrap();
    println!(
        "pause {:?}: state of {} bytes, memory of {} MiB in {} ranges",
        start.elapsed(),
        captured.state.len(),
        captured.bytes() >> 20,
        captured.ranges.len()
    );
    captured
}

/// `None`, with the reason printed, where this host's KVM does not give what a capture needs.
pub async fn capture_where_possible(lab: &Lab, kind: VmmKind, machine: &Running) -> Option<Captured> {
    machine.pause().await.unwrap();
    match machine.save_devices().await {
        Err(VmmError::Refused { message, .. }) if message.contains("nested guest state") => {
            println!(
                "SKIPPED: this host's KVM has no state of nested guests, without which nothing is captured"
            );
            let Capabilities::Available { features, .. } = lab.driver(kind).capabilities().await else {
                panic!("it was just used")
            };
            assert!(!features.contains(&Feature::Snapshots), "{features:?}");
            None
        }
        outcome => {
            outcome.unwrap();
            Some(take_and_resume(&**machine, Instant::now()).await)
        }
    }
}

/// A device state as the disk, a bad day or an attacker may make it.
pub fn damaged(state: &[u8]) -> [(&'static str, Vec<u8>); 5] {
    let mut flipped = state.to_vec();
    flipped[4] ^= 1;
    // The body of the VMM's own part: whatever it says, it is read as data.
    let mut scrambled = state.to_vec();
    let middle = scrambled.len() / 4;
    scrambled[middle..middle + 64].fill(b'x');
    let text = b"this is no device state at all, but it is quite long".repeat(1000);
    [
        ("empty", Vec::new()),
        ("text", text),
        ("half", state[..state.len() / 2].to_vec()),
        ("flipped", flipped),
        ("scrambled", scrambled),
    ]
}

pub async fn restore(
    lab: &Lab,
    kind: VmmKind,
    spec: &MachineSpec,
    captured: &Captured,
    patch: Option<Patch>,
) -> Running {
    let start = Instant::now();
    let restore = Restore {
        identity: captured.identity.clone(),
        device_state: captured.state.clone(),
        patch,
    };
    let machine = Running::of(lab.driver(kind).restore(spec, restore).await.unwrap());
    println!("{kind:?}: restored in {:?}", start.elapsed());
    assert_eq!(machine.run_state(PATIENCE).await.unwrap(), RunState::Paused);
    machine.resume().await.unwrap();
    machine
}

pub fn digest(path: &Path) -> u64 {
    let mut file = File::open(path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let mut sum = 0_u64;
    loop {
        let count = file.read(&mut buffer).unwrap();
        if count == 0 {
            return sum;
        }
        sum = buffer[..count].iter().fold(sum, |sum, byte| {
            sum.wrapping_mul(31).wrapping_add(u64::from(*byte))
        });
    }
}

pub async fn number(agent: &mut Agent, order: &str) -> u64 {
    agent.ask(order).await.parse().unwrap()
}

/// What a file takes on its disk.
pub fn used_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}
