//! Coming, staying and going of the bridge and the TAPs.

use std::collections::BTreeSet;

use futures::future::join_all;

use super::frames::{describe, udp};
use super::lab::{Vm, World, attachment, leftovers, open, receive, run, story};
use crate::tap::Tap;
use crate::{Availability, Network, NetworkError, NetworkOptions};

#[test]
fn opening_again_changes_nothing_and_disturbs_nobody() {
    story(
        "host_tests::lifecycle::opening_again_changes_nothing_and_disturbs_nobody",
        || async {
            let world = World::new();
            assert_eq!(
                Network::probe(&NetworkOptions::default()).await,
                Availability::Available
            );
            let network = open().await;
            let vm = Vm::boot(&network, 1).await;
            let before = leftovers();
            let addresses = run("ip", &["-o", "addr", "show", "vmbr0"]);
            assert!(addresses.contains("10.100.0.1/16"), "{addresses}");
            drop(network);

            // As after an upgrade of the server: the VM holds its TAP, and is attached once more.
            let network = open().await;
            network.attach(attachment(1)).await.unwrap();
            assert_eq!(leftovers(), before);
            assert_eq!(run("ip", &["-o", "addr", "show", "vmbr0"]), addresses);
            let server = world.listen(7000);
            let gateway = vm.find_gateway();
            vm.send_ip(
                gateway,
                &udp((vm.ip, 4000), ("192.0.2.2".parse().unwrap(), 7000), "still here"),
            );
            assert_eq!(receive(&server).0, "still here");
        },
    );
}

#[test]
fn a_vm_that_goes_leaves_nothing() {
    story("host_tests::lifecycle::a_vm_that_goes_leaves_nothing", || async {
        let network = open().await;
        let before = leftovers();
        for _ in 0..3 {
            network.attach(attachment(1)).await.unwrap();
            network.attach(attachment(1)).await.unwrap();
            assert_ne!(leftovers(), before);
            network.detach(&attachment(1).tap).await.unwrap();
            assert_eq!(leftovers(), before);
            network.detach(&attachment(1).tap).await.unwrap();
        }
        assert!(matches!(
            network.stats(&attachment(1).tap),
            Err(NetworkError::NoInterface { .. })
        ));

        // Somebody removed the TAP by hand: what belongs to it goes all the same.
        network.attach(attachment(1)).await.unwrap();
        run("ip", &["link", "delete", &attachment(1).tap]);
        network.detach(&attachment(1).tap).await.unwrap();
        assert_eq!(leftovers(), before);
    });
}

#[test]
fn a_vm_may_change_its_address() {
    story("host_tests::lifecycle::a_vm_may_change_its_address", || async {
        let network = open().await;
        let before = leftovers();
        network.attach(attachment(1)).await.unwrap();
        let moved = crate::Attachment {
            ip: attachment(7).ip,
            mac: attachment(7).mac,
            ..attachment(1)
        };
        network.attach(moved).await.unwrap();
        let now = leftovers();
        assert!(
            !now.values()
                .any(|text| text.contains("10.100.1.1 ") || text.contains("02:00:00:00:00:01")),
            "{now:#?}"
        );
        network.detach(&attachment(1).tap).await.unwrap();
        assert_eq!(leftovers(), before);
    });
}

#[test]
fn reconciling_removes_what_nobody_claims_and_only_that() {
    story(
        "host_tests::lifecycle::reconciling_removes_what_nobody_claims_and_only_that",
        || async {
            let network = open().await;
            // A TAP of somebody else, even as a port of our bridge, is not ours to remove.
            run("ip", &["tuntap", "add", "foreign0", "mode", "tap"]);
            run("ip", &["link", "set", "foreign0", "master", "vmbr0"]);
            for number in 1..=4 {
                network.attach(attachment(number)).await.unwrap();
            }
            network.detach(&attachment(4).tap).await.unwrap();
            let before = leftovers();
            network.attach(attachment(4)).await.unwrap();
            network.attach(attachment(5)).await.unwrap();
            run("ip", &["link", "delete", &attachment(5).tap]);
            run(
                "ip",
                &[
                    "neigh",
                    "add",
                    "10.100.77.7",
                    "lladdr",
                    "02:00:00:00:77:77",
                    "dev",
                    "vmbr0",
                    "nud",
                    "permanent",
                ],
            );

            let keep: BTreeSet<String> = (1..=3).map(|number| attachment(number).tap).collect();
            let removed = network.reconcile(&keep).await.unwrap();
            assert_eq!(removed, [attachment(4).tap, attachment(5).tap]);
            assert_eq!(leftovers(), before);
            assert!(network.reconcile(&keep).await.unwrap().is_empty());
            assert!(matches!(
                network.detach("foreign0").await,
                Err(NetworkError::InterfaceTaken { .. })
            ));
        },
    );
}

#[test]
fn a_tap_that_was_not_finished_ends_with_its_maker() {
    story(
        "host_tests::lifecycle::a_tap_that_was_not_finished_ends_with_its_maker",
        || async {
            let network = open().await;
            let before = leftovers();
            drop(Tap::create(&attachment(1).tap).unwrap());
            assert_eq!(leftovers(), before);
            network.attach(attachment(1)).await.unwrap();
        },
    );
}

#[test]
fn names_and_addresses_have_one_owner() {
    story(
        "host_tests::lifecycle::names_and_addresses_have_one_owner",
        || async {
            let network = open().await;
            network.attach(attachment(1)).await.unwrap();
            let same_ip = crate::Attachment {
                ip: attachment(1).ip,
                ..attachment(2)
            };
            assert!(matches!(
                network.attach(same_ip).await,
                Err(NetworkError::AddressInUse { .. })
            ));
            let same_tap = crate::Attachment {
                instance_id: "another".into(),
                ..attachment(1)
            };
            assert!(matches!(
                network.attach(same_tap).await,
                Err(NetworkError::InterfaceTaken { .. })
            ));
            run("ip", &["tuntap", "add", &attachment(3).tap, "mode", "tap"]);
            assert!(matches!(
                network.attach(attachment(3)).await,
                Err(NetworkError::InterfaceTaken { .. })
            ));
            for ip in [
                "10.100.0.0",
                "10.100.0.1",
                "10.100.255.255",
                "10.101.0.5",
                "127.0.0.1",
            ] {
                let outside = crate::Attachment {
                    ip: ip.parse().unwrap(),
                    ..attachment(4)
                };
                assert!(
                    matches!(network.attach(outside).await, Err(NetworkError::Invalid(_))),
                    "{ip}"
                );
            }
            for bad in ["ff:ff:ff:ff:ff:ff", "", "02:00:00:00:00:01; drop"] {
                let outside = crate::Attachment {
                    mac: bad.into(),
                    ..attachment(4)
                };
                assert!(
                    matches!(network.attach(outside).await, Err(NetworkError::Invalid(_))),
                    "{bad}"
                );
            }
        },
    );
}

#[test]
fn a_bridge_that_was_taken_away_comes_back() {
    story(
        "host_tests::lifecycle::a_bridge_that_was_taken_away_comes_back",
        || async {
            let network = open().await;
            network.attach(attachment(1)).await.unwrap();
            run("ip", &["link", "delete", "vmbr0"]);
            let vm = Vm::boot(&network, 1).await;
            vm.find_gateway();
        },
    );
}

#[test]
fn removing_the_network_leaves_the_host_as_it_was() {
    story(
        "host_tests::lifecycle::removing_the_network_leaves_the_host_as_it_was",
        || async {
            let state = || {
                (
                    run("ip", &["-o", "link"]),
                    run("ip", &["route"]),
                    run("nft", &["list", "ruleset"]),
                )
            };
            let before = state();
            let network = open().await;
            network.attach(attachment(1)).await.unwrap();
            network.remove().await.unwrap();
            assert_eq!(state(), before);
        },
    );
}

#[test]
fn a_host_that_cannot_is_told_what_to_do() {
    story(
        "host_tests::lifecycle::a_host_that_cannot_is_told_what_to_do",
        || async {
            let reason = |options: NetworkOptions| async move {
                let Availability::Unavailable { reason } = Network::probe(&options).await else {
                    panic!("available");
                };
                assert!(Network::open(options).await.is_err());
                reason
            };
            // A bridge that is somebody's own, as on Proxmox.
            run("ip", &["link", "add", "vmbr0", "type", "bridge"]);
            assert!(
                reason(NetworkOptions::default())
                    .await
                    .contains("was not made by this program")
            );
            run("ip", &["link", "delete", "vmbr0"]);

            run("ip", &["link", "add", "wg9", "type", "bridge"]);
            run("ip", &["link", "set", "wg9", "up"]);
            run("ip", &["route", "add", "10.0.0.0/8", "dev", "wg9"]);
            let text = reason(NetworkOptions::default()).await;
            assert!(
                text.contains("10.0.0.0/8 through wg9") && text.contains("172.30.0.0/16"),
                "{text}"
            );
            run("ip", &["link", "delete", "wg9"]);

            let options = NetworkOptions {
                uplink: Some("nowhere0".into()),
                ..NetworkOptions::default()
            };
            assert!(reason(options).await.contains("no interface nowhere0"));
            assert!(
                run("nft", &["list", "ruleset"]).is_empty(),
                "a refusal has no effects"
            );

            run("nft", &["add", "table", "ip", "filter"]);
            run(
                "nft",
                &["add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }"],
            );
            let network = open().await;
            assert!(
                network.warnings()[0].contains("`ip filter FORWARD`"),
                "{:?}",
                network.warnings()
            );
        },
    );
}

#[test]
fn five_hundred_vms_come_and_go_without_a_trace() {
    story(
        "host_tests::lifecycle::five_hundred_vms_come_and_go_without_a_trace",
        || async {
            let network = open().await;
            let before = leftovers();
            let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
            network.attach(attachment(0x101)).await.unwrap();
            network.detach(&attachment(0x101).tap).await.unwrap();
            let open_before = descriptors();
            let all: Vec<u16> = (1..=500).map(|n| n + 1000).collect();
            for batch in all.chunks(50) {
                for answer in join_all(batch.iter().map(|n| network.attach(attachment(*n)))).await {
                    answer.unwrap();
                }
            }
            let now = leftovers();
            assert_eq!(now["neighbours"].lines().count(), 500);
            assert_eq!(now["rules"].matches(" . 02:00:00:").count(), 500);

            // Traffic still reaches exactly the right one of them.
            let one = Vm::boot(&network, 1250).await;
            let host = std::net::UdpSocket::bind("10.100.0.1:0").unwrap();
            host.send_to(b"you", (one.ip, 5000)).unwrap();
            assert_eq!(describe(&one.receive()), "udp from 10.100.0.1: you");
            drop((one, host));

            let (first, second) = all.split_at(250);
            for batch in first.chunks(50) {
                let taps: Vec<String> = batch.iter().map(|n| attachment(*n).tap).collect();
                for answer in join_all(taps.iter().map(|tap| network.detach(tap))).await {
                    answer.unwrap();
                }
            }
            assert_eq!(
                network.reconcile(&BTreeSet::new()).await.unwrap().len(),
                second.len()
            );
            assert_eq!(leftovers(), before);
            assert_eq!(descriptors(), open_before);
        },
    );
}
