//! What a copy of a running guest is before its workload does anything: somebody else, with the right time.

use hypeman_tests::{Guest, ImageBuilder, LayerBuilder, Server, have, hypervisors, skip_unless};
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
    let client = server.client();
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
        let body = json!({"kind": "Standby", "name": "moment"});
        let path = format!("/instances/{}/snapshots", source.id);
        let snapshot = client.post(&path, &body).await.expect(201).json();
        let captured = now();
        // A clock that stood still would show.
        while now() < captured + 3 {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
        let forked = now();
        let path = format!("/snapshots/{}/fork", snapshot["id"].as_str().unwrap());
        let body = json!({"name": "copy", "count": 3});
        let forks = client.post(&path, &body).await.expect(201).json();

        let mut last_of_source = None;
        let mut times_of_source = None;
        let mut draws = std::collections::BTreeSet::new();
        for fork in forks["forks"].as_array().unwrap() {
            assert!(fork["error"].is_null(), "{fork}");
            let copy = server.guest(fork["instance"]["id"].as_str().unwrap());
            let name = fork["name"].as_str().unwrap();
            let last = notes_as(&copy, "origin").await;
            // Not one note more under its name than at the moment of the capture, in any of them.
            assert_eq!(
                *last_of_source.get_or_insert(last),
                last,
                "{hypervisor} {life} {name}"
            );
            // The last one may have been in the making.
            assert_eq!(
                note(&copy, last - 1).await,
                note(&source, last - 1).await,
                "{hypervisor} {life}"
            );
            // The next one was in the making: it may have read a part of the name, or its random number, before.
            let first = note(&copy, last + 2).await;
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
        client
            .delete(&format!("/snapshots/{}", snapshot["id"].as_str().unwrap()))
            .await
            .expect(204);
        source.delete().await;
    }
}

#[tokio::test]
async fn a_session_that_is_asked_for_during_a_capture_begins_after_it() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    let path = format!("/instances/{}/snapshots", guest.id);
    let asked = async {
        for number in 0..40 {
            assert_eq!(guest.output(&format!("echo {number}")).await, number.to_string());
        }
    };
    let captured = async {
        for _ in 0..8 {
            let body = json!({"kind": "Standby"});
            client.post(&path, &body).await.expect(201);
        }
    };
    tokio::join!(asked, captured);
    guest.delete().await;
}
