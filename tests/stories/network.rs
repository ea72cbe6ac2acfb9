//! Networking as far as it goes: refused with the fix, or attached.

use std::os::fd::AsFd;
use std::process::Command;

use hypeman_tests::{Server, ServerOptions, have, is_root, or_skip, skip_unless};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::json;

/// A network namespace with a loopback and an uplink, deleted when dropped.
pub(crate) struct Namespace(String);

impl Namespace {
    /// Makes one and moves this thread into it: its sockets and child processes are inside from now on.
    pub(crate) fn enter() -> Option<Self> {
        let name = format!("hm-{}", std::process::id());
        let run = |words: &str| {
            Command::new("ip")
                .args(words.split(' '))
                .output()
                .is_ok_and(|output| output.status.success())
        };
        let namespace = run(&format!("netns add {name}")).then(|| Self(name.clone()))?;
        let ready = run(&format!("-n {name} link set lo up"))
            && run(&format!("-n {name} link add up0 type veth peer name up1"))
            && run(&format!("-n {name} address add 192.0.2.2/24 dev up0"))
            && run(&format!("-n {name} link set up0 up"))
            && run(&format!("-n {name} link set up1 up"))
            && run(&format!("-n {name} route add default via 192.0.2.1"));
        let file = std::fs::File::open(format!("/run/netns/{name}")).ok()?;
        let entered = move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).is_ok();
        (ready && entered).then_some(namespace)
    }

    pub(crate) fn run(words: &[&str]) -> std::process::Output {
        Command::new(words[0]).args(&words[1..]).output().unwrap()
    }

    pub(crate) fn output(words: &[&str]) -> String {
        String::from_utf8_lossy(&Self::run(words).stdout).into_owned()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.0]).status();
    }
}

#[tokio::test]
async fn without_the_privilege_networking_is_refused_with_the_fix() {
    skip_unless!(
        have("busybox") && is_root() && have("setpriv"),
        "needs root (to drop it), setpriv and busybox-static"
    );
    let wrapper = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]
        .map(str::to_owned)
        .to_vec();
    let server = Server::start_with(ServerOptions {
        wrapper,
        ..ServerOptions::default()
    })
    .await;
    let image = server.busybox().await;
    let request = json!({"name": "wired", "image": image, "size": "64MB"});
    let reply = server.client().post("/instances", &request).await;
    assert!(
        (400..500).contains(&reply.status),
        "{} {}",
        reply.status,
        reply.text()
    );
    let message = reply.json()["message"].as_str().unwrap().to_owned();
    assert!(
        message.contains("CAP_NET_ADMIN") || message.contains("root"),
        "names the privilege: {message}"
    );
    assert!(message.contains("network"), "names the way without: {message}");
    assert_eq!(server.client().get("/instances").await.json(), json!([]));
    let guest = server.run(&image, json!({"network": {"enabled": false}})).await;
    assert_eq!(guest.output("ls /sys/class/net | grep -c eth; true").await, "0");
}

#[tokio::test]
async fn with_the_privilege_instances_get_an_address_apart_from_each_other() {
    skip_unless!(
        have("busybox") && is_root() && have("ip") && have("nft"),
        "needs root, ip, nft and busybox-static"
    );
    let _namespace = or_skip!(Namespace::enter(), "cannot make network namespaces here");
    let before = Namespace::output(&["ip", "-o", "link"]);
    Namespace::run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"]);
    let server = Server::start().await;
    let image = server.busybox().await;
    let one = server
        .run(&image, json!({"name": "one", "network": {"enabled": true}}))
        .await;
    let two = server
        .run(&image, json!({"name": "two", "network": {"enabled": true}}))
        .await;
    let (shown, other) = (one.inspect().await, two.inspect().await);
    let (address, peer) = (
        shown["network"]["ip"].as_str().unwrap(),
        other["network"]["ip"].as_str().unwrap(),
    );
    assert_ne!(address, peer);
    assert_eq!(shown["network"]["name"], "default");
    let mac = shown["network"]["mac"].as_str().unwrap();
    assert!(mac.starts_with("02:"), "{mac}");
    assert!(one.output("ip -4 -o addr show eth0").await.contains(address));
    assert!(one.output("ip link show eth0").await.contains(mac));
    assert!(one.output("ip route").await.contains("default via"));
    assert!(one.output("cat /etc/resolv.conf").await.contains("nameserver"));
    let gateway = one
        .output("ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'")
        .await;
    one.output(&format!("ping -c 2 -w 20 {gateway}")).await;
    assert_ne!(
        one.shell(&format!("ping -c 1 -w 5 {peer}")).await.exit_code,
        0,
        "instances do not see each other"
    );
    one.delete().await;
    two.delete().await;
    let taps = Namespace::output(&["ip", "-o", "link", "show", "type", "tun"]);
    assert_eq!(taps, "", "no TAP is left; before: {before}");
}

/// The address, as the guest has it.
async fn address_in(guest: &hypeman_tests::Guest) -> String {
    guest
        .output("ip -4 -o addr show eth0 | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p'")
        .await
}

#[tokio::test]
async fn a_fork_never_speaks_under_the_address_of_its_source() {
    skip_unless!(
        have("busybox") && is_root() && have("ip") && have("nft"),
        "needs root, ip, nft and busybox-static"
    );
    let _namespace = or_skip!(Namespace::enter(), "cannot make network namespaces here");
    Namespace::run(&["sysctl", "-qw", "net.ipv4.ip_forward=1"]);
    let server = Server::start().await;
    let image = server.busybox().await;
    for hypervisor in hypeman_tests::hypervisors() {
        let overrides = json!({"name": "source", "hypervisor": hypervisor, "network": {"enabled": true}});
        let source = server.run(&image, overrides).await;
        let gateway = source
            .output("ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p'")
            .await;
        // A workload that speaks all the time, so that it would speak too early if it could.
        source
            .output(&format!("ping -i 0.05 {gateway} >/dev/null 2>&1 </dev/null &"))
            .await;
        let body = json!({"name": "copy", "from_running": true, "count": 2});
        let copies = source.forks(body).await;
        let mut seen = std::collections::BTreeSet::from([address_in(&source).await]);
        for (name, copy) in &copies {
            let shown = copy.inspect().await;
            let address = address_in(copy).await;
            assert_eq!(address, shown["network"]["ip"].as_str().unwrap());
            assert!(seen.insert(address.clone()), "{address} twice");
            let mac = shown["network"]["mac"].as_str().unwrap();
            assert!(copy.output("ip link show eth0").await.contains(mac));
            copy.output(&format!("ping -c 2 -w 20 {gateway}")).await;
            assert_eq!(copy.output("hostname").await, *name);
        }
        source.output(&format!("ping -c 2 -w 20 {gateway}")).await;
        let neighbours = Namespace::output(&["ip", "neigh", "show"]);
        for address in &seen {
            assert_eq!(
                neighbours
                    .lines()
                    .filter(|line| line.starts_with(&format!("{address} ")))
                    .count(),
                1,
                "{neighbours}"
            );
        }
        let before = address_in(&source).await;
        source.standby().await;
        source.restore().await;
        assert_eq!(address_in(&source).await, before, "standby keeps the address");
        source.output(&format!("ping -c 2 -w 20 {gateway}")).await;
        for instance in server.guests().await {
            instance.delete().await;
        }
    }
    assert_eq!(
        Namespace::output(&["ip", "-o", "link", "show", "type", "tun"]),
        ""
    );
}

#[tokio::test]
async fn a_fork_loses_the_connections_of_its_source_at_once_and_the_source_keeps_them() {
    skip_unless!(
        have("busybox") && is_root() && have("ip") && have("nft"),
        "needs root, ip, nft and busybox-static"
    );
    let _namespace = or_skip!(Namespace::enter(), "cannot make network namespaces here");
    let server = Server::start().await;
    let image = server.busybox().await;
    for hypervisor in hypeman_tests::hypervisors() {
        let overrides = json!({"name": "source", "hypervisor": hypervisor, "network": {"enabled": true}});
        let source = server.run(&image, overrides).await;
        // Its input never ends, so it goes on until its connection does.
        source
            .output(
                "mkfifo /dev/shm/input; sh -c 'exec 3<>/dev/shm/input; nc -l -p 7777 <&3 >/dev/shm/heard; \
                 echo over >/dev/shm/over' >/dev/null 2>&1 </dev/null &",
            )
            .await;
        let address: std::net::IpAddr = address_in(&source).await.parse().unwrap();
        let connection = std::cell::RefCell::new(None);
        hypeman_tests::eventually("it listens", || async {
            let made = std::net::TcpStream::connect((address, 7777)).ok();
            *connection.borrow_mut() = made;
            connection.borrow().is_some()
        })
        .await;
        let mut connection = connection.into_inner().unwrap();
        let mut say = async |word: &str| {
            std::io::Write::write_all(&mut connection, format!("{word}\n").as_bytes()).unwrap();
            hypeman_tests::eventually("it is heard", || async {
                source
                    .shell(&format!("grep -q {word} /dev/shm/heard"))
                    .await
                    .exit_code
                    == 0
            })
            .await;
        };
        say("before").await;
        let body = json!({"name": "copy", "from_running": true});
        let copy = source.fork(body).await;
        hypeman_tests::eventually("the copy's end of the connection is gone", || async {
            copy.shell("test -e /dev/shm/over").await.exit_code == 0
        })
        .await;
        say("after").await;
        assert_eq!(source.shell("test -e /dev/shm/over").await.exit_code, 1);
        copy.delete().await;
        source.delete().await;
    }
}

/// Four mebibytes at an eighth of that a second, of which the first second may come at once.
const LIMITED: usize = 4 << 20;

#[tokio::test]
async fn bandwidth_is_limited_each_way_on_firecracker() {
    skip_unless!(
        have("busybox") && is_root() && have("ip") && have("nft"),
        "needs root, ip, nft and busybox-static"
    );
    if !hypeman_tests::told_on("firecracker") {
        return;
    }
    let _namespace = or_skip!(Namespace::enter(), "cannot make network namespaces here");
    let server = Server::start().await;
    let image = server.busybox().await;
    let network = json!({"enabled": true, "bandwidth_download": "512KB/s", "bandwidth_upload": "512KB/s"});
    let guest = server
        .run(&image, json!({"hypervisor": "firecracker", "network": network}))
        .await;
    guest
        .output(
            "sh -c 'nc -l -p 7777 </dev/zero >/dev/null' >/dev/null 2>&1 </dev/null & \
             sh -c 'nc -l -p 7778 </dev/null >/dev/shm/heard; echo over >/dev/shm/over' >/dev/null 2>&1 </dev/null &",
        )
        .await;
    let address: std::net::IpAddr = address_in(&guest).await.parse().unwrap();
    let reach = async |port: u16| {
        let connection = std::cell::RefCell::new(None);
        hypeman_tests::eventually("it listens", || async {
            let made = std::net::TcpStream::connect((address, port)).ok();
            *connection.borrow_mut() = made;
            connection.borrow().is_some()
        })
        .await;
        connection.into_inner().unwrap()
    };
    // Faster than promised is the only failure; a busy host is not.
    let least = std::time::Duration::from_secs(5);

    let mut from_guest = reach(7777).await;
    let began = std::time::Instant::now();
    std::io::Read::read_exact(&mut from_guest, &mut vec![0; LIMITED]).unwrap();
    let took = began.elapsed();
    println!("4 MiB from the guest at 512 KiB/s: {took:?}");
    assert!(took > least, "{took:?}");
    drop(from_guest);

    let mut to_guest = reach(7778).await;
    let began = std::time::Instant::now();
    std::io::Write::write_all(&mut to_guest, &vec![1; LIMITED]).unwrap();
    drop(to_guest);
    hypeman_tests::eventually("all of it has come", || async {
        guest.shell("test -e /dev/shm/over").await.exit_code == 0
    })
    .await;
    let took = began.elapsed();
    println!("4 MiB to the guest at 512 KiB/s: {took:?}");
    assert!(took > least, "{took:?}");
    assert_eq!(guest.output("wc -c </dev/shm/heard").await, LIMITED.to_string());
    guest.delete().await;
}
