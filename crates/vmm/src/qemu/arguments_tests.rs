use std::path::PathBuf;

use proptest::prelude::*;

use super::*;
use crate::{IoLimit, Nic};

const SOCKETS: Sockets = Sockets { qmp: 11, agent: 12 };

fn host(accelerator: Accelerator) -> Host {
    Host {
        accelerator,
        q35_name: "pc-q35-7.2".to_owned(),
        firmware: Some("/usr/share/qemu/qboot.rom".into()),
        tsc_khz: (accelerator == Accelerator::Tcg).then_some(2_596_132),
        read_only_memory_files: accelerator == Accelerator::Kvm,
        sandbox: true,
    }
}

fn spec() -> MachineSpec {
    MachineSpec {
        id: "abc".to_owned(),
        runtime_directory: "/run/m/abc".into(),
        cpus: 2,
        memory_bytes: 512 << 20,
        memory: MemoryBacking::Anonymous,
        hotplug_bytes: 0,
        kernel: "/data/vmlinux".into(),
        initramfs: "/data/initramfs.cpio".into(),
        kernel_arguments: Vec::new(),
        disks: vec![
            Disk {
                path: "/data/root.erofs".into(),
                read_only: true,
                limit: None,
            },
            Disk {
                path: "/data/overlay.raw".into(),
                read_only: false,
                limit: None,
            },
        ],
        nic: None,
        host_devices: Vec::new(),
        workload_log: "/data/abc/app.log".into(),
        vmm_log: "/data/abc/vmm.log".into(),
    }
}

fn full() -> MachineSpec {
    let mut spec = spec();
    spec.kernel_arguments = vec!["one=1".to_owned(), "two".to_owned()];
    spec.disks[1].limit = Some(IoLimit {
        bytes_per_second: 1000,
        burst_bytes_per_second: 4000,
    });
    spec.nic = Some(Nic {
        tap: "hype-abc".to_owned(),
        mac: "02:00:00:00:00:01".to_owned(),
        download: None,
        upload: None,
    });
    spec
}

/// One option a line, as in the golden files.
fn shown(board: Board, spec: &MachineSpec, accelerator: Accelerator, start: Start) -> String {
    let words = arguments(
        board,
        spec,
        &host(accelerator),
        SOCKETS,
        start,
        &Handed::default(),
    )
    .unwrap();
    let mut text = String::new();
    for word in words {
        let word = word.into_string().unwrap();
        let is_option = word.starts_with('-') && !word.contains(' ');
        text.push_str(if is_option && !text.is_empty() {
            "\n"
        } else if text.is_empty() {
            ""
        } else {
            " "
        });
        text.push_str(&word);
    }
    text + "\n"
}

/// Compares with a file beside this one; `HYPEMAN_BLESS=1` writes it anew.
fn assert_golden(name: &str, actual: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("src/qemu/golden")
        .join(name);
    if std::env::var_os("HYPEMAN_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert_eq!(actual, expected, "{name}: set HYPEMAN_BLESS=1 to accept");
}

#[test]
fn command_lines_are_as_agreed() {
    let (kvm, tcg) = (Accelerator::Kvm, Accelerator::Tcg);
    let boot = Start::Boot;
    assert_golden("q35-tcg.txt", &shown(Board::Q35, &spec(), tcg, boot));
    assert_golden("q35-kvm-full.txt", &shown(Board::Q35, &full(), kvm, boot));
    assert_golden("microvm-tcg-full.txt", &shown(Board::Microvm, &full(), tcg, boot));
    let restore = Start::Restore { state: 13 };
    let mut fork = full();
    fork.memory = MemoryBacking::Private("/data/memory/raw".into());
    assert_golden("q35-kvm-restore.txt", &shown(Board::Q35, &fork, kvm, restore));
    assert_golden(
        "microvm-tcg-restore.txt",
        &shown(Board::Microvm, &fork, tcg, restore),
    );
}

/// The state of a machine is that of devices at their places: a restored one must have the same.
#[test]
fn a_restored_machine_has_the_devices_of_the_captured_one() {
    for board in [Board::Q35, Board::Microvm] {
        let devices = |start| -> Vec<OsString> {
            let words = arguments(
                board,
                &full(),
                &host(Accelerator::Tcg),
                SOCKETS,
                start,
                &Handed::default(),
            )
            .unwrap();
            let values = words.iter().skip(1).zip(&words);
            values
                .filter(|(_, option)| {
                    ["-device", "-cpu", "-smp", "-m", "-bios"]
                        .map(OsString::from)
                        .contains(option)
                })
                .map(|(value, _)| value.clone())
                .collect()
        };
        assert!(devices(Start::Boot).len() > 10);
        assert_eq!(devices(Start::Boot), devices(Start::Restore { state: 13 }));
    }
}

#[test]
fn commas_and_quotes_in_paths_stay_in_their_paths() {
    let mut spec = spec();
    spec.workload_log = "/data/a,path=/etc/shadow/app.log".into();
    spec.disks[1].path = "/data/b\",\"driver\":\"host_device".into();
    let text = shown(Board::Q35, &spec, Accelerator::Tcg, Start::Boot);
    assert!(
        text.contains("file,id=log,path=/data/a,,path=/etc/shadow/app.log,append=on"),
        "{text}"
    );
    assert!(
        text.contains(r#""filename":"/data/b\",\"driver\":\"host_device""#),
        "{text}"
    );
}

#[test]
fn what_cannot_be_a_machine_is_refused() {
    let refused = |change: fn(&mut MachineSpec)| {
        let mut spec = full();
        change(&mut spec);
        let outcome = arguments(
            Board::Microvm,
            &spec,
            &host(Accelerator::Tcg),
            SOCKETS,
            Start::Boot,
            &Handed::default(),
        );
        assert!(matches!(outcome, Err(VmmError::InvalidSpec(_))), "{outcome:?}");
    };
    refused(|spec| spec.id = "a,process=x".to_owned());
    refused(|spec| spec.id = String::new());
    refused(|spec| spec.nic.as_mut().unwrap().tap = "tap0,script=/bin/sh".to_owned());
    refused(|spec| spec.nic.as_mut().unwrap().mac = "02:00:00:00:00:0g".to_owned());
    refused(|spec| spec.kernel_arguments.push("a b".to_owned()));
    refused(|spec| spec.kernel_arguments.push("a\nb".to_owned()));
    refused(|spec| spec.kernel_arguments.push("x".repeat(3000)));
    refused(|spec| spec.cpus = 0);
    refused(|spec| spec.memory_bytes = 1);
    refused(|spec| spec.disks[0].path = "relative".into());
    refused(|spec| spec.disks[0].path = "/line\nbreak".into());
    refused(|spec| spec.disks = vec![spec.disks[0].clone(); 20]);
}

proptest! {
    /// However strange the words of a spec are, the options stay the same ones.
    #[test]
    fn no_word_of_a_spec_becomes_an_option(name in "/[^\\x00-\\x1f\\x7f-\\x9f]{0,40}", argument in "[!-~]{1,40}") {
        let mut spec = full();
        spec.runtime_directory = PathBuf::from(&name);
        spec.kernel = PathBuf::from(&name);
        spec.memory = MemoryBacking::Private(PathBuf::from(&name));
        spec.disks[0].path = PathBuf::from(&name);
        spec.vmm_log = PathBuf::from(&name);
        spec.kernel_arguments = vec![argument];
        let host = host(Accelerator::Tcg);
        let strange = arguments(Board::Q35, &spec, &host, SOCKETS, Start::Boot, &Handed::default()).unwrap();
        let mut plain = full();
        plain.memory = MemoryBacking::Private("/data/memory/raw".into());
        let plain = arguments(Board::Q35, &plain, &host, SOCKETS, Start::Boot, &Handed::default()).unwrap();
        prop_assert_eq!(strange.len(), plain.len());
        for (strange, plain) in strange.iter().zip(&plain) {
            let is_option = plain.to_str().unwrap().starts_with('-');
            prop_assert!(!is_option || strange == plain);
            // Every JSON value is still one value.
            if plain.to_str().unwrap().starts_with('{') {
                let value: Value = serde_json::from_str(strange.to_str().unwrap()).unwrap();
                let reference: Value = serde_json::from_str(plain.to_str().unwrap()).unwrap();
                let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
                prop_assert_eq!(keys(&value), keys(&reference));
            }
        }
    }
}

#[test]
fn what_is_handed_over_is_named_by_its_descriptor() {
    let mut spec = full();
    spec.disks[1].path = "/dev/fdset/2".into();
    let handed = Handed {
        tap: Some(20),
        files: vec![21, 22],
    };
    let words = arguments(
        Board::Q35,
        &spec,
        &host(Accelerator::Tcg),
        SOCKETS,
        Start::Boot,
        &handed,
    );
    let words: Vec<String> = words
        .unwrap()
        .into_iter()
        .map(|word| word.into_string().unwrap())
        .collect();
    let value_of = |option: &str| {
        let values = words.windows(2).filter(|pair| pair[0] == option);
        values.map(|pair| pair[1].clone()).collect::<Vec<_>>()
    };
    assert_eq!(value_of("-add-fd"), ["fd=21,set=1", "fd=22,set=2"]);
    assert_eq!(value_of("-netdev"), ["tap,id=net,fd=20,vhost=off"]);
    assert!(words.iter().any(|word| word.contains("/dev/fdset/2")));
}
