//! What a guest can reach and what it cannot.
//!
//! That something does *not* arrive is shown by order: what is forbidden is sent first, what is allowed after it,
//! and the allowed is the first to arrive.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, UdpSocket};

use super::frames::{BROADCAST, arp, describe, ethernet, ping, udp};
use super::lab::{Vm, World, open, receive, run, story};
use crate::{Network, NetworkOptions};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 100, 0, 1);
const WORLD: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

#[test]
fn a_guest_talks_to_the_world_through_nat() {
    story(
        "host_tests::isolation::a_guest_talks_to_the_world_through_nat",
        || async {
            let world = World::new();
            let network = open().await;
            let vm = Vm::boot(&network, 1).await;
            let server = world.listen(7000);

            let gateway = vm.find_gateway();
            vm.send_ip(gateway, &udp((vm.ip, 4000), (WORLD, 7000), "hello"));
            let (text, sender) = receive(&server);
            assert_eq!(text, "hello");
            assert_eq!(
                sender.ip().to_string(),
                "192.0.2.1",
                "the world sees the host's address"
            );

            server.send_to(b"welcome", sender).unwrap();
            assert_eq!(describe(&vm.receive()), "udp from 192.0.2.2: welcome");

            let traffic = network.stats(&super::lab::attachment(1).tap).unwrap();
            assert!(traffic.tx_bytes >= 120 && traffic.rx_bytes >= 40, "{traffic:?}");
        },
    );
}

#[test]
fn metadata_services_are_out_of_reach() {
    story(
        "host_tests::isolation::metadata_services_are_out_of_reach",
        || async {
            let world = World::new();
            let network = open().await;
            let vm = Vm::boot(&network, 1).await;
            // A host that redirects the metadata address, as some clouds' agents do, changes nothing.
            run("nft", &["add", "table", "ip", "agent"]);
            run(
                "nft",
                &["add chain ip agent p { type nat hook prerouting priority -100; }"],
            );
            run(
                "nft",
                &["add rule ip agent p ip daddr 169.254.169.254 dnat to 192.0.2.2"],
            );
            let server = world.listen(80);

            let gateway = vm.find_gateway();
            for forbidden in [
                [169, 254, 169, 254],
                [169, 254, 1, 1],
                [100, 100, 100, 200],
                [168, 63, 129, 16],
            ] {
                vm.send_ip(
                    gateway,
                    &udp((vm.ip, 4000), (Ipv4Addr::from(forbidden), 80), "give me keys"),
                );
            }
            vm.send_ip(gateway, &udp((vm.ip, 4000), (WORLD, 80), "hello"));
            assert_eq!(receive(&server).0, "hello");
        },
    );
}

#[test]
fn guests_do_not_reach_each_other() {
    story(
        "host_tests::isolation::guests_do_not_reach_each_other",
        || async {
            let network = open().await;
            let (a, b) = (Vm::boot(&network, 1).await, Vm::boot(&network, 2).await);
            let gateway = a.find_gateway();
            b.find_gateway();

            // Directly, to everybody, to an unknown station, and by way of the gateway.
            let packet = udp((a.ip, 4000), (b.ip, 5000), "psst");
            a.send(&ethernet(b.mac, a.mac, 0x0800, &packet));
            a.send(&ethernet(BROADCAST, a.mac, 0x0800, &packet));
            a.send(&ethernet([2, 0, 0, 9, 9, 9], a.mac, 0x0800, &packet));
            a.send(&ethernet(
                BROADCAST,
                a.mac,
                0x0806,
                &arp(true, (a.mac, a.ip), ([0; 6], b.ip)),
            ));
            a.send_ip(gateway, &packet);

            let host = UdpSocket::bind((GATEWAY, 0)).unwrap();
            host.send_to(b"from the host", (b.ip, 5000)).unwrap();
            assert_eq!(describe(&b.receive()), "udp from 10.100.0.1: from the host");
        },
    );
}

#[test]
fn what_is_for_one_guest_is_not_seen_by_another() {
    story(
        "host_tests::isolation::what_is_for_one_guest_is_not_seen_by_another",
        || async {
            let network = open().await;
            let (a, b) = (Vm::boot(&network, 1).await, Vm::boot(&network, 2).await);
            let host = UdpSocket::bind((GATEWAY, 0)).unwrap();
            host.set_broadcast(true).unwrap();
            // Neither a packet for a guest that said nothing yet, nor a broadcast, nor one for nobody is flooded.
            host.send_to(b"for a", (a.ip, 5000)).unwrap();
            host.send_to(b"for all", ("10.100.255.255", 5000)).unwrap();
            host.send_to(b"for nobody", ("10.100.9.9", 5000)).unwrap();
            host.send_to(b"for b", (b.ip, 5000)).unwrap();
            assert_eq!(describe(&a.receive()), "udp from 10.100.0.1: for a");
            assert_eq!(describe(&b.receive()), "udp from 10.100.0.1: for b");
        },
    );
}

#[test]
fn a_guest_cannot_pose_as_another() {
    story(
        "host_tests::isolation::a_guest_cannot_pose_as_another",
        || async {
            let world = World::new();
            let network = open().await;
            let (a, b) = (Vm::boot(&network, 1).await, Vm::boot(&network, 2).await);
            let server = world.listen(7000);
            let gateway = a.find_gateway();

            let foreign_mac = [2, 0, 0, 7, 7, 7];
            let honest = |text| udp((a.ip, 4000), (WORLD, 7000), text);
            a.send_ip(gateway, &udp((b.ip, 4000), (WORLD, 7000), "b's address"));
            a.send_ip(
                gateway,
                &udp((GATEWAY, 4000), (WORLD, 7000), "the gateway's address"),
            );
            a.send_ip(gateway, &udp((WORLD, 4000), (WORLD, 7000), "the world's address"));
            a.send(&ethernet(gateway, b.mac, 0x0800, &honest("b's MAC")));
            a.send(&ethernet(gateway, foreign_mac, 0x0800, &honest("any MAC")));
            a.send(&ethernet(
                gateway,
                a.mac,
                0x8100,
                &[[0, 5, 8, 0].as_slice(), &honest("in a VLAN")].concat(),
            ));
            a.send(&ethernet(gateway, a.mac, 0x86dd, &[0x60; 48]));
            // Claims in ARP: another's address, another's MAC inside, the gateway's address.
            for claim in [(a.mac, b.ip), (b.mac, a.ip), (a.mac, GATEWAY)] {
                a.send(&ethernet(
                    BROADCAST,
                    a.mac,
                    0x0806,
                    &arp(true, claim, ([0; 6], GATEWAY)),
                ));
                a.send(&ethernet(
                    gateway,
                    a.mac,
                    0x0806,
                    &arp(false, claim, (gateway, GATEWAY)),
                ));
            }
            a.send_ip(gateway, &honest("honest"));
            assert_eq!(receive(&server).0, "honest");

            let neighbours = run("ip", &["neigh", "show", "dev", "vmbr0"]);
            assert!(
                neighbours.contains("10.100.1.2 lladdr 02:00:00:00:00:02 PERMANENT"),
                "{neighbours}"
            );
            assert_eq!(neighbours.lines().count(), 2, "{neighbours}");
        },
    );
}

#[test]
fn the_host_is_closed_to_guests_but_for_ping_and_chosen_ports() {
    story(
        "host_tests::isolation::the_host_is_closed_to_guests_but_for_ping_and_chosen_ports",
        || async {
            let _world = World::new();
            let options = NetworkOptions {
                gateway_ports: BTreeSet::from([53]),
                ..NetworkOptions::default()
            };
            let network = Network::open(options).await.unwrap();
            let vm = Vm::boot(&network, 1).await;
            let gateway = vm.find_gateway();

            let open_port = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53)).unwrap();
            let closed_port = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 8080)).unwrap();
            closed_port.set_nonblocking(true).unwrap();
            vm.send_ip(gateway, &udp((vm.ip, 4000), (GATEWAY, 8080), "closed"));
            vm.send_ip(
                gateway,
                &udp(
                    (vm.ip, 4000),
                    (Ipv4Addr::new(192, 0, 2, 1), 8080),
                    "the host's other address",
                ),
            );
            vm.send_ip(
                gateway,
                &udp(
                    (vm.ip, 4000),
                    (Ipv4Addr::new(192, 0, 2, 1), 53),
                    "open only at the gateway",
                ),
            );
            vm.send_ip(gateway, &udp((vm.ip, 4000), (GATEWAY, 53), "a question"));
            assert_eq!(receive(&open_port).0, "a question");
            assert!(closed_port.recv(&mut [0; 64]).is_err());

            vm.send_ip(gateway, &ping(vm.ip, GATEWAY));
            assert_eq!(describe(&vm.receive()), "icmp type 0 from 10.100.0.1");

            // What the host asks, the guest may answer: ingress works.
            closed_port.set_nonblocking(false).unwrap();
            closed_port.send_to(b"are you there", (vm.ip, 5000)).unwrap();
            assert_eq!(describe(&vm.receive()), "udp from 10.100.0.1: are you there");
            vm.send_ip(gateway, &udp((vm.ip, 5000), (GATEWAY, 8080), "yes"));
            assert_eq!(receive(&closed_port).0, "yes");
        },
    );
}

#[test]
fn nobody_outside_opens_a_connection_to_a_guest() {
    story(
        "host_tests::isolation::nobody_outside_opens_a_connection_to_a_guest",
        || async {
            let world = World::new();
            let network = open().await;
            let vm = Vm::boot(&network, 1).await;
            let stranger = world.listen(7000);
            stranger.send_to(b"knock knock", (vm.ip, 5000)).unwrap();
            // The veth pair delivers in order: when this has arrived, the knock has been judged.
            let host = UdpSocket::bind(("192.0.2.1", 7001)).unwrap();
            stranger.send_to(b"done", "192.0.2.1:7001").unwrap();
            assert_eq!(receive(&host).0, "done");
            let host = UdpSocket::bind((GATEWAY, 0)).unwrap();
            host.send_to(b"from the host", (vm.ip, 5000)).unwrap();
            assert_eq!(describe(&vm.receive()), "udp from 10.100.0.1: from the host");
        },
    );
}
