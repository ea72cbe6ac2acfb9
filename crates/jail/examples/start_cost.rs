//! What the jail adds to a start: the same program, started in a jail and without one, in turn.
//!
//! `cargo run --release -p hypeman-jail --example start_cost [ROUNDS]`, as root.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hypeman_jail::{Jail, JailOptions, JailSpec, Launch, Limits, Show};
use rustix::process::{Pid, WaitOptions, waitpid};

const PROGRAM: &str = "/usr/bin/true";

fn median(mut times: Vec<Duration>) -> (f64, f64) {
    times.sort_unstable();
    let at = |share: usize| times[(times.len() - 1) * share / 100].as_secs_f64() * 1e3;
    (at(50), at(90))
}

fn main() {
    let rounds: usize = std::env::args().nth(1).map_or(100, |text| text.parse().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let jail = Jail::new(JailOptions {
        state: directory.path().join("state"),
        ..JailOptions::default()
    });
    let begun = Instant::now();
    assert!(jail.confines().unwrap(), "{}", jail.report().missing_text());
    println!(
        "first look at the host: {:.1} ms",
        begun.elapsed().as_secs_f64() * 1e3
    );
    let file = directory.path().join("file");
    File::create(&file).unwrap();
    let spec = JailSpec {
        show: vec![Show::own(file)],
        limits: Limits {
            processes: Some(64),
            descriptors: Some(64),
            file_bytes: Some(1 << 20),
            ..Limits::default()
        },
        ..JailSpec::default()
    };
    let output = File::create("/dev/null").unwrap();
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..rounds {
        let begun = Instant::now();
        let launch = Launch {
            program: Path::new(PROGRAM),
            arguments: &[],
            directory: Path::new("/"),
            output: output.as_fd(),
            keep: &[],
            lent: None,
        };
        let confined = jail.spawn(&spec, launch).unwrap();
        times[0].push(begun.elapsed());
        waitpid(Pid::from_raw(confined.pid as i32), WaitOptions::empty()).unwrap();
        times[1].push(begun.elapsed());

        let begun = Instant::now();
        let mut command = Command::new(PROGRAM);
        #[allow(unsafe_code)]
        // SAFETY: nothing is done; it only makes the library fork, as a start without a jail does.
        unsafe {
            command.pre_exec(|| Ok(()))
        };
        let mut child = command.spawn().unwrap();
        times[2].push(begun.elapsed());
        child.wait().unwrap();
        times[3].push(begun.elapsed());
    }
    let names = [
        "in a jail: until exec",
        "           until its end",
        "without:   until exec",
        "           until its end",
    ];
    for (name, times) in names.iter().zip(times) {
        let (median, ninety) = median(times);
        println!("{name}  {median:6.2} ms (90 %: {ninety:.2})");
    }
}
