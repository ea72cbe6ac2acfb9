//! A hundred captures of one guest and a hundred forks of one snapshot: what holds for one holds for all.

use std::collections::BTreeSet;

use futures::future::join_all;
use hypeman_tests::{Guest, Server, eventually, have, hypervisors, skip_unless};
use serde_json::{Value, json};

const MANY: usize = 100;

/// Writes a number to the disk, past every cache, and reads it back before and after the next one: a disk that is older
/// or newer than memory is found by the guest itself. Another process writes as much as it can beside it.
const LOCKSTEP: &str = r#"
disk() { dd if=/root/number bs=4096 iflag=direct 2>/dev/null; }
number=1
printf '%4096d' 1 > /root/number; sync
(while :; do head -c 300000 /dev/urandom > /root/load; sync; done) &
while :; do
    before=$(disk); [ $((before)) = $number ] || echo "before: $number in memory, $((before)) on disk" > /dev/shm/apart
    number=$((number+1))
    printf '%4096d' $number | dd of=/root/number bs=4096 oflag=direct conv=notrunc 2>/dev/null
    after=$(disk); [ $((after)) = $number ] || echo "after: $number in memory, $((after)) on disk" > /dev/shm/apart
    echo $number > /dev/shm/number
done
"#;

#[tokio::test]
async fn memory_and_disk_belong_to_one_instant() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let offered = hypervisors();
    for hypervisor in &offered {
        let guest = server.run(&image, json!({"hypervisor": hypervisor})).await;
        guest
            .copy_in("/root/lockstep", LOCKSTEP.as_bytes(), json!({}))
            .await;
        guest
            .output("sh /root/lockstep >/dev/null 2>/dev/shm/complaints </dev/null &")
            .await;
        for round in 0..MANY.div_ceil(offered.len()) {
            // It goes on, and has never seen the two apart.
            let goes_on = guest
                .output(
                    "number() { until n=$(cat /dev/shm/number) && [ -n \"$n\" ]; do :; done; echo $n; }; \
                     first=$(number); while [ $(number) = $first ]; do :; done; \
                     cat /dev/shm/apart /dev/shm/complaints; dmesg | grep -i 'ext4.*error'; echo on",
                )
                .await;
            assert!(
                goes_on.ends_with("on") && goes_on.lines().last() == Some("on"),
                "{goes_on}"
            );
            assert!(!goes_on.contains("in memory"), "round {round}: {goes_on}");
            assert!(
                !goes_on.to_lowercase().contains("error"),
                "round {round}: {goes_on}"
            );
            // By turns a capture of the running guest, and one that puts it to standby.
            if round % 2 == 0 {
                let snapshot = guest.capture().await;
                guest.standby().await;
                guest.go_back(&snapshot, json!({})).await;
                snapshot.delete().await;
            } else {
                guest.standby().await;
                guest.restore().await;
            }
        }
        guest.delete().await;
    }
}

#[tokio::test]
async fn twenty_five_restores_of_one_snapshot_at_once_are_all_alive() {
    const AT_ONCE: usize = 25;
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    for hypervisor in hypervisors() {
        // None of them keeps a processor busy, of which a host has few; what it remembers is in no disk.
        let overrides = json!({"name": "origin", "hypervisor": hypervisor});
        let guest = server.run(&image, overrides).await;
        guest.output("echo remembered > /dev/shm/note").await;
        let snapshot = guest.capture().await;
        guest.delete().await;
        let body = json!({"name": "child", "count": AT_ONCE, "target_state": "Running"});
        let children: Vec<Guest> = snapshot
            .forks(body)
            .await
            .into_iter()
            .map(|(_, child)| child)
            .collect();
        assert_eq!(children.len(), AT_ONCE);
        // One by one: the guests of a small host would only take its processors from each other.
        let mut told = Vec::new();
        for child in &children {
            told.push(child.output("cat /dev/shm/note; hostname").await);
        }
        let told: BTreeSet<&str> = told.iter().map(String::as_str).collect();
        let expected: BTreeSet<String> = (1..=AT_ONCE)
            .map(|number| format!("remembered\nchild-{number}"))
            .collect();
        assert!(
            told.iter().copied().eq(expected.iter().map(String::as_str)),
            "{told:?}"
        );
        assert_eq!(server.vmms().len(), AT_ONCE);
        join_all(children.iter().map(Guest::delete)).await;
        snapshot.delete().await;
        assert_eq!(server.vmms(), vec![]);
    }
}

#[tokio::test]
async fn a_hundred_forks_come_of_one_call_each_with_its_own_outcome() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server
        .run(&image, json!({"name": "origin", "size": "128MB"}))
        .await;
    guest.stop().await;
    let snapshot = guest.take(json!({"kind": "Stopped"})).await;
    snapshot
        .try_fork(&json!({"name": "child", "count": MANY + 1}))
        .await
        .refused(400, "Bad Request");
    // One name is taken: that child fails, and no other for it.
    server
        .create(&image, json!({"name": "child-50", "size": "128MB"}))
        .await;
    let body = json!({"name": "child", "count": MANY, "target_state": "Stopped"});
    let forked = snapshot.try_fork(&body).await.expect(201).json();
    let forks = forked["forks"].as_array().unwrap();
    let failed: Vec<&Value> = forks.iter().filter(|one| !one["error"].is_null()).collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!(failed[0]["name"], "child-50", "{failed:?}");
    assert_eq!(failed[0]["error"]["code"], "conflict", "{failed:?}");
    let ids: BTreeSet<&str> = forks
        .iter()
        .filter_map(|one| one["instance"]["id"].as_str())
        .collect();
    assert_eq!(ids.len(), MANY - 1);
    assert_eq!(server.listed("/instances?state=Stopped").await.len(), MANY);
    for id in ids {
        server.guest(id).delete().await;
    }
    eventually("only the two are left", || async {
        std::fs::read_dir(server.data_directory().join("instances"))
            .unwrap()
            .count()
            == 2
    })
    .await;
}
