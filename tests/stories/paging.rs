//! Memory that comes page by page: who serves it outlives the server, and is missed aloud when it is silent or gone.

use hypeman_tests::{Server, ServerOptions, eventually, have, pagers_of, skip_unless, told_on};
use rustix::process::Signal;
use serde_json::json;

#[tokio::test]
async fn a_pager_outlives_the_server_and_its_silence_and_its_end_are_told() {
    skip_unless!(have("busybox"), "needs busybox-static");
    if !told_on("firecracker") {
        return;
    }
    let mut server = Server::start_with(ServerOptions {
        settings: vec![("hypervisor.firecracker.pager", json!("always"))],
        ..ServerOptions::default()
    })
    .await;
    let image = server.busybox().await;
    let guest = server
        .counting(&image, json!({"hypervisor": "firecracker"}))
        .await;
    guest.standby().await;
    guest.restore().await;
    let pagers = pagers_of(server.data_directory());
    skip_unless!(!pagers.is_empty(), "needs userfaultfd");
    assert_eq!(pagers.len(), 1, "one for all machines");
    let counted = guest.goes_on(0).await;
    let told = server.client().get("/pagers").await.expect(200).json();
    assert_eq!(told[0]["pid"], pagers[0].pid, "{told}");
    assert_eq!(told[0]["answering"], true, "{told}");
    let machine = &told[0]["machines"][0];
    assert_eq!(machine["instance_id"], guest.id, "{told}");
    assert!(machine["faults"].as_u64() > Some(0), "{told}");
    let populated = machine["populated_bytes"].as_u64();
    assert!(populated > Some(0), "{told}");
    assert!(populated < machine["memory_bytes"].as_u64(), "{told}");

    server.kill();
    server.start_again().await;
    guest.wait_for("Running").await;
    assert_eq!(pagers_of(server.data_directory()), pagers, "it is the same one");
    let counted = guest.goes_on(counted).await;

    pagers[0].signal(Signal::STOP);
    guest
        .wait_until("its silence is told with the reason", |instance| {
            instance["state"] == "Unknown"
                && instance["state_error"]
                    .as_str()
                    .is_some_and(|reason| reason.starts_with("the VMM"))
        })
        .await;
    let told = server.client().get("/pagers").await.expect(200).json();
    assert_eq!(
        (&told[0]["answering"], told[0].get("cache")),
        (&json!(false), None),
        "{told}"
    );
    assert_eq!(told[0]["machines"][0]["instance_id"], guest.id, "{told}");
    let directory = server.data_directory().to_str().unwrap();
    let doctor = server
        .command_line()
        .run(&["doctor", "--data-dir", directory])
        .await;
    assert!(doctor.stdout.contains("(does not answer)"), "{}", doctor.stdout);
    pagers[0].signal(Signal::CONT);
    guest
        .wait_until("it runs again", |instance| instance["state"] == "Running")
        .await;
    guest.goes_on(counted).await;

    pagers[0].signal(Signal::KILL);
    let ended = guest
        .wait_until("its end is told", |instance| instance["state"] == "Stopped")
        .await;
    let reason = ended["exit_message"].as_str().unwrap();
    assert!(reason.contains("memory is not served any more"), "{ended}");
    assert_eq!(server.vmms(), vec![]);
    guest.start(json!({})).await;
    assert_eq!(guest.output("cat /root/note").await, "before");
    guest.delete().await;
}

#[tokio::test]
async fn where_no_pager_can_be_started_memory_is_expanded_unless_it_must_be_served() {
    skip_unless!(have("busybox"), "needs busybox-static");
    if !told_on("firecracker") {
        return;
    }
    let mut server = Server::start_with(ServerOptions {
        settings: vec![("hypervisor.firecracker.pager_threshold", json!("0"))],
        ..ServerOptions::default()
    })
    .await;
    let refused = server.log().contains("page faults cannot be served");
    skip_unless!(!refused, "needs userfaultfd");
    let image = server.busybox().await;
    let guest = server
        .counting(&image, json!({"hypervisor": "firecracker"}))
        .await;
    // A pager that cannot have its log is not started.
    let log = server.data_directory().join("system/pager.log");
    std::fs::create_dir(&log).unwrap();
    let compressed = json!({"compression": {"enabled": true, "algorithm": "lz4"}, "compression_delay": "0s"});
    let memory = server.data_directory().join("memory");
    let only_frames = || async {
        let images: Vec<_> = std::fs::read_dir(&memory).unwrap().flatten().collect();
        let with = |name: &str| images.iter().any(|image| image.path().join(name).exists());
        with("frames.index") && !with("memory.raw")
    };
    guest.post("/standby", &compressed).await.expect(200);
    eventually("only frames are left", only_frames).await;
    guest.restore().await;
    guest.goes_on(0).await;
    assert!(
        server.log().contains("no pager serves this memory"),
        "{}",
        server.log()
    );
    assert_eq!(pagers_of(server.data_directory()), vec![]);

    guest.post("/standby", &compressed).await.expect(200);
    eventually("only frames are left", only_frames).await;
    assert!(server.terminate());
    let always = ("HYPERVISOR__FIRECRACKER__PAGER".to_owned(), "always".to_owned());
    server.start_again_with(vec![always]).await;
    let message = guest.post_empty("/restore").await.refused(409, "restore_failed");
    assert!(message.contains("the pager cannot be started"), "{message}");
    assert_eq!(guest.inspect().await["state"], "Standby");
    assert_eq!(server.vmms(), vec![]);

    std::fs::remove_dir(&log).unwrap();
    guest.restore().await;
    assert_eq!(pagers_of(server.data_directory()).len(), 1);
    guest.goes_on(0).await;
    guest.delete().await;
}
