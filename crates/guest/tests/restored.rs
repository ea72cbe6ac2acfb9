//! The guest program in machines that were captured and restored: it finds the host again, goes on, and becomes
//! another instance when it is told. Needs what `lab/mod.rs` names, and root for network devices.
// The lints' exception for tests does not reach helpers of integration tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod lab;

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant, SystemTime},
};

use hypeman_guest_api::{
    AgentKey, ChannelError, ExecRequest, GuestEvent, NetworkConfig, Reconfiguration, RefusalCode,
    host::GuestClient,
};
use hypeman_vmm::VmmKind;
use lab::{
    KEY, PATIENCE, expect, is_possible,
    machines::{A_WHILE, Machines, Running, Tap},
    program, shell,
};

fn network(tap: &Tap, last: u8) -> NetworkConfig {
    let [a, b, c] = tap.network;
    NetworkConfig {
        address: Ipv4Addr::new(a, b, c, last),
        prefix_length: 24,
        gateway: Ipv4Addr::new(a, b, c, 1),
        dns: vec![Ipv4Addr::new(a, b, c, 1)],
        mac: Some(format!("02:00:00:00:{c:02x}:{last:02x}")),
    }
}

fn now() -> i128 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as i128
}

fn identity(name: &str, key: u8, network: NetworkConfig) -> Reconfiguration {
    Reconfiguration {
        key: AgentKey([key; 32]),
        instance_id: format!("id-of-{name}"),
        hostname: name.to_owned(),
        time_unix_nanos: now(),
        entropy: vec![key; 64],
        network: Some(network),
    }
}

async fn counter(client: &GuestClient) -> u64 {
    let (said, _) = shell(client, "cat /dev/shm/counter").await;
    said.trim().parse().unwrap()
}

/// The guest's clock, and the host's before and after. Not by the time of a file: those follow the kernel's ticks,
/// which come late on a busy host.
async fn clocks(client: &GuestClient) -> (i128, i128, i128) {
    let before = now();
    let (said, _) = shell(
        client,
        "adjtimex | grep -o 'time.tv_u*sec: *[0-9]*' | grep -o '[0-9]*$'",
    )
    .await;
    let after = now();
    let mut numbers = said.lines().map(|line| line.parse::<i128>().unwrap());
    let guest = numbers.next().unwrap() * 1_000_000_000 + numbers.next().unwrap() * 1000;
    (before, guest, after)
}

/// What a guest is known by: name, machine id, MAC, address, gateway.
async fn known_by(client: &GuestClient) -> Vec<String> {
    let look = "hostname; cat /etc/hostname; tail -n 1 /etc/hosts | cut -f1; cat /etc/machine-id; \
                cat /sys/class/net/eth0/address; ip -4 -o addr show dev eth0 | awk '{print $4}'; \
                ip route | grep default | cut -d' ' -f3; tail -n 1 /etc/resolv.conf | cut -d' ' -f2";
    let (said, code) = shell(client, look).await;
    assert_eq!(code, 0, "{said}");
    said.lines().map(str::to_owned).collect()
}

async fn refused(machine: &Running, key: &AgentKey) {
    let error = GuestClient::connect(machine.socket().await, Some(key), PATIENCE)
        .await
        .err()
        .unwrap();
    assert!(matches!(error, ChannelError::NotAuthentic), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forks_find_their_host_go_on_and_become_instances_of_their_own() {
    if !is_possible() {
        return;
    }
    for kind in [VmmKind::Qemu, VmmKind::QemuMicrovm] {
        let machines = Machines::new(kind);
        let (Some(tap), Some(second), Some(third)) = (Tap::new(0), Tap::new(1), Tap::new(2)) else {
            return;
        };
        let layer = machines.directory.path().join("layer.ext4");
        let source = machines.launch(&machines.spec("source", &tap, layer)).await;
        let (client, mut events) = source.connect(None).await;
        let count = "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/new; mv /dev/shm/new /dev/shm/counter; sleep 0.02; done";
        let mut config = program(&["sh", "-c", count]);
        config.network = Some(network(&tap, 10));
        client.configure(&config, PATIENCE).await.unwrap();
        expect(&mut events, GuestEvent::ProgramStarted).await;
        shell(
            &client,
            "echo kept > /root/file; mkdir -p /var/lib/dbus; cp /etc/machine-id /var/lib/dbus/",
        )
        .await;
        assert_eq!(
            shell(
                &client,
                "ping -c 1 -W 20 $(ip route | grep default | cut -d' ' -f3)"
            )
            .await
            .1,
            0
        );
        while shell(&client, "test -s /dev/shm/counter").await.1 != 0 {}
        // In the middle of a session, which belongs to the source's host alone.
        let sleeping = ExecRequest {
            command: vec!["sleep".into(), "12345".into()],
            ..ExecRequest::default()
        };
        let session = client.exec(sleeping).await.unwrap();
        let at_least = counter(&client).await;
        let snapshot = machines.capture(&source, "snapshot").await;
        let original = known_by(&client).await;
        tokio::time::sleep(A_WHILE).await;

        let mut drawn = Vec::new();
        for (name, key, tap) in [("first", 9, &second), ("another", 10, &third)] {
            let begun = Instant::now();
            let fork = machines.fork(&snapshot, name, tap).await;
            let (client, mut events) = fork.connect(Some(&KEY)).await;
            let connected = begun.elapsed();
            assert!(client.is_configured());
            client.ping(PATIENCE).await.unwrap();
            // The device came with another MAC of its own, and the guest has that of the capture until it is told.
            assert_eq!(known_by(&client).await, original);
            let new = identity(name, key, network(tap, 20));
            client.reconfigure(&new).await.unwrap();
            let confirmed = begun.elapsed();
            let bound = client.synchronise_clock().await.unwrap();
            println!(
                "{kind:?} {name}: connected after {connected:?}, confirmed after {confirmed:?}, clock within {bound:?}"
            );
            // At once: a guest that booted on a busy host may count its seconds wrongly from here on.
            let (before, guest, after) = clocks(&client).await;
            let slack = bound.as_nanos() as i128 + 10_000_000;
            assert!(
                guest >= before - slack && guest <= after + slack,
                "{before} {guest} {after}"
            );
            drawn.push(shell(&client, "head -c 32 /dev/urandom | md5sum").await.0);
            expect(&mut events, GuestEvent::ProgramStarted).await;

            // Memory, program and disk go on; the source's session does not.
            let counted = counter(&client).await;
            assert!(counted >= at_least, "{counted} of {at_least}");
            while counter(&client).await <= counted {}
            assert_eq!(shell(&client, "cat /root/file").await.0, "kept\n");
            assert_eq!(
                shell(&client, "ps -o args | grep -c '[s]leep 12345'").await.0,
                "0\n"
            );

            // All of the identity is in force.
            let config = new.network.as_ref().unwrap();
            let [a, b, c] = tap.network;
            let own = known_by(&client).await;
            let expected = [
                name.to_owned(),
                name.to_owned(),
                format!("{a}.{b}.{c}.20"),
                own[3].clone(),
                config.mac.clone().unwrap(),
                format!("{a}.{b}.{c}.20/24"),
                config.gateway.to_string(),
                config.gateway.to_string(),
            ];
            assert_eq!(own, expected);
            assert_ne!(own[3], original[3], "the machine id is another's");
            assert_eq!(
                shell(&client, "cat /var/lib/dbus/machine-id").await.0.trim(),
                own[3]
            );
            let (said, code) = shell(&client, &format!("ping -c 1 -W 20 {}", config.gateway)).await;
            assert_eq!(code, 0, "{said}");

            // Who knows the old key is refused from now on.
            drop((client, events));
            refused(&fork, &KEY).await;
            let (client, _events) = fork.connect(Some(&new.key)).await;
            assert_eq!(shell(&client, "hostname").await.0, format!("{name}\n"));
            client.shutdown(Duration::from_secs(20)).await.unwrap();
            fork.ended().await;
        }
        assert_ne!(drawn[0], drawn[1], "two forks draw the same random numbers");

        // The source noticed nothing.
        drop(session);
        assert_eq!(known_by(&client).await, original);
        assert!(counter(&client).await > at_least);
        client.shutdown(Duration::from_secs(20)).await.unwrap();
        source.ended().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fork_that_cannot_take_over_all_of_its_identity_says_so() {
    if !is_possible() {
        return;
    }
    let machines = Machines::new(VmmKind::QemuMicrovm);
    let Some(tap) = Tap::new(3) else { return };
    let layer = machines.directory.path().join("layer.ext4");
    let machine = machines.launch(&machines.spec("fails", &tap, layer)).await;
    let (client, _events) = machine.connect(None).await;
    let mut config = program(&["sleep", "1000"]);
    config.network = Some(network(&tap, 10));
    client.configure(&config, PATIENCE).await.unwrap();

    // Too little entropy, no such MAC, a file that cannot be written: each is told by name.
    let good = identity("fork", 7, network(&tap, 20));
    let mut little = good.clone();
    little.entropy = vec![1; 31];
    let mut multicast = good.clone();
    multicast.network.as_mut().unwrap().mac = Some("03:00:00:00:00:01".into());
    shell(&client, "touch /dev/shm/id && mount -o bind /dev/shm/id /etc/machine-id && mount -o remount,bind,ro /etc/machine-id").await;
    for (bad, word) in [
        (little, "entropy"),
        (multicast, "MAC"),
        (good.clone(), "/etc/machine-id"),
    ] {
        let error = client.reconfigure(&bad).await.unwrap_err();
        assert_eq!(error.refusal(), Some(RefusalCode::SetupFailed), "{word}");
        assert!(error.to_string().contains(word), "{error}");
    }
    shell(&client, "umount /etc/machine-id").await;
    client.reconfigure(&good).await.unwrap();
    assert_eq!(shell(&client, "hostname").await.0, "fork\n");
}
