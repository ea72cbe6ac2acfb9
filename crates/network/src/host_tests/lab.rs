//! The laboratory: namespaces, a world beyond the uplink, and VMs played by the test.

use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::future::Future;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::frames::{self, Mac};
use crate::tap::Tap;
use crate::{Attachment, MacAddress, Network, NetworkOptions, mac_address, tap_name};

const INSIDE: &str = "HYPEMAN_NETWORK_STORY";
/// Header that a TAP of ours puts before each frame.
const OFFLOAD_HEADER: usize = 10;
/// After this long a frame that must come is taken for lost, and the story fails.
const LOST: Duration = Duration::from_secs(20);

/// Runs a story in a network namespace of its own; skips it, saying so, where that is not possible.
pub(super) fn story<F: Future<Output = ()>>(name: &str, body: impl FnOnce() -> F) {
    if env::var(INSIDE).as_deref() == Ok(name) {
        run("ip", &["link", "set", "lo", "up"]);
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
            .block_on(body());
        return;
    }
    if !rustix::process::geteuid().is_root() || !std::path::Path::new(crate::tap::TUN_DEVICE).exists() {
        println!("SKIPPED: {name} needs root and {}", crate::tap::TUN_DEVICE);
        return;
    }
    let status = Command::new("unshare")
        .args(["--net", "--"])
        .arg(env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads", "1"])
        .env(INSIDE, name)
        .status()
        .unwrap();
    assert!(status.success(), "{name} failed in its namespace");
}

pub(super) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Everything that an attachment could leave behind.
pub(super) fn leftovers() -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        (
            "links",
            run("ip", &["-o", "link"])
                .lines()
                .map(|l| l.split(' ').nth(1).unwrap())
                .collect(),
        ),
        (
            "forwarding",
            run("bridge", &["fdb", "show", "br", "vmbr0"]).replace("extern_learn ", ""),
        ),
        ("neighbours", run("ip", &["neigh", "show", "nud", "permanent"])),
        ("rules", run("nft", &["-s", "list", "ruleset"])),
    ])
}

/// A second namespace, reached through a veth pair: `up0` here is 192.0.2.1, there 192.0.2.2 and 169.254.169.254.
pub(super) struct World {
    holder: Child,
}

impl World {
    pub(super) fn new() -> Self {
        // Ends when this process does, whatever the reason, because its standard input then ends.
        let mut holder = Command::new("unshare")
            .args(["--net", "--", "sh", "-c", "echo ready; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        holder.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        let world = Self { holder };
        let pid = world.holder.id().to_string();
        run(
            "ip",
            &[
                "link", "add", "up0", "type", "veth", "peer", "name", "world0", "netns", &pid,
            ],
        );
        run("ip", &["addr", "add", "192.0.2.1/24", "dev", "up0"]);
        run("ip", &["link", "set", "up0", "up"]);
        run("ip", &["route", "add", "default", "via", "192.0.2.2"]);
        world.inside(|| {
            run("ip", &["addr", "add", "192.0.2.2/24", "dev", "world0"]);
            run("ip", &["addr", "add", "169.254.169.254/32", "dev", "world0"]);
            run("ip", &["link", "set", "world0", "up"]);
            run("ip", &["link", "set", "lo", "up"]);
            run("ip", &["route", "add", "10.100.0.0/16", "via", "192.0.2.1"]);
        });
        world
    }

    /// Runs something in the world; a socket made there stays there.
    pub(super) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/proc/{}/ns/net", self.holder.id())).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                use std::os::fd::AsFd as _;
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    pub(super) fn listen(&self, port: u16) -> UdpSocket {
        let socket = self.inside(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
        socket.set_read_timeout(Some(LOST)).unwrap();
        socket
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Receives one datagram as text with its sender.
pub(super) fn receive(socket: &UdpSocket) -> (String, std::net::SocketAddr) {
    let mut buffer = [0; 2048];
    let (length, sender) = socket.recv_from(&mut buffer).unwrap();
    (String::from_utf8_lossy(&buffer[..length]).into_owned(), sender)
}

pub(super) async fn open() -> Network {
    Network::open(NetworkOptions::default()).await.unwrap()
}

/// The attachment of the `number`th VM.
pub(super) fn attachment(number: u16) -> Attachment {
    let [high, low] = number.to_be_bytes();
    let id = format!("vm{number:05}testinstanceid");
    Attachment {
        tap: tap_name(&id),
        instance_id: id,
        ip: Ipv4Addr::new(10, 100, 1 + high, low),
        mac: mac_address([0, high, low]),
    }
}

/// A VM played by the test.
pub(super) struct Vm {
    pub(super) ip: Ipv4Addr,
    pub(super) mac: Mac,
    file: File,
}

impl Vm {
    pub(super) async fn boot(network: &Network, number: u16) -> Self {
        let attachment = attachment(number);
        let mac: MacAddress = attachment.mac.parse().unwrap();
        let (tap, ip) = (attachment.tap.clone(), attachment.ip);
        network.attach(attachment).await.unwrap();
        let file = Tap::create(&tap).unwrap().into_file();
        // The kernel notices a moment later that the port is in use; a guest would send once more.
        let patience = Instant::now();
        let forwarding = || run("bridge", &["link", "show", "dev", &tap]).contains("state forwarding");
        let bridge_up = || run("ip", &["link", "show", "vmbr0"]).contains("state UP");
        while !forwarding() || !bridge_up() {
            assert!(patience.elapsed() < LOST, "the port of {tap} does not come up");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Self {
            ip,
            mac: mac.octets(),
            file,
        }
    }

    pub(super) fn send(&self, frame: &[u8]) {
        let mut bytes = vec![0; OFFLOAD_HEADER];
        bytes.extend(frame);
        (&self.file).write_all(&bytes).unwrap();
    }

    /// Sends an IPv4 packet to the gateway's MAC, as for everything that is not on the subnet.
    pub(super) fn send_ip(&self, gateway: Mac, packet: &[u8]) {
        self.send(&frames::ethernet(gateway, self.mac, 0x0800, packet));
    }

    /// Waits for the next frame.
    pub(super) fn receive(&self) -> Vec<u8> {
        let wait = Timespec {
            tv_sec: LOST.as_secs() as i64,
            tv_nsec: 0,
        };
        let ready = poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&wait)).unwrap();
        assert_eq!(ready, 1, "no frame came");
        let mut buffer = vec![0; 4096];
        let length = (&self.file).read(&mut buffer).unwrap();
        buffer[OFFLOAD_HEADER..length].to_vec()
    }

    /// Asks for the gateway's MAC, as a guest does first.
    pub(super) fn find_gateway(&self) -> Mac {
        let gateway = Ipv4Addr::new(10, 100, 0, 1);
        let question = frames::arp(true, (self.mac, self.ip), ([0; 6], gateway));
        self.send(&frames::ethernet(frames::BROADCAST, self.mac, 0x0806, &question));
        let answer = self.receive();
        assert_eq!(frames::describe(&answer), "arp 10.100.0.1 is-at");
        answer[6..12].try_into().unwrap()
    }
}
