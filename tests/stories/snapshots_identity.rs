//! What a copy of a running guest is before its workload does anything: somebody else, with the right time.

use hypeman_tests::{ExecSession, Guest, ImageBuilder, LayerBuilder, Server, have, hypervisors, skip_unless};
use serde_json::json;

/// Notes as fast as it can under which name it runs and what it draws, and what time it is.
const WORKLOAD: &[u8] = b"#!/bin/sh
while :; do date +%s; done >/dev/shm/dates &
n=0
while [ $n -lt 100000 ]; do
	n=$((n+1))
	read name </proc/sys/kernel/hostname
	read drawn </proc/sys/kernel/random/uuid
	echo \"$n $name $drawn\"
done >/dev/shm/notes
exec sleep 100000
";

fn image() -> Option<ImageBuilder> {
    let workload = LayerBuilder::default()
        .file("bin/workload", 0o755, WORKLOAD)
        .file("etc/inittab", 0o644, b"::respawn:/bin/workload\n");
    Some(ImageBuilder::busybox_init()?.layer(workload))
}

/// One line of the guest's notes.
async fn note(guest: &Guest, number: u64) -> String {
    let line = format!(
        "until test $(wc -l </dev/shm/notes) -ge {number}; do :; done; sed -n {number}p /dev/shm/notes"
    );
    guest.output(&line).await
}

/// How many notes were made under a name.
async fn notes_as(guest: &Guest, name: &str) -> u64 {
    let line = format!("grep -c ' {name} ' /dev/shm/notes; true");
    guest.output(&line).await.parse().unwrap()
}

fn drawn(note: &str) -> &str {
    note.rsplit(' ').next().unwrap()
}

fn now() -> u64 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_secs()
}

#[tokio::test]
async fn a_copy_does_nothing_before_it_knows_who_it_is_and_what_time_it_is() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server
        .push(&image().unwrap().build(), "stories/workload", "1")
        .await;
    // As the image's program, under an init of the image, and as what somebody started by exec.
    let lives = [
        json!(["/bin/workload"]),
        json!(["/sbin/init"]),
        json!(["/bin/sleep", "100000"]),
    ];
    for (hypervisor, life) in hypervisors()
        .into_iter()
        .flat_map(|kind| lives.iter().map(move |life| (kind, life)))
    {
        let overrides = json!({"name": "origin", "hypervisor": hypervisor, "cmd": life});
        let source = server.run(&image, overrides).await;
        if life[0] == "/bin/sleep" {
            source.output("/bin/workload </dev/null >/dev/null 2>&1 &").await;
        }
        note(&source, 20).await;
        let snapshot = source.take(json!({"kind": "Standby", "name": "moment"})).await;
        let captured = now();
        // A clock that stood still would show.
        while now() < captured + 3 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let forked = now();
        let copies = snapshot.forks(json!({"name": "copy", "count": 3})).await;

        let mut last_of_source = None;
        let mut times_of_source = None;
        let mut draws = std::collections::BTreeSet::new();
        for (name, copy) in &copies {
            let last = notes_as(copy, "origin").await;
            // Not one note more under its name than at the moment of the capture, in any of them.
            assert_eq!(
                *last_of_source.get_or_insert(last),
                last,
                "{hypervisor} {life} {name}"
            );
            // The last one may have been in the making.
            assert_eq!(
                note(copy, last - 1).await,
                note(&source, last - 1).await,
                "{hypervisor} {life}"
            );
            // The next one was in the making: it may have read a part of the name, or its random number, before.
            let first = note(copy, last + 2).await;
            assert!(
                first.starts_with(&format!("{} {name} ", last + 2)),
                "{hypervisor} {life}: {first}"
            );
            draws.insert(drawn(&first).to_owned());
            let look = format!(
                "past=0; between=0; while read date; do if [ $date -le {captured} ]; then past=$((past+1)); \
                 elif [ $date -lt {} ]; then between=$((between+1)); fi; done </dev/shm/dates; echo $past $between",
                forked - 1
            );
            let seen = copy.output(&look).await;
            assert!(
                seen.ends_with(" 0"),
                "{hypervisor} {life}: the time between capture and fork is skipped: {seen}"
            );
            assert_eq!(
                *times_of_source.get_or_insert(seen.clone()),
                seen,
                "{hypervisor} {life}: no look at an old clock"
            );
            copy.delete().await;
        }
        let last = last_of_source.unwrap();
        draws.insert(drawn(&note(&source, last + 2).await).to_owned());
        assert_eq!(
            draws.len(),
            4,
            "{hypervisor} {life}: all draw for themselves: {draws:?}"
        );
        snapshot.delete().await;
        source.delete().await;
    }
}

#[tokio::test]
async fn a_session_that_is_asked_for_during_a_capture_begins_after_it() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    let asked = async {
        for number in 0..40 {
            assert_eq!(guest.output(&format!("echo {number}")).await, number.to_string());
        }
    };
    let captured = async {
        for _ in 0..8 {
            guest.capture().await;
        }
    };
    tokio::join!(asked, captured);
    guest.delete().await;
}

/// The number that begins a line of a log.
fn number(line: &str) -> u64 {
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn a_guest_whose_agent_nobody_may_use_stands_by_and_is_forked_like_any_other() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let count = "n=0; while :; do n=$((n+1)); echo \"$n $(hostname)\"; sleep 0.2; done";
    let overrides = json!({"name": "origin", "skip_guest_agent": true, "cmd": ["sh", "-c", count]});
    let guest = server.run(&image, overrides).await;
    let before = number(&guest.logs("follow=true").await.wait_for(" origin").await);

    let body = json!({"name": "copy", "from_running": true});
    let copy = guest.post("/fork", &body).await.expect(201).json();
    assert_eq!(copy["state"], "Running", "{copy}");
    let copy = server.guest(copy["id"].as_str().unwrap());
    // It goes on where its source was, and knows who it is.
    let said = copy.logs("follow=true").await.wait_for(" copy").await;
    assert!(number(&said) >= before, "{said} after {before}");
    let request = json!({"command": ["true"]});
    let (status, body) = ExecSession::start(client, &copy.id, &request).await.unwrap_err();
    assert_eq!((status, &body["code"]), (409, &json!("invalid_state")), "{body}");
    copy.delete().await;

    guest.standby().await;
    let last = number(&guest.logs("tail=1").await.all().await[0]);
    let back = guest.restore().await;
    assert_eq!(back["state"], "Running", "{back}");
    let mut lines = guest.logs("follow=true").await;
    while number(&lines.next().await.unwrap()) <= last {}
    guest.delete().await;
}

/// Nanoseconds since 1970.
fn nanoseconds() -> u128 {
    std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos()
}

/// Fails unless the guest's clock is within 50 ms of the host's, between whose two looks the guest looks at its own.
async fn tells_the_time(guest: &Guest, what: &str) {
    const TOLERANCE: u128 = 50_000_000;
    let before = nanoseconds();
    // Not by the time of a file: those follow the kernel's ticks, which come late on a busy host.
    let said = guest
        .output("adjtimex | grep -o 'time.tv_u*sec: *[0-9]*' | grep -o '[0-9]*$'")
        .await;
    let after = nanoseconds();
    let mut numbers = said.lines().map(|line| line.parse::<u128>().unwrap());
    let clock = numbers.next().unwrap() * 1_000_000_000 + numbers.next().unwrap() * 1_000;
    assert!(
        before <= clock + TOLERANCE && clock <= after + TOLERANCE,
        "{what}: {clock} in the guest, between {before} and {after} on the host"
    );
}

#[tokio::test]
async fn who_goes_on_has_the_time_of_its_host() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    for hypervisor in hypervisors() {
        let overrides = json!({"name": "origin", "hypervisor": hypervisor});
        let guest = server.run(&image, overrides).await;
        let snapshot = guest.capture().await;
        guest.standby().await;
        // A clock that stood still would show.
        let captured = now();
        while now() < captured + 2 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        guest.restore().await;
        tells_the_time(&guest, &format!("restored on {hypervisor}")).await;
        let copy = snapshot.fork(json!({"name": "copy"})).await;
        tells_the_time(&copy, &format!("forked on {hypervisor}")).await;
        copy.delete().await;
        guest.stop().await;
        guest.go_back(&snapshot, json!({})).await;
        tells_the_time(&guest, &format!("gone back on {hypervisor}")).await;
        guest.delete().await;
        snapshot.delete().await;
    }
}
