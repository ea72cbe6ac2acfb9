//! What a command in a guest costs beyond what the guest itself needs for it.

use std::time::{Duration, Instant};

use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::registry::push_busybox;
use crate::report::{Goal, Section};
use crate::server::{Server, create_running, delete, small_instance};
use crate::statistics::{Sample, milliseconds};

/// Commands in one measurement inside the guest, whose clock for scripts ticks in hundredths of a second.
const LOOP: u32 = 50;

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let repetitions = context.repetitions(41, 10);
    let server = Server::start(context)?;
    let image = push_busybox(&server)?;
    let mut api = server.connect()?;
    let id = create_running(&mut api, &small_instance("bench-exec", &image, "qemu"))?;

    let script = format!(
        "read a rest </proc/uptime; i=0; while [ $i -lt {LOOP} ]; do /bin/true; i=$((i+1)); done; \
         read b rest </proc/uptime; echo $a $b"
    );
    let mut guest = Vec::new();
    let mut ours = Vec::new();
    for round in 0..repetitions + 2 {
        let started = Instant::now();
        succeed(&server, &["exec", "-T", "bench-exec", "/bin/true"])?;
        let took = started.elapsed();
        // The first rounds warm the caches of host and guest.
        if round >= 2 {
            ours.push(took);
        }
        if round % 4 == 0 {
            let text = succeed(&server, &["exec", "-T", "bench-exec", "/bin/sh", "-c", &script])?;
            guest.push(parse(&text)? / LOOP);
        }
    }
    delete(&mut api, &id)?;
    let (ours, guest): (Sample, Sample) = (ours.into_iter().collect(), guest.into_iter().collect());
    let (ours, guest_median, p99) = (
        milliseconds(ours.median()),
        milliseconds(guest.median()),
        milliseconds(ours.percentile(99.0)),
    );
    section.row(
        "round trip",
        "ms",
        ours,
        Some(guest_median),
        Goal::MoreByAtMost(15.0),
    );
    section.row(
        "beyond the guest's cost",
        "ms",
        ours - guest_median,
        None,
        Goal::AtMost(15.0),
    );
    section.row("round trip, p99", "ms", p99, None, Goal::None);
    section.note(format!(
        "medians of {repetitions} runs of the CLI, its own start included; reference: fork, exec and wait of \
         /bin/true in the guest, medians of {} loops of {LOOP}",
        guest.len()
    ));
    Ok(())
}

fn succeed(server: &Server, arguments: &[&str]) -> Result<String> {
    let output = server.cli(arguments)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(BenchError::Answer(format!(
        "hypeman {}: {}: {complaint}",
        arguments.join(" "),
        output.status
    )))
}

/// Two readings of the guest's uptime in seconds.
fn parse(text: &str) -> Result<Duration> {
    let mut numbers = text
        .split_whitespace()
        .filter_map(|word| word.parse::<f64>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(from), Some(to)) if to >= from && to - from < 1e6 => Ok(Duration::from_secs_f64(to - from)),
        _ => Err(BenchError::Answer(format!("no two times in {text:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_readings_make_a_duration() {
        assert_eq!(parse("1.25 2.00\n").unwrap(), Duration::from_millis(750));
        assert!(parse("2.0 1.0").is_err() && parse("").is_err());
    }
}
