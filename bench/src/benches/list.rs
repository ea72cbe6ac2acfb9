//! How many lists of a thousand instances a server on one core answers, and how fast while VMs boot.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::seed::{STORED, server_with_instances};
use crate::context::Context;
use crate::error::{BenchError, Result};
use crate::load::{self, pause};
use crate::process;
use crate::report::{Goal, Section};
use crate::server::{Server, create_running, delete, small_instance};
use crate::statistics::milliseconds;

const PATH: &str = "/instances";
const FILTERED: &str = "/instances?state=Stopped";
const CONNECTIONS: usize = 4;
/// Pace of the requests whose latency is judged while VMs boot.
const PACE: Duration = Duration::from_millis(5);

pub(super) fn run(context: &Context, section: &mut Section) -> Result<()> {
    let (server, image) = server_with_instances(Server::start(context)?)?;
    throughput(context, &server, section)?;
    while_booting(context, &server, &image, section)
}

fn throughput(context: &Context, server: &Server, section: &mut Section) -> Result<()> {
    let rounds = context.repetitions(10, 3);
    let window = Duration::from_millis(if context.quick { 500 } else { 1000 });
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let body = server.connect()?.call("GET", PATH, "", &[])?.body;
    let bare = BareServer::start(&body)?;
    process::pin(server.process(), 0)?;
    process::pin(bare.child.id(), 0)?;
    let rate = |address| load::run(address, &server.token, PATH, CONNECTIONS, window, None);

    let measured = (|| -> Result<(Vec<load::Throughput>, Vec<load::Throughput>)> {
        if cores > 1 {
            process::pin(std::process::id(), 1)?;
        }
        rate(server.address)?;
        rate(bare.address)?;
        let (mut ours, mut reference) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            ours.push(rate(server.address)?);
            reference.push(rate(bare.address)?);
        }
        Ok((ours, reference))
    })();
    process::unpin(std::process::id())?;
    process::unpin(server.process())?;
    let (ours, reference) = measured?;

    let median = |runs: &[load::Throughput]| {
        let mut rates: Vec<f64> = runs.iter().map(|run| run.per_second).collect();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    let name = format!("requests, {STORED} stored");
    section.row(
        &name,
        "1/s",
        median(&ours),
        Some(median(&reference)),
        Goal::AtLeast(2000.0),
    );
    section.note(format!(
        "medians of {rounds} windows of {} ms over {CONNECTIONS} connections; server bound to one core; {} bytes an \
         answer; reference: hyper with the same bytes ready in memory, on the same core{}",
        window.as_millis(),
        ours.first().map_or(0, |run| run.bytes),
        if cores == 1 { "; one core only, shared with the load" } else { "" },
    ));
    Ok(())
}

fn while_booting(context: &Context, server: &Server, image: &str, section: &mut Section) -> Result<()> {
    // A filter is answered anew each time, as every list is after a change.
    let filtered = load::run(
        server.address,
        &server.token,
        FILTERED,
        1,
        Duration::from_secs(2),
        None,
    )?;
    section.row(
        "one list made anew",
        "ms",
        milliseconds(filtered.latency.median()),
        None,
        Goal::None,
    );
    let duration = Duration::from_secs(if context.quick { 5 } else { 30 });
    let finished = AtomicBool::new(false);
    let bare = BareServer::start(&server.connect()?.call("GET", PATH, "", &[])?.body)?;
    let paced = |address| load::run(address, &server.token, PATH, 1, duration, Some(PACE));
    let (measured, reference, boots) = std::thread::scope(|scope| {
        let booting = scope.spawn(|| -> Result<u32> {
            let mut api = server.connect()?;
            let mut boots = 0;
            while !finished.load(Ordering::Relaxed) {
                let id = create_running(
                    &mut api,
                    &small_instance(&format!("bench-{boots}"), image, "qemu"),
                )?;
                delete(&mut api, &id)?;
                boots += 1;
            }
            Ok(boots)
        });
        // The same machine, the same moments: what the bare server needs then is not ours.
        let reference = scope.spawn(|| paced(bare.address));
        let measured = paced(server.address);
        let reference = reference
            .join()
            .unwrap_or_else(|_| Err(BenchError::Answer("a load panicked".into())));
        finished.store(true, Ordering::Relaxed);
        let boots = booting
            .join()
            .unwrap_or_else(|_| Err(BenchError::Answer("the boots panicked".into())));
        (measured, reference, boots)
    });
    let (measured, reference, boots) = (measured?, reference?, boots?);
    for (name, percent, goal) in [
        ("p99 while VMs boot", 99.0, Goal::AtMost(5.0)),
        ("median while VMs boot", 50.0, Goal::None),
    ] {
        let [ours, bare] = [&measured, &reference].map(|run| milliseconds(run.latency.percentile(percent)));
        section.row(name, "ms", ours, Some(bare), goal);
    }
    section.note(format!(
        "latency of {} requests, one each {} ms, while {boots} VMs booted one after another on the same cores",
        measured.latency.len(),
        PACE.as_millis()
    ));
    Ok(())
}

/// The same bytes from a server that does nothing else: this program again, as its own process.
struct BareServer {
    child: Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl BareServer {
    fn start(body: &[u8]) -> Result<Self> {
        let fail = |error| BenchError::io("start the bare HTTP server", error);
        let folder = tempfile::tempdir().map_err(fail)?;
        let file = folder.path().join("body");
        fs::write(&file, body).map_err(fail)?;
        let program = std::env::current_exe().map_err(fail)?;
        let mut child = Command::new(program)
            .arg("bare-http")
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(fail)?;
        let mut line = String::new();
        if let Some(output) = child.stdout.take() {
            BufReader::new(output).read_line(&mut line).map_err(fail)?;
        }
        let mut server = Self {
            child,
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            _folder: folder,
        };
        server.address = line
            .trim()
            .parse()
            .map_err(|_| BenchError::Answer(format!("no address from the bare server: {line:?}")))?;
        pause(Duration::from_millis(20));
        Ok(server)
    }
}

impl Drop for BareServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
