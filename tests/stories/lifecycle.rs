//! From an image to a VM, through all its calls, to nothing.

use hypeman_tests::{ExecSession, ImageBuilder, Server, have, offers, skip_unless};
use serde_json::{Value, json};

fn paths_with(directory: &std::path::Path, needle: &str) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains(needle) {
                found.push(entry.path());
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(entry.path());
            }
        }
    }
    found
}

async fn an_image_becomes_a_vm_and_leaves_nothing(hypervisor: &str) {
    skip_unless!(
        have("qemu-system-x86_64") && have("busybox"),
        "needs qemu-system-x86_64 and busybox-static"
    );
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;

    let request = json!({
        "name": "first", "image": image, "size": "128MB", "overlay_size": "256MB", "vcpus": 1,
        "hypervisor": hypervisor, "network": {"enabled": false}, "env": {"GREETING": "hello"},
        "tags": {"team": "stories"},
    });
    let created = client.post("/instances", &request).await.expect(201).json();
    let id = created["id"].as_str().unwrap();
    assert_eq!(id.len(), 24, "{id}");
    assert!(id.starts_with(|first: char| first.is_ascii_lowercase()), "{id}");
    assert!(
        id.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit()),
        "{id}"
    );
    assert_eq!(created["name"], "first");
    assert_eq!(created["hypervisor"], hypervisor);
    assert_eq!(created["size"], "128.0 MB");
    assert_eq!(created["vcpus"], 1);
    assert_eq!(created["network"]["enabled"], false);
    assert_eq!(created["env"]["GREETING"], "hello");
    assert_eq!(created["tags"]["team"], "stories");
    assert!(created["expires_at"].is_null() && created.as_object().unwrap().contains_key("expires_at"));

    let wait = client
        .get("/instances/first/wait?state=Running&timeout=5m")
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&wait["state"], &wait["timed_out"]),
        (&json!("Running"), &json!(false)),
        "{wait}"
    );
    assert_eq!(server.vmms().len(), 1);
    let running = client.get(&format!("/instances/{id}")).await.expect(200).json();
    assert_eq!(running["current_phase"], "running");
    assert!(
        running["phase_durations_ms"]["initializing"].is_number(),
        "{running}"
    );
    assert!(running["started_at"].is_string());

    let guest = server.guest(id);
    assert_eq!(
        guest
            .output("echo $GREETING; cat /proc/1/comm >/dev/null && hostname")
            .await,
        "hello\nfirst"
    );
    guest.output("echo kept > /root/note && sync").await;
    guest.output("touch /bin/new && rm /bin/new").await;

    let stats = client
        .get(&format!("/instances/{id}/stats"))
        .await
        .expect(200)
        .json();
    assert_eq!(stats["allocated_memory_bytes"], 128 << 20);
    assert!(stats["memory_rss_bytes"].as_u64().unwrap() > 0 && stats["cpu_seconds"].as_f64().unwrap() > 0.0);
    let resources = client.get("/resources").await.expect(200).json();
    assert_eq!(resources["allocations"][0]["instance_id"], id, "{resources}");
    let stat = client
        .get(&format!("/instances/{id}/stat?path=/root/note"))
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&stat["exists"], &stat["is_file"], &stat["size"]),
        (&json!(true), &json!(true), &json!(5)),
        "{stat}"
    );
    let absent = client
        .get(&format!("/instances/{id}/stat?path=/absent"))
        .await
        .expect(200)
        .json();
    assert_eq!(absent["exists"], false);

    let again = client.post(&format!("/instances/{id}/start"), &json!({})).await;
    assert_eq!(again.header("x-should-retry"), "false");
    again.refused(409, "invalid_state");

    guest.stop().await;
    assert_eq!(server.vmms(), vec![]);
    let stopped = guest.inspect().await;
    assert!(stopped["stopped_at"].is_string(), "{stopped}");
    client
        .post_empty(&format!("/instances/{id}/stop"))
        .await
        .refused(409, "invalid_state");
    client
        .get(&format!("/instances/{id}/stat?path=/"))
        .await
        .refused(409, "invalid_state");
    let resources = client.get("/resources").await.expect(200).json();
    assert_eq!(
        resources["cpu"]["allocated"], 0,
        "a stopped instance holds no CPU: {resources}"
    );

    guest.start(json!({})).await;
    assert_eq!(guest.output("cat /root/note").await, "kept");

    client.delete(&format!("/instances/{id}")).await.expect(204);
    client
        .get(&format!("/instances/{id}"))
        .await
        .refused(404, "not_found");
    client
        .delete(&format!("/instances/{id}"))
        .await
        .refused(404, "not_found");
    assert_eq!(server.vmms(), vec![]);
    assert_eq!(
        paths_with(server.data_directory(), id),
        Vec::<std::path::PathBuf>::new()
    );
    server.delete_image(&image).await;
    assert_eq!(client.get("/images").await.json(), json!([]));
}

#[tokio::test]
async fn an_image_becomes_a_vm_and_leaves_nothing_on_qemu() {
    an_image_becomes_a_vm_and_leaves_nothing("qemu").await;
}

#[tokio::test]
async fn an_image_becomes_a_vm_and_leaves_nothing_on_qemu_microvm() {
    an_image_becomes_a_vm_and_leaves_nothing("qemu-microvm").await;
}

#[tokio::test]
async fn an_image_becomes_a_vm_and_leaves_nothing_on_cloud_hypervisor() {
    if offers("cloud-hypervisor") {
        an_image_becomes_a_vm_and_leaves_nothing("cloud-hypervisor").await;
    }
}

#[tokio::test]
async fn an_image_becomes_a_vm_and_leaves_nothing_on_firecracker() {
    if offers("firecracker") {
        an_image_becomes_a_vm_and_leaves_nothing("firecracker").await;
    }
}

#[tokio::test]
async fn start_takes_a_new_command_and_keeps_it() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server
        .run(&image, json!({"cmd": ["sh", "-c", "echo one; sleep 1000"]}))
        .await;
    guest.logs("follow=true").await.wait_for("one").await;
    guest.stop().await;
    guest
        .start(json!({"cmd": ["sh", "-c", "echo two; sleep 1000"]}))
        .await;
    guest.logs("follow=true").await.wait_for("two").await;
    guest.stop().await;
    guest.start(json!({})).await;
    let lines = guest.logs("tail=1000&follow=true").await;
    count_until(lines, "two", 2).await;
    // A body is required, if only an empty one.
    guest.stop().await;
    let status = server
        .client()
        .post_empty(&format!("/instances/{}/start", guest.id))
        .await
        .status;
    assert!((400..500).contains(&status), "{status}");
}

async fn count_until(mut log: hypeman_tests::LogStream, text: &str, times: usize) {
    for _ in 0..times {
        log.wait_for(text).await;
    }
}

#[tokio::test]
async fn stop_lets_a_program_finish_and_ends_one_that_will_not() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let polite = "trap 'echo said goodbye; exit 3' TERM; echo ready; while :; do sleep 1 & wait $!; done";
    let guest = server
        .run(&image, json!({"name": "polite", "cmd": ["sh", "-c", polite]}))
        .await;
    guest.logs("follow=true").await.wait_for("ready").await;
    guest.stop().await;
    assert!(
        guest
            .logs("tail=100")
            .await
            .all()
            .await
            .iter()
            .any(|line| line.contains("said goodbye"))
    );

    let stubborn = "trap '' TERM; echo ready; while :; do sleep 1; done";
    let guest = server
        .run(&image, json!({"name": "stubborn", "cmd": ["sh", "-c", stubborn]}))
        .await;
    guest.logs("follow=true").await.wait_for("ready").await;
    guest.stop().await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn wait_returns_early_when_the_instance_settles_elsewhere() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let guest = server.create(&image, json!({"cmd": ["true"]})).await;
    guest.wait_for("Stopped").await;
    let path = format!("/instances/{}/wait", guest.id);
    let early = client
        .get(&format!("{path}?state=Running&timeout=5m"))
        .await
        .expect(200)
        .json();
    assert_eq!(
        (&early["state"], &early["timed_out"]),
        (&json!("Stopped"), &json!(false))
    );
    client
        .get(&format!("{path}?state=Unknown"))
        .await
        .refused(400, "invalid_state");
    assert_eq!(client.get(&format!("{path}?state=Nonsense")).await.status, 400);
    client
        .get(&format!("{path}?state=Running&timeout=soon"))
        .await
        .refused(400, "invalid_timeout");

    let guest = server.run(&image, json!({"name": "other"})).await;
    let late = client
        .get(&format!(
            "/instances/{}/wait?state=Stopped&timeout=100ms",
            guest.id
        ))
        .await
        .json();
    assert_eq!(
        (&late["state"], &late["timed_out"]),
        (&json!("Running"), &json!(true))
    );
    // Deleted under the waiter's hands.
    let path = format!("/instances/{}/wait?state=Stopped&timeout=5m", guest.id);
    let (waiter, ()) = tokio::join!(client.get(&path), guest.delete(),);
    assert!(
        waiter.status == 404 || waiter.json()["state"] == "Stopped",
        "{}",
        waiter.text()
    );
}

#[tokio::test]
async fn without_the_agent_an_instance_runs_but_serves_no_exec() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({"skip_guest_agent": true})).await;
    let request = json!({"command": ["true"]});
    let (status, body) = ExecSession::start(server.client(), &guest.id, &request)
        .await
        .unwrap_err();
    assert_eq!((status, &body["code"]), (409, &json!("invalid_state")), "{body}");
    guest.delete().await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn an_image_that_brings_its_own_init_gets_it_as_process_one() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = ImageBuilder::busybox_init().unwrap().build();
    let image = server.push(&image, "stories/init", "1").await;
    let guest = server.run(&image, json!({})).await;
    assert_eq!(guest.output("cat /proc/1/comm").await, "init");
    let _: Value = guest.wait_until("init did its work", |_| true).await;
    guest
        .output("until test -e /tmp/up; do sleep 1; done; cat /tmp/up")
        .await;
    guest.stop().await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn an_init_that_powers_off_by_itself_is_no_accident() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = ImageBuilder::busybox_init().unwrap().build();
    let image = server.push(&image, "stories/init", "1").await;
    let guest = server.run(&image, json!({})).await;
    guest.output("until test -e /tmp/up; do sleep 1; done").await;
    // It kills everything, the agent included, a good second before the machine is off.
    guest.output("poweroff").await;
    let mut seen = Vec::new();
    loop {
        let state = guest.inspect().await["state"].as_str().unwrap().to_owned();
        if seen.last() != Some(&state) {
            seen.push(state.clone());
        }
        if state == "Stopped" {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    assert!(!seen.contains(&"Unknown".to_owned()), "{seen:?}");
    assert_eq!(guest.inspect().await["exit_message"], "the guest powered off");
    assert_eq!(server.vmms(), vec![]);
}
