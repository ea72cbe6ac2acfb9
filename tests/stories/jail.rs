//! VMMs are confined: each by itself, told truthfully, and nothing that works without a jail fails in it.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;

use hypeman_tests::{Guest, Server, ServerOptions, eventually, have, hypervisors, is_root, skip_unless};
use serde_json::{Value, json};

fn server_with(settings: Vec<(&'static str, Value)>) -> ServerOptions {
    ServerOptions {
        settings,
        ..ServerOptions::default()
    }
}

fn items(jail: &Value, list: &str) -> BTreeSet<String> {
    let items = jail[list].as_array().unwrap().iter();
    let names = items.map(|item| item["item"].as_str().or(item.as_str()).unwrap().to_owned());
    names.collect()
}

/// What the kernel says of a process, by the names of its lines.
fn status(pid: u32, name: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    line_of(&text, name).to_owned()
}

fn line_of<'a>(status: &'a str, name: &str) -> &'a str {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name}:")));
    line.unwrap_or_else(|| panic!("{name}")).trim()
}

/// Compares what the API tells of one VMM with what the kernel does.
fn holds(pid: u32, jail: &Value) {
    let active = items(jail, "active");
    let user = jail["user"].as_i64().unwrap();
    assert_eq!(
        i64::from(std::fs::metadata(format!("/proc/{pid}")).unwrap().uid()),
        user
    );
    for (item, name) in [
        ("mount-namespace", "mnt"),
        ("user-namespace", "user"),
        ("pid-namespace", "pid"),
        ("network-namespace", "net"),
        ("ipc-namespace", "ipc"),
        ("uts-namespace", "uts"),
    ] {
        let of = |process: &str| std::fs::read_link(format!("/proc/{process}/ns/{name}")).unwrap();
        assert_eq!(
            active.contains(item),
            of(&pid.to_string()) != of("self"),
            "{item}"
        );
    }
    for name in ["CapEff", "CapPrm", "CapBnd"] {
        assert_eq!(status(pid, name), "0000000000000000", "{name}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), "2");
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let limit = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[name.len()..].split_whitespace().next().unwrap().to_owned()
    };
    assert_eq!(limit("Max core file size"), "0");
    assert_eq!(limit("Max open files"), "4096");
    assert_ne!(limit("Max file size"), "unlimited");
    assert_ne!(limit("Max processes"), "unlimited");
}

/// What each guest of [`every_vmm_is_confined_and_inspect_tells_how`] has, as [`is_limited`] knows.
fn of_known_size(hypervisor: &str) -> Value {
    json!({"hypervisor": hypervisor, "name": hypervisor, "size": "128MB", "vcpus": 1, "disk_io_bps": "1GB/s"})
}

/// Compares the limits that the API tells of with what the kernel holds the VMM to.
fn is_limited(pid: u32, jail: &Value) {
    let (active, missing) = (items(jail, "active"), items(jail, "missing"));
    let group = format!("hypeman/vm-{}", jail["user"]);
    let held = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{group}/{file}"));
    let member = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    // The guest's memory and 2 GiB, its processor and one more, two disks that may burst to four times their rate.
    let memory = (128_u64 << 20) + (2 << 30);
    let traffic = 2 * 4 * (1_u64 << 30);
    for (item, file, value) in [
        ("processes", "pids.max", "1024".to_owned()),
        ("cpu", "cpu.max", "200000 100000".to_owned()),
        ("memory", "memory.max", memory.to_string()),
        (
            "io",
            "io.max",
            format!("rbps={traffic} wbps={traffic} riops=max wiops=max"),
        ),
    ] {
        assert!(active.contains(item) != missing.contains(item), "{item}: {jail}");
        // Processes are limited without a controller, too.
        if !active.contains(item) || (item == "processes" && held(file).is_err()) {
            continue;
        }
        assert!(member.lines().any(|line| line.ends_with(&group)), "{member}");
        let held = held(file).unwrap();
        let line = match item {
            // The disk is named before.
            "io" => held.trim_end().split_once(' ').unwrap().1,
            _ => held.trim_end(),
        };
        assert_eq!(line, value, "{file}");
    }
}

/// The VMM filters its own system calls beside the jail, in each thread that runs guest code or hears commands.
fn filters_itself(pid: u32, hypervisor: &str, instance: &Value) {
    let told = items(&instance["jail"], "active").contains("seccomp");
    // A QEMU may be built without; then that is told, and shown below.
    assert!(
        told || hypervisor.starts_with("qemu"),
        "{hypervisor}: {}",
        instance["jail"]
    );
    if !told {
        return;
    }
    // The jail's own filter; where a TAP is opened by its name, one more that asks the server about that.
    let by_name = !hypervisor.starts_with("qemu");
    let on_a_network = instance["network"]["enabled"] == true
        && items(&instance["jail"], "active").contains("network-namespace");
    let of_the_jail = 1 + u32::from(by_name && on_a_network);
    let mut seen = BTreeSet::new();
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
        let task = task.unwrap().file_name().into_string().unwrap();
        // A worker of QEMU may have ended.
        let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/task/{task}/status")) else {
            continue;
        };
        let line = |name| line_of(&text, name);
        let name = line("Name");
        assert_eq!(line("Seccomp"), "2", "{hypervisor}: {name}");
        let role = match hypervisor {
            "firecracker" if task == pid.to_string() => "first",
            "firecracker" => name.split(' ').next().unwrap(),
            "cloud-hypervisor" => name.trim_end_matches(|sign: char| sign.is_ascii_digit()),
            // All of it is filtered, but for what the kernel lends it.
            _ if ["vhost-", "kvm-", "iou-"]
                .iter()
                .any(|kernel| name.starts_with(kernel)) =>
            {
                "kernel"
            }
            _ => "qemu",
        };
        let matters = ["first", "fc_vcpu", "fc_api", "vcpu", "vmm", "http-server", "qemu"];
        if matters.contains(&role) {
            let filters: u32 = line("Seccomp_filters").parse().unwrap();
            assert!(filters > of_the_jail, "{hypervisor}: {name}: {filters}");
            seen.insert(role.to_owned());
        }
    }
    let expected: &[&str] = match hypervisor {
        "firecracker" => &["fc_api", "fc_vcpu", "first"],
        "cloud-hypervisor" => &["http-server", "vcpu", "vmm"],
        _ => &["qemu"],
    };
    assert_eq!(
        seen.iter().map(String::as_str).collect::<Vec<_>>(),
        expected,
        "{hypervisor}"
    );
}

async fn vmm_of(server: &Server, guest: &Guest) -> (u32, Value) {
    let instance = guest.inspect().await;
    let id = instance["id"].as_str().unwrap().to_owned();
    let vmms = server.vmms();
    let vmm = vmms.iter().find(|vmm| vmm.command_line.contains(&id)).unwrap();
    (vmm.pid, instance["jail"].clone())
}

#[tokio::test]
async fn every_vmm_is_confined_and_inspect_tells_how() {
    skip_unless!(have("busybox"), "needs busybox-static");
    skip_unless!(is_root(), "needs root");
    let mut server = Server::start().await;
    let image = server.busybox().await;
    let mut users = BTreeSet::new();
    let mut guests = Vec::new();
    for hypervisor in hypervisors() {
        let guest = server.run(&image, of_known_size(hypervisor)).await;
        let (pid, jail) = vmm_of(&server, &guest).await;
        assert_eq!(jail["enabled"], true, "{jail}");
        holds(pid, &jail);
        is_limited(pid, &jail);
        filters_itself(pid, hypervisor, &guest.inspect().await);
        assert!(users.insert(jail["user"].as_i64().unwrap()), "{jail}");
        // Nothing of the data directory is in sight but what it boots from; where a VMM opens its disks by name, those.
        let seen = format!("/proc/{pid}/root{}", server.data_directory().display());
        let names_in = |path: &str| -> BTreeSet<String> {
            let entries = std::fs::read_dir(path).unwrap();
            entries
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect()
        };
        let names = names_in(&seen);
        let by_name = ["cloud-hypervisor", "firecracker"].contains(&hypervisor);
        let expected: &[&str] = match by_name {
            true => &["images", "instances", "run", "system"],
            false => &["run", "system"],
        };
        assert!(
            names.iter().all(|name| expected.contains(&name.as_str())),
            "{names:?}"
        );
        if by_name {
            assert_eq!(names_in(&format!("{seen}/instances")), [guest.id.clone()].into());
        }
        assert!(!std::path::Path::new(&format!("/proc/{pid}/root/etc/shadow")).exists());
        guests.push((guest, pid, jail));
    }
    for (item, reason) in guests
        .iter()
        .flat_map(|(_, _, jail)| jail["missing"].as_array().unwrap())
        .map(|missing| (missing["item"].to_string(), missing["reason"].to_string()))
        .collect::<BTreeSet<_>>()
    {
        eprintln!("SKIPPED: the jail of this host lacks {item}: {reason}");
    }

    // A server that starts again still knows, and its VMMs are the same.
    server.kill();
    server.start_again().await;
    for (guest, pid, jail) in &guests {
        guest.wait_for("Running").await;
        let again = vmm_of(&server, guest).await;
        assert_eq!((again.0, &again.1), (*pid, jail));
        assert_eq!(guest.output("echo fine").await, "fine");
    }

    // So are those that are restored.
    for (guest, ..) in &guests {
        guest.standby().await;
        assert_eq!(guest.inspect().await["jail"], Value::Null);
        eventually("its VMM ends", || async {
            let vmms = server.vmms();
            !vmms.iter().any(|vmm| vmm.command_line.contains(&guest.id))
        })
        .await;
        guest.restore().await;
        let (pid, jail) = vmm_of(&server, guest).await;
        holds(pid, &jail);
        is_limited(pid, &jail);
        let instance = guest.inspect().await;
        filters_itself(pid, instance["hypervisor"].as_str().unwrap(), &instance);
        assert_eq!(guest.output("echo back").await, "back");

        let shown = server.command_line().run(&["inspect", &guest.id]).await.ok();
        let line = shown.lines().find(|line| line.starts_with("Jail")).unwrap();
        assert!(line.contains(&format!("user {}", jail["user"])), "{line}");
    }
    let doctor = server.command_line().run(&["doctor"]).await;
    let line = doctor
        .stdout
        .lines()
        .find(|line| line.contains("  jail "))
        .unwrap();
    assert!(line.contains("mount-namespace"), "{line}");
}

#[tokio::test]
async fn a_jail_can_be_off_and_what_is_required_is_complete_or_refused() {
    skip_unless!(have("busybox"), "needs busybox-static");
    let off = Server::start_with(server_with(vec![("hypervisor.jail", json!("off"))])).await;
    let image = off.busybox().await;
    let guest = off.run(&image, json!({})).await;
    let (pid, jail) = vmm_of(&off, &guest).await;
    assert_eq!(jail["enabled"], false, "{jail}");
    let own = std::fs::read_link("/proc/self/ns/mnt").unwrap();
    assert_eq!(std::fs::read_link(format!("/proc/{pid}/ns/mnt")).unwrap(), own);
    assert_eq!(guest.output("echo fine").await, "fine");

    let settings = vec![("hypervisor.jail", json!("required"))];
    let required = Server::start_with(server_with(settings)).await;
    let image = required.busybox().await;
    let body = json!({"name": "strict", "image": image, "size": "128MB", "network": {"enabled": false}});
    let created = required.client().post("/instances", &body).await;
    if created.status == 201 {
        assert_eq!(created.json()["jail"]["missing"], json!([]), "{}", created.json());
    } else {
        let text = created.json().to_string();
        assert!(text.contains("hypervisor.jail is required"), "{text}");
        assert_eq!(required.vmms(), vec![]);
    }
}
