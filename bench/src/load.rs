//! Load: as many GETs as go through from a few connections, and how long each took.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::error::{BenchError, Result};
use crate::http::Connection;
use crate::statistics::Sample;

/// What came of it.
#[derive(Debug, Clone)]
pub struct Throughput {
    /// Answers per second over all connections.
    pub per_second: f64,
    /// Time of each answer.
    pub latency: Sample,
    /// Bytes of one answer's body.
    pub bytes: usize,
}

/// Asks for `path` from `connections` threads for as long as `duration`, each as fast as it can or, with
/// `interval`, at that pace.
///
/// # Errors
/// An answer other than 200, or a broken connection.
pub fn run(
    address: SocketAddr,
    token: &str,
    path: &str,
    connections: usize,
    duration: Duration,
    interval: Option<Duration>,
) -> Result<Throughput> {
    let stop = AtomicBool::new(false);
    let started = Instant::now();
    let worker = || -> Result<(Vec<Duration>, usize)> {
        let mut connection = Connection::open(address, token)?;
        let mut times = Vec::new();
        let mut bytes = 0;
        let mut next = Instant::now();
        while started.elapsed() < duration && !stop.load(Ordering::Relaxed) {
            if let Some(interval) = interval {
                next += interval;
                pause(next.saturating_duration_since(Instant::now()));
            }
            let asked = Instant::now();
            let answer = connection.count(path)?;
            times.push(asked.elapsed());
            bytes = answer.length;
            if answer.status != 200 {
                return Err(BenchError::Answer(format!(
                    "GET {path} answered {}",
                    answer.status
                )));
            }
        }
        Ok((times, bytes))
    };
    let results: Vec<Result<(Vec<Duration>, usize)>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..connections)
            .map(|_| {
                scope.spawn(|| {
                    let result = worker();
                    if result.is_err() {
                        stop.store(true, Ordering::Relaxed);
                    }
                    result
                })
            })
            .collect();
        let lost = || Err(BenchError::Answer("a load thread panicked".into()));
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| lost()))
            .collect()
    });
    let elapsed = started.elapsed();
    let (mut times, mut bytes) = (Vec::new(), 0);
    for result in results {
        let (some, length) = result?;
        times.extend(some);
        bytes = length;
    }
    let per_second = times.len() as f64 / elapsed.as_secs_f64();
    Ok(Throughput {
        per_second,
        latency: times.into_iter().collect(),
        bytes,
    })
}

/// Sleeps: a load generator keeps a pace of its own, there is no event to wait for.
#[allow(clippy::disallowed_methods)]
pub fn pause(duration: Duration) {
    std::thread::sleep(duration);
}
