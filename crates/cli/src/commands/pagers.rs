//! `hypeman pagers`.

use std::time::Duration;

use clap::Args;

use super::Context;
use crate::document::Document;
use crate::error::CliError;
use crate::output::{self, Table};

/// Arguments of `pagers`.
#[derive(Debug, Args)]
#[command(after_help = "\
A pager is silent when it lives and does not answer: machines that it serves stand still at their next
fault. One that drains was started by another release, and ends with its last machine.

Examples:
  hypeman pagers
  hypeman pagers --format json | jq '.[] | select(.answering | not).pid'
  hypeman pagers --format json | jq '.[].machines[] | {instance_name, faults, populated_bytes}'")]
pub struct PagersArgs {}

/// Shows who serves memory of machines, and how far each machine is.
pub(crate) async fn run(context: &Context) -> Result<(), CliError> {
    let answer = context.client.get(&["pagers"], &[]).await?;
    let list = answer.items();
    context.output.list(list, "version", || {
        let machines = machines(list);
        match machines.is_empty() {
            true => pagers(list),
            false => format!("{}\n{machines}", pagers(list)),
        }
    })
}

fn pagers(list: &[Document]) -> String {
    let mut table = Table::new(&[
        "VERSION",
        "PID",
        "STATE",
        "MACHINES",
        "CACHE",
        "OF",
        "HITS",
        "READ",
        "OLDEST FAULT",
    ]);
    for pager in list {
        let machines = pager.get("machines").map_or(0, |machines| machines.items().len());
        table.row([
            pager.text("version").map(str::to_owned),
            pager.integer("pid").map(|pid| pid.to_string()),
            Some(state(pager).to_owned()),
            Some(machines.to_string()),
            size(pager, "cache.bytes"),
            size(pager, "cache.bound_bytes"),
            hits(pager),
            size(pager, "cache.read_bytes"),
            // None waits: nothing to show.
            count(pager, "oldest_fault_ms")
                .filter(|waited| *waited > 0)
                .map(|waited| time(Duration::from_millis(waited))),
        ]);
    }
    table.render()
}

/// Empty when there are none.
fn machines(list: &[Document]) -> String {
    let mut table = Table::new(&[
        "INSTANCE", "NAME", "PAGER", "STATE", "MEMORY", "OF", "FAULTS", "P50", "P99",
    ]);
    let mut any = false;
    for pager in list {
        for machine in pager.get("machines").map(Document::items).unwrap_or_default() {
            any = true;
            let latency = |path: &str| count(machine, path).map(|waited| time(Duration::from_micros(waited)));
            table.row([
                machine.text("instance_id").map(str::to_owned),
                machine.text("instance_name").map(str::to_owned),
                pager.integer("pid").map(|pid| pid.to_string()),
                machine.text("state").map(str::to_owned),
                size(machine, "populated_bytes"),
                size(machine, "memory_bytes"),
                count(machine, "faults").map(|faults| faults.to_string()),
                latency("fault_latency.p50_us"),
                latency("fault_latency.p99_us"),
            ]);
        }
    }
    match any {
        true => table.render(),
        false => String::new(),
    }
}

fn state(pager: &Document) -> &'static str {
    match (pager.flag("answering"), pager.flag("draining")) {
        (Some(false), _) => "silent",
        (_, Some(true)) => "draining",
        _ => "serving",
    }
}

fn count(document: &Document, path: &str) -> Option<u64> {
    document.integer(path).and_then(|count| u64::try_from(count).ok())
}

fn size(document: &Document, path: &str) -> Option<String> {
    count(document, path).map(output::bytes)
}

/// The share of parts that were in the cache.
fn hits(pager: &Document) -> Option<String> {
    let (hits, misses) = (count(pager, "cache.hits")?, count(pager, "cache.misses")?);
    let all = hits.saturating_add(misses);
    (all > 0).then(|| format!("{:.1} %", hits as f64 * 100.0 / all as f64))
}

/// A wait as people read it: `80 µs`, `1.5 ms`, `12.0 s`.
fn time(waited: Duration) -> String {
    let seconds = waited.as_secs_f64();
    match waited.as_micros() {
        0..1_000 => format!("{} µs", waited.as_micros()),
        1_000..1_000_000 => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{seconds:.1} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list() -> Document {
        Document::parse(
            br#"[{"version":"1.0","pid":812,"draining":false,"answering":true,"oldest_fault_ms":0,
                  "cache":{"bytes":1048576,"bound_bytes":1073741824,"hits":3,"misses":1,"read_bytes":2048},
                  "machines":[{"instance_id":"abc","instance_name":"web","state":"serving",
                               "memory_bytes":4194304,"populated_bytes":1048576,"faults":7,
                               "fault_latency":{"p50_us":80,"p99_us":1500,"max_us":1600}}]},
                 {"version":"0.9","pid":7,"draining":true,"answering":false,
                  "machines":[{"instance_id":"def","state":"failed","reason":"damaged"}]}]"#,
        )
        .unwrap()
    }

    #[test]
    fn pagers_and_their_machines_are_shown_with_what_is_known() {
        let list = list();
        let table = pagers(list.items());
        assert_eq!(
            words(&table),
            [
                "VERSION|PID|STATE|MACHINES|CACHE|OF|HITS|READ|OLDEST FAULT",
                "1.0|812|serving|1|1.0 MiB|1.0 GiB|75.0 %|2.0 KiB|-",
                "0.9|7|silent|1|-|-|-|-|-",
            ]
        );
        let table = machines(list.items());
        assert_eq!(
            words(&table),
            [
                "INSTANCE|NAME|PAGER|STATE|MEMORY|OF|FAULTS|P50|P99",
                "abc|web|812|serving|1.0 MiB|4.0 MiB|7|80 µs|1.5 ms",
                "def|-|7|failed|-|-|-|-|-",
            ]
        );
        assert_eq!(machines(&[]), "");
    }

    /// The cells of each line: two spaces or more lie between them.
    fn words(table: &str) -> Vec<String> {
        let cells = |line: &str| {
            let cells = line.split("  ").map(str::trim).filter(|cell| !cell.is_empty());
            cells.collect::<Vec<_>>().join("|")
        };
        table.lines().map(cells).collect()
    }

    #[test]
    fn waits_use_the_unit_that_fits() {
        let cases = [
            (0, "0 µs"),
            (999, "999 µs"),
            (1_500, "1.5 ms"),
            (12_000_000, "12.0 s"),
        ];
        for (microseconds, expected) in cases {
            assert_eq!(time(Duration::from_micros(microseconds)), expected);
        }
    }
}
