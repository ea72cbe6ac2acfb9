//! Killed servers, killed VMMs, panics and reboots: what is shown is true, what ran goes on.

use std::time::Instant;

use hypeman_tests::{
    EventStream, Guest, ImageBuilder, Server, have, hypervisors, is_root, offers, skip_unless,
};
use rustix::process::Signal;
use serde_json::json;

async fn running_vms_survive_the_server(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({"hypervisor": hypervisor})).await;
    guest.output("echo kept > /tmp/memory").await;
    let before = server.vmms();
    server.kill();
    assert_eq!(server.vmms(), before, "the VM does not end with the server");
    server.start_again().await;
    guest.wait_for("Running").await;
    assert_eq!(server.vmms(), before, "it is the same VM, not another one");
    assert_eq!(guest.output("cat /tmp/memory").await, "kept");
    // And once more, after a polite end.
    assert!(server.terminate());
    server.start_again().await;
    guest.wait_for("Running").await;
    assert_eq!(guest.output("cat /tmp/memory").await, "kept");
    guest.stop().await;
    assert_eq!(server.vmms(), vec![]);
    guest.start(json!({})).await;
    guest.delete().await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn running_vms_survive_the_server_on_qemu() {
    running_vms_survive_the_server("qemu").await;
}

#[tokio::test]
async fn running_vms_survive_the_server_on_qemu_microvm() {
    running_vms_survive_the_server("qemu-microvm").await;
}

#[tokio::test]
async fn running_vms_survive_the_server_on_cloud_hypervisor() {
    if offers("cloud-hypervisor") {
        running_vms_survive_the_server("cloud-hypervisor").await;
    }
}

#[tokio::test]
async fn running_vms_survive_the_server_on_firecracker() {
    if offers("firecracker") {
        running_vms_survive_the_server("firecracker").await;
    }
}

#[tokio::test]
async fn a_program_that_ends_while_the_server_is_down_is_noticed() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let program = "until test -e /tmp/go; do sleep 1; done; sleep 2; exit 5";
    let guest = server.run(&image, json!({"cmd": ["sh", "-c", program]})).await;
    guest.output("touch /tmp/go").await;
    server.kill();
    hypeman_tests::eventually("the VMM ends on its own", || async { server.vmms().is_empty() }).await;
    server.start_again().await;
    guest.wait_for("Stopped").await;
    guest.start(json!({"cmd": ["sleep", "1000"]})).await;
}

#[tokio::test]
async fn a_killed_vmm_is_told_with_its_reason() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    server.vmms()[0].signal(Signal::KILL);
    guest.wait_for("Stopped").await;
    let instance = guest.inspect().await;
    let reason = format!("{} {}", instance["exit_message"], instance["state_error"]).to_lowercase();
    assert!(reason.contains("kill") || reason.contains("vmm"), "{instance}");
    guest.start(json!({})).await;
    assert_eq!(guest.output("echo back").await, "back");
}

async fn an_agent_that_dies_alone_is_told(hypervisor: &str) {
    skip_unless!(have("busybox"), "needs busybox-static");
    let mut server = Server::start().await;
    let image = ImageBuilder::busybox_init().unwrap().build();
    let image = server.push(&image, "stories/init", "1").await;
    let guest = server.run(&image, json!({"hypervisor": hypervisor})).await;
    assert_eq!(guest.output("cat /proc/1/comm").await, "init");
    // Commands are children of the agent, which is a process like any other beside the image's own init.
    let agent = guest.output("echo $PPID").await;
    assert_ne!(agent, "1");
    // Its last words need a moment to get out.
    let line = format!("echo dying; sleep 1; kill -9 {agent}; sleep 1000");
    let mut session = guest.exec_session(json!({"command": ["sh", "-c", line]})).await;
    session.read_until("dying").await;
    let killed = Instant::now();
    let is_told = |instance: &serde_json::Value| {
        instance["state"] == "Unknown"
            && instance["state_error"]
                .as_str()
                .unwrap()
                .contains("agent has ended")
    };
    guest.wait_until("the state is true", is_told).await;
    println!(
        "told {:?} after the last words, one second of which it lived",
        killed.elapsed()
    );
    assert_eq!(server.vmms().len(), 1, "the machine itself goes on");
    // A server that comes back finds it as it is.
    server.kill();
    server.start_again().await;
    guest.wait_until("the state is true again", is_told).await;
    guest.stop().await;
    guest.start(json!({})).await;
    assert_eq!(guest.output("cat /proc/1/comm").await, "init");
    guest.delete().await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn an_agent_that_dies_alone_is_told_on_qemu() {
    an_agent_that_dies_alone_is_told("qemu").await;
}

#[tokio::test]
async fn an_agent_that_dies_alone_is_told_on_qemu_microvm() {
    an_agent_that_dies_alone_is_told("qemu-microvm").await;
}

#[tokio::test]
async fn an_agent_that_dies_alone_is_told_on_cloud_hypervisor() {
    if offers("cloud-hypervisor") {
        an_agent_that_dies_alone_is_told("cloud-hypervisor").await;
    }
}

#[tokio::test]
async fn an_agent_that_dies_alone_is_told_on_firecracker() {
    if offers("firecracker") {
        an_agent_that_dies_alone_is_told("firecracker").await;
    }
}

#[tokio::test]
async fn a_guest_kernel_that_panics_is_told() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    // Any kernel can be told to panic when memory runs out.
    let line = "echo 2 > /proc/sys/vm/panic_on_oom && echo go && sleep 1 && exec tail /dev/zero";
    let mut session = guest.exec_session(json!({"command": ["sh", "-c", line]})).await;
    session.read_until("go").await;
    // The session stays open: a command ends with the client that asked for it.
    let instance = guest
        .wait_until("the panic shows", |instance| instance["state"] != "Running")
        .await;
    guest
        .wait_until("it settles", |instance| instance["state"] == "Stopped")
        .await;
    let reason = format!("{} {}", instance["exit_message"], instance["state_error"]).to_lowercase();
    assert!(
        reason.contains("panic") || reason.contains("kernel") || reason.contains("crash"),
        "{instance}"
    );
    assert_eq!(server.vmms(), vec![]);
    guest.start(json!({})).await;
}

/// Hears that the instance is in `state`, and when.
async fn heard(events: &mut EventStream, guest: &Guest, state: &str) -> Instant {
    loop {
        let event = events.next().await;
        if event["subject"] == guest.id.as_str() && event["state"] == state {
            return Instant::now();
        }
    }
}

#[tokio::test]
async fn a_killed_vmm_and_a_panic_are_heard_by_those_who_listened_before() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    // Nobody asks again: what follows is heard on this one stream or not at all.
    let mut events = EventStream::open(server.client(), None).await;
    let guest = server.run(&image, json!({})).await;
    heard(&mut events, &guest, "Running").await;
    let killed = Instant::now();
    server.vmms()[0].signal(Signal::KILL);
    let told = heard(&mut events, &guest, "Stopped").await;
    println!("a killed VMM was told after {:?}", told - killed);

    guest.start(json!({})).await;
    heard(&mut events, &guest, "Running").await;
    let mut console = guest.logs("source=vmm&follow=true").await;
    let line = "echo 2 > /proc/sys/vm/panic_on_oom && echo go && exec tail /dev/zero";
    let mut session = guest.exec_session(json!({"command": ["sh", "-c", line]})).await;
    session.read_until("go").await;
    let panicked = async {
        console.wait_for("Kernel panic").await;
        Instant::now()
    };
    let (panicked, told) = tokio::join!(panicked, heard(&mut events, &guest, "Stopped"));
    println!(
        "a panic was told {:?} after its line on the console",
        told.saturating_duration_since(panicked)
    );
}

#[tokio::test]
async fn a_vmm_that_hangs_is_shown_as_unknown_holds_up_nobody_and_can_be_stopped() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let client = server.client();
    let image = server.busybox().await;
    let other = server.run(&image, json!({"name": "other"})).await;
    for hypervisor in hypervisors() {
        let before = server.vmms();
        let guest = server
            .run(&image, json!({"name": "hangs", "hypervisor": hypervisor}))
            .await;
        let mut vmms = server.vmms();
        vmms.retain(|vmm| !before.contains(vmm));
        let vmm = vmms.remove(0);
        let is_told = |instance: &serde_json::Value| {
            instance["state"] == "Unknown"
                && instance["state_error"]
                    .as_str()
                    .is_some_and(|reason| reason.starts_with("the VMM did not answer"))
        };
        vmm.signal(Signal::STOP);
        guest
            .wait_until("its silence is told with the reason", is_told)
            .await;
        for _ in 0..20 {
            let listed = client.get("/instances").await.expect(200).json();
            assert_eq!(listed.as_array().unwrap().len(), 2);
            assert_eq!(client.get("/instances/hangs").await.status, 200);
            assert_eq!(client.get("/instances/hangs/stats").await.status, 200);
        }
        assert_eq!(other.output("echo fine").await, "fine");
        // It may come to itself.
        vmm.signal(Signal::CONT);
        guest
            .wait_until("it runs again", |instance| instance["state"] == "Running")
            .await;
        vmm.signal(Signal::STOP);
        guest.wait_until("its silence is told again", is_told).await;
        guest.stop().await;
        assert!(!vmm.lives(), "a hanging {hypervisor} is ended by stop");
        guest.delete().await;
    }
    let guest = server.run(&image, json!({"name": "hangs"})).await;
    let mut vmms = server.vmms();
    vmms.retain(|vmm| vmm.command_line.contains(&guest.id));
    vmms[0].signal(Signal::STOP);
    guest.delete().await;
    assert!(!vmms[0].lives(), "a hanging VMM is killed by delete");
    assert_eq!(other.output("echo fine").await, "fine");
}

#[tokio::test]
async fn after_a_reboot_nothing_is_taken_for_running() {
    skip_unless!(
        have("busybox") && is_root() && have("unshare"),
        "needs root, unshare and busybox-static"
    );
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let guest = server.run(&image, json!({})).await;
    // A host that lost power: no process is left, sockets and files are stale, and the boot id is another one.
    server.kill();
    for vmm in server.vmms() {
        vmm.signal(Signal::KILL);
    }
    let boot_id = server.scratch().join("boot_id");
    std::fs::write(&boot_id, "11111111-2222-3333-4444-555555555555\n").unwrap();
    let script = format!(
        "mount --bind {} /proc/sys/kernel/random/boot_id && exec \"$@\"",
        boot_id.display()
    );
    server.set_wrapper(&[
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        &script,
        "sh",
    ]);
    server.start_again().await;
    guest.wait_for("Stopped").await;
    guest.start(json!({})).await;
    assert_eq!(guest.output("echo up again").await, "up again");
    // With the same data but yet another boot, the VMM that lives is not believed to be ours by its number alone.
    guest.delete().await;
    assert_eq!(server.vmms(), vec![]);
}

#[tokio::test]
async fn a_guest_cannot_forge_its_state() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let server = Server::start().await;
    let image = server.busybox().await;
    let program = "for w in HYPEMAN-EXIT HYPEMAN-PROGRAM-START HYPEMAN-AGENT-READY; do echo \"$w code=0\"; echo \"$w code=0\" > /dev/console; done; sleep 1000";
    let guest = server.run(&image, json!({"cmd": ["sh", "-c", program]})).await;
    guest
        .logs("follow=true")
        .await
        .wait_for("HYPEMAN-AGENT-READY")
        .await;
    assert_eq!(guest.output("echo still running").await, "still running");
    assert_eq!(guest.inspect().await["state"], "Running");
    // What the guest writes to the host's channel past its agent is noise, not messages.
    guest.shell("for port in /dev/vport* /dev/hvc*; do (head -c 100000 /dev/urandom > $port) 2>/dev/null; done; true").await;
    assert_eq!(server.client().get("/instances").await.status, 200);
    guest.delete().await;
    assert_eq!(server.vmms(), vec![]);
}
