//! The guest program in real machines. Slow, and in need of QEMU, a kernel and file system tools, so ignored by
//! default: `cargo test -p hypeman-guest --test boot -- --ignored` (see `lab/mod.rs` for what it looks for).
// The lints' exception for tests does not reach helpers of integration tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

mod lab;

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use hypeman_guest_api::{
    AgentKey, CopyFrom, CopyTo, EntryKind, ExecRequest, GuestEvent, InitMode, NetworkConfig, Reconfiguration,
    RefusalCode, VolumeMode, VolumeMount,
    host::{CopyItem, ExecOutput},
};
use lab::{KEY, Lab, PATIENCE, expect, is_possible, program, run_command, shell};

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_machine_becomes_an_instance_serves_and_powers_off() {
    if !is_possible() {
        return;
    }
    let begun = Instant::now();
    let mut lab = Lab::start(&["volume.ext4"]);
    let (client, mut events) = lab.connect(None).await;
    assert!(!client.is_configured());
    println!("boot to agent: {:?}", begun.elapsed());
    let refused = client.exec(ExecRequest::default()).await.err().unwrap();
    assert_eq!(refused.refusal(), Some(RefusalCode::NotConfigured));

    let mut config = program(&[
        "sh",
        "-c",
        "echo out: $GREETING; echo err >&2; pwd; id; exec sleep 1000",
    ]);
    config.program.working_directory = "/made/on the way".into();
    config.program.user = "web".into();
    config.volumes = vec![VolumeMount {
        device: "/dev/vdc".into(),
        path: "/data/volume".into(),
        mode: VolumeMode::Rw,
    }];
    let configuring = Instant::now();
    client.configure(&config, PATIENCE).await.unwrap();
    println!("configure: {:?}", configuring.elapsed());
    expect(&mut events, GuestEvent::ProgramStarted).await;
    expect(&mut events, GuestEvent::AgentReady).await;
    let again = client.configure(&config, PATIENCE).await.err().unwrap();
    assert_eq!(again.refusal(), Some(RefusalCode::AlreadyConfigured));

    // The container's world.
    let (said, code) = shell(
        &client,
        "hostname; cat /etc/hostname; cat /data/base; id -u; echo $GREETING; pwd",
    )
    .await;
    assert_eq!(
        (said.as_str(), code),
        ("lab\nlab\nfrom the image\n0\nhello world\n/\n", 0)
    );
    let (said, _) = shell(
        &client,
        "ls /; cat /proc/mounts; ls -la /dev/fd /dev/stdout; cat /proc/1/cmdline",
    )
    .await;
    println!("{said}");
    let (said, code) = shell(
        &client,
        "echo kept > /data/volume/file && ls /data/volume; ls /modules /init /mnt/root",
    )
    .await;
    assert!(said.starts_with("file\nlost+found\n"), "{said}");
    assert_ne!(code, 0, "the initramfs must be out of reach");
    let (said, _) = shell(&client, "date +%s").await;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_secs();
    assert!(said.trim().parse::<u64>().unwrap().abs_diff(now) <= 5, "{said}");
    while !lab.log().contains("groups=") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(
        lab.log(),
        "out: hello world\nerr\n/made/on the way\nuid=1000(web) gid=1000(web) groups=1000(web),1001(logs)\n"
    );

    // Orphans are collected, and 20 sessions run at once.
    shell(
        &client,
        "for i in 1 2 3 4 5 6 7 8 9 10; do (sleep 0.01 &) ; done; sleep 0.3",
    )
    .await;
    let (said, _) = shell(&client, "ps -o stat | grep -c Z").await;
    assert_eq!(said.trim(), "0");
    let sessions: Vec<_> = (0..20)
        .map(|number| {
            let client = client.clone();
            tokio::spawn(
                async move { shell(&client, &format!("seq 1 20000 | tail -n 1; echo {number}")).await },
            )
        })
        .collect();
    for (number, session) in sessions.into_iter().enumerate() {
        assert_eq!(session.await.unwrap(), (format!("20000\n{number}\n"), 0));
    }

    // A terminal.
    let request = ExecRequest {
        command: vec![
            "sh".into(),
            "-c".into(),
            "tty; stty size; sleep 0.3; stty size".into(),
        ],
        tty: Some((30, 100)),
        ..ExecRequest::default()
    };
    let mut session = client.exec(request).await.unwrap();
    let mut said = String::new();
    while let Some(output) = session.next().await.unwrap() {
        match output {
            ExecOutput::Stdout(data) => {
                said.push_str(&String::from_utf8_lossy(&data));
                if said.contains("30 100") {
                    session.resize(40, 120).await.unwrap();
                }
            }
            ExecOutput::Stderr(_) => panic!("a terminal has one output"),
            ExecOutput::Exit(code) => assert_eq!(code, 0),
        }
    }
    assert_eq!(said, "/dev/pts/0\r\n30 100\r\n40 120\r\n");

    // Files in and out.
    let content: Vec<u8> = (0..3_000_000u32).map(|number| (number % 251) as u8).collect();
    let request = CopyTo {
        path: "/srv/deep/file".into(),
        mode: Some(0o4750),
        owner: Some((1000, 1001)),
        modification_time_nanos: Some(1_600_000_000_123_456_789),
        ..CopyTo::default()
    };
    let mut copy = client.copy_to(request).await.unwrap();
    for chunk in content.chunks(32 * 1024) {
        copy.send(chunk).await.unwrap();
    }
    assert_eq!(copy.finish().await.unwrap(), content.len() as u64);
    let info = client.stat("/srv/deep/file", false).await.unwrap();
    assert_eq!(
        (info.is_file, info.mode, info.size),
        (true, 0o4750, content.len() as u64)
    );
    assert!(!client.stat("/srv/deep/none", false).await.unwrap().exists);
    shell(&client, "ln -s deep/file /srv/link; mkfifo /srv/fifo").await;
    let mut copy = client
        .copy_from(CopyFrom {
            path: "/srv".into(),
            follow_links: false,
        })
        .await
        .unwrap();
    let (mut entries, mut received) = (Vec::new(), Vec::new());
    while let Some(item) = copy.next().await.unwrap() {
        match item {
            CopyItem::Entry(entry) => entries.push(entry),
            CopyItem::Data(data) => received.extend_from_slice(&data),
            CopyItem::Failed { path, message } => panic!("{path}: {message}"),
        }
    }
    assert_eq!(received, content);
    let file = entries
        .iter()
        .find(|entry| entry.path == "srv/deep/file")
        .unwrap();
    assert_eq!((file.uid, file.gid, file.mode), (1000, 1001, 0o4750));
    assert_eq!(file.modification_time_nanos, 1_600_000_000_123_456_789);
    let link = entries.iter().find(|entry| entry.path == "srv/link").unwrap();
    assert_eq!(
        (link.kind, link.link_target.as_deref()),
        (EntryKind::Symlink, Some("deep/file"))
    );
    assert!(
        entries
            .iter()
            .any(|entry| entry.path == "srv/fifo" && entry.kind == EntryKind::Special)
    );
    assert_eq!(entries[0].path, "srv");

    // How fast.
    let mut times = Vec::new();
    for _ in 0..30 {
        let begun = Instant::now();
        let request = ExecRequest {
            command: vec!["/bin/true".into()],
            ..ExecRequest::default()
        };
        assert_eq!(run_command(&client, request).await.1, 0);
        times.push(begun.elapsed());
    }
    times.sort();
    let mut pings = Vec::new();
    for _ in 0..30 {
        let begun = Instant::now();
        client.ping(PATIENCE).await.unwrap();
        pings.push(begun.elapsed());
    }
    pings.sort();
    println!(
        "exec /bin/true: {:?}, least {:?}; ping {:?}",
        times[15], times[0], pings[15]
    );
    let (said, _) = shell(
        &client,
        "time sh -c 'i=0; while [ $i -lt 20 ]; do /bin/true; i=$((i+1)); done'",
    )
    .await;
    println!("20 times /bin/true in the guest:{said}");

    // The server dies in the middle of a transfer and comes back.
    let mut torn = client
        .copy_to(CopyTo {
            path: "/srv/torn".into(),
            ..CopyTo::default()
        })
        .await
        .unwrap();
    torn.send(&content[..200_000]).await.unwrap();
    drop((torn, copy, session, client, events));
    for round in 0..5 {
        let (client, mut events) = lab.connect(Some(&KEY)).await;
        assert!(client.is_configured());
        expect(&mut events, GuestEvent::ProgramStarted).await;
        expect(&mut events, GuestEvent::AgentReady).await;
        let (said, _) = shell(&client, "ls -A /srv; echo").await;
        assert!(
            !said.contains("torn") && !said.contains(".hypeman"),
            "round {round}: {said}"
        );
        if round % 2 == 0 {
            let flood = ExecRequest {
                command: vec!["yes".into()],
                ..ExecRequest::default()
            };
            let mut flood = client.exec(flood).await.unwrap();
            flood.next().await.unwrap();
            // Dropped with the pipe full.
            drop((flood, client, events));
        }
    }
    let wrong = hypeman_guest_api::host::GuestClient::connect(
        lab.socket().await,
        Some(&hypeman_guest_api::AgentKey([8; 32])),
        PATIENCE,
    )
    .await
    .err()
    .unwrap();
    assert!(
        matches!(wrong, hypeman_guest_api::ChannelError::NotAuthentic),
        "{wrong:?}"
    );
    let without = hypeman_guest_api::host::GuestClient::connect(lab.socket().await, None, PATIENCE)
        .await
        .err()
        .unwrap();
    assert!(
        matches!(without, hypeman_guest_api::ChannelError::KeyRequired),
        "{without:?}"
    );

    let (client, mut events) = lab.connect(Some(&KEY)).await;
    let (said, _) = shell(&client, "ps -o pid,args | grep -c [y]es").await;
    assert_eq!(said.trim(), "0", "what a session started ends with it");
    let stopping = Instant::now();
    client.shutdown(Duration::from_secs(20)).await.unwrap();
    let mut last = None;
    while let Some(event) = events.next().await {
        last = Some(event);
    }
    let Some(GuestEvent::Exited(reason)) = last else {
        panic!("{last:?}")
    };
    assert_eq!(
        (reason.code, reason.signal, reason.message.as_str()),
        (143, Some(15), "killed by SIGTERM")
    );
    client.closed().await;
    lab.ended().await;
    println!("stop: {:?}", stopping.elapsed());
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_fork_takes_over_another_identity() {
    if !is_possible() {
        return;
    }
    let mut lab = Lab::start(&[]);
    let (client, _events) = lab.connect(None).await;
    let network = |last: u8| NetworkConfig {
        address: Ipv4Addr::new(10, 0, 2, last),
        prefix_length: 24,
        gateway: Ipv4Addr::new(10, 0, 2, 2),
        dns: vec![Ipv4Addr::new(10, 0, 2, 3)],
        mac: Some(format!("02:00:00:00:00:{last:02x}")),
    };
    let mut config = program(&["sleep", "1000"]);
    config.network = Some(network(15));
    client.configure(&config, PATIENCE).await.unwrap();
    let look = "hostname; ip -4 -o addr show | grep -v ' lo ' | awk '{print $4}'; ip route | head -n 1 | cut -d' ' -f3; \
                cat /sys/class/net/e*/address; grep -c 10.0.2.3 /etc/resolv.conf; cat /etc/machine-id; date +%Y";
    let (said, _) = shell(&client, look).await;
    let before: Vec<&str> = said.lines().collect();
    assert_eq!(
        before[..5],
        ["lab", "10.0.2.15/24", "10.0.2.2", "02:00:00:00:00:0f", "1"]
    );
    assert!(
        shell(&client, "ping -c 1 -W 20 10.0.2.2").await.1 == 0,
        "the gateway answers"
    );

    let key = AgentKey([9; 32]);
    let identity = Reconfiguration {
        key: key.clone(),
        instance_id: "another".into(),
        hostname: "fork".into(),
        time_unix_nanos: 2_000_000_000_000_000_000,
        entropy: vec![1; 600],
        network: Some(network(16)),
    };
    client.reconfigure(&identity).await.unwrap();
    let (said, _) = shell(&client, look).await;
    let after: Vec<&str> = said.lines().collect();
    assert_eq!(
        after[..5],
        ["fork", "10.0.2.16/24", "10.0.2.2", "02:00:00:00:00:10", "1"]
    );
    assert_ne!(after[5], before[5]);
    assert_eq!(after[6], "2033");
    client.close();
    let (client, _events) = lab.connect(Some(&key)).await;
    client.shutdown(Duration::from_secs(20)).await.unwrap();
    lab.ended().await;
}

async fn ends_with(command: &[&str]) -> (i32, String, String) {
    let mut lab = Lab::start(&[]);
    let (client, mut events) = lab.connect(None).await;
    client.configure(&program(command), PATIENCE).await.unwrap();
    let reason = loop {
        match events.next().await {
            Some(GuestEvent::Exited(reason)) => break reason,
            Some(_) => {}
            None => panic!("no word of the end\n{}", lab.console()),
        }
    };
    assert!(events.next().await.is_none());
    lab.ended().await;
    (reason.code, reason.message, lab.log())
}

#[tokio::test]
#[ignore = "boots machines"]
async fn the_end_of_a_program_is_told_with_its_reason_and_all_its_output() {
    if !is_possible() {
        return;
    }
    let (code, message, log) =
        ends_with(&["sh", "-c", "seq 1 100000; echo last > /dev/stderr; exit 3"]).await;
    assert_eq!((code, message.as_str()), (3, "exited with code 3"));
    assert_eq!(log.lines().count(), 100_001);
    assert!(log.ends_with("100000\nlast\n"));
    assert_eq!(
        ends_with(&["no-such-program"]).await,
        (127, "command not found: no-such-program".into(), String::new())
    );
    assert_eq!(
        ends_with(&["/etc/not-executable"]).await,
        (
            126,
            "permission denied: /etc/not-executable".into(),
            String::new()
        )
    );
    let (code, message, _) = ends_with(&["sh", "-c", "x=x; while :; do x=$x$x; done"]).await;
    assert_eq!(
        (code, message.as_str()),
        (137, "killed by SIGKILL (out of memory)")
    );
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn an_image_with_its_own_init_is_served_and_shut_down() {
    if !is_possible() {
        return;
    }
    let mut lab = Lab::start(&[]);
    let (client, mut events) = lab.connect(None).await;
    let mut config = program(&["/sbin/init"]);
    config.init_mode = InitMode::Systemd;
    client.configure(&config, PATIENCE).await.unwrap();
    expect(&mut events, GuestEvent::ProgramStarted).await;
    expect(&mut events, GuestEvent::AgentReady).await;
    let (said, code) = shell(
        &client,
        "cat /proc/1/comm; cat /proc/self/oom_score_adj; cat /proc/self/cgroup",
    )
    .await;
    assert_eq!((said.as_str(), code), ("init\n0\n0::/hypeman.agent\n", 0));
    while !lab.log().contains("the init speaks") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop((client, events));
    let (client, _events) = lab.connect(Some(&KEY)).await;
    client.shutdown(Duration::from_secs(60)).await.unwrap();
    lab.ended().await;
    println!("{}", lab.log());
}

#[tokio::test]
#[ignore = "boots a machine"]
async fn a_setup_that_fails_is_told_and_remembered() {
    if !is_possible() {
        return;
    }
    let mut lab = Lab::start(&["volume.ext4"]);
    std::fs::write(lab.file("volume.ext4"), vec![0; 4 << 20]).unwrap();
    let (client, mut events) = lab.connect(None).await;
    let mut config = program(&["true"]);
    config.volumes = vec![VolumeMount {
        device: "/dev/vdc".into(),
        path: "/data".into(),
        mode: VolumeMode::Rw,
    }];
    let refused = client.configure(&config, PATIENCE).await.err().unwrap();
    assert_eq!(refused.refusal(), Some(RefusalCode::SetupFailed));
    assert!(refused.to_string().contains("/dev/vdc"), "{refused}");
    drop(client);
    assert!(matches!(
        events.next().await,
        Some(GuestEvent::SetupFailed { .. })
    ));
    drop(events);
    let (client, mut events) = lab.connect(Some(&KEY)).await;
    assert!(
        matches!(events.next().await, Some(GuestEvent::SetupFailed { message }) if message.contains("/dev/vdc"))
    );
    client.shutdown(Duration::ZERO).await.unwrap();
    lab.ended().await;
}
