//! Many clients at once.

use std::time::{Duration, Instant};

use futures::future::join_all;
use hypeman_tests::{Server, have, skip_unless};
use rustix::process::Signal;
use serde_json::json;

/// The value below which `percent` of the sorted `times` lie.
fn percentile(times: &[Duration], percent: usize) -> Duration {
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_clients_create_list_and_delete_while_a_vmm_hangs() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let hangs = server.run(&image, json!({"name": "hangs"})).await;
    let vmm = server.vmms().remove(0);
    vmm.signal(Signal::STOP);
    let clients = (0..200).map(|number| {
        let (client, image) = (server.client().clone(), image.clone());
        tokio::spawn(async move {
            let name = format!("crowd-{number}");
            let request = json!({
                "name": name, "image": image, "size": "64MB", "overlay_size": "16MB", "vcpus": 1,
                "network": {"enabled": false}, "skip_guest_agent": number % 2 == 0,
            });
            let created = client.post("/instances", &request).await;
            assert!(
                created.status < 500,
                "create: {} {}",
                created.status,
                created.text()
            );
            let mut lists = Vec::new();
            for _ in 0..3 {
                let asked = Instant::now();
                let listed = client.get("/instances").await;
                lists.push(asked.elapsed());
                assert_eq!(listed.status, 200, "list: {}", listed.text());
                let listed = listed.json();
                let mut listed = listed.as_array().unwrap().iter();
                assert!(listed.any(|instance| instance["name"] == "hangs"));
            }
            if created.status == 201 {
                let deleted = client
                    .delete(&format!("/instances/{name}?graceful_shutdown=false"))
                    .await;
                assert_eq!(deleted.status, 204, "delete: {}", deleted.text());
                return (true, lists);
            }
            assert_eq!(
                created.json()["code"],
                "insufficient_resources",
                "{}",
                created.text()
            );
            (false, lists)
        })
    });
    let ended: Vec<(bool, Vec<Duration>)> = join_all(clients).await.into_iter().map(Result::unwrap).collect();
    let created = ended.iter().filter(|(created, _)| *created).count();
    let mut lists: Vec<Duration> = ended.into_iter().flat_map(|(_, lists)| lists).collect();
    lists.sort_unstable();
    println!(
        "{created} of 200 were created, the others refused for want of resources; {} lists took {:?} at the median \
         and {:?} at the 99th percentile",
        lists.len(),
        percentile(&lists, 50),
        percentile(&lists, 99)
    );
    assert!(created > 0);
    // It hung all the time, and can be removed all the same.
    assert!(vmm.lives());
    hangs.delete().await;
    assert!(!vmm.lives());
    assert_eq!(server.client().get("/instances").await.json(), json!([]));
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_commands_that_race_one_wins_and_the_others_are_told() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    let path = format!("/instances/{}", guest.id);
    let stop = format!("{path}/stop");
    let stops = join_all((0..8).map(|_| client.post_empty(&stop))).await;
    let won = stops.iter().filter(|reply| reply.status == 200).count();
    assert_eq!(
        won,
        1,
        "{:?}",
        stops.iter().map(|reply| reply.status).collect::<Vec<_>>()
    );
    assert!(
        stops
            .iter()
            .all(|reply| reply.status == 200 || reply.status == 409)
    );
    guest.wait_for("Stopped").await;

    let body = json!({});
    let start = format!("{path}/start");
    let starts = join_all((0..8).map(|_| client.post(&start, &body))).await;
    assert_eq!(starts.iter().filter(|reply| reply.status == 200).count(), 1);
    guest.wait_for("Running").await;
    assert_eq!(server.vmms().len(), 1);

    let delete = format!("{path}?graceful_shutdown=false");
    let deletes = join_all((0..8).map(|_| client.delete(&delete))).await;
    assert!(deletes.iter().any(|reply| reply.status == 204));
    assert!(
        deletes
            .iter()
            .all(|reply| matches!(reply.status, 204 | 404 | 409))
    );
    assert_eq!(server.vmms(), vec![]);

    let request = json!({"name": "once", "image": image, "size": "64MB", "network": {"enabled": false}});
    let creates = join_all((0..8).map(|_| client.post("/instances", &request))).await;
    assert_eq!(creates.iter().filter(|reply| reply.status == 201).count(), 1);
    for reply in creates.into_iter().filter(|reply| reply.status != 201) {
        reply.refused(400, "name_conflict");
    }
}
