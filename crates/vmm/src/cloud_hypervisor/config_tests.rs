use proptest::prelude::*;

use super::*;
use crate::Nic;

const ALL: Abilities = Abilities { balloon: true };

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
        kernel_arguments: vec!["one=1".to_owned(), "two".to_owned()],
        disks: vec![
            Disk {
                path: "/data/root.erofs".into(),
                read_only: true,
                limit: None,
            },
            Disk {
                path: "/data/overlay.raw".into(),
                read_only: false,
                limit: Some(IoLimit {
                    bytes_per_second: 1000,
                    burst_bytes_per_second: 4000,
                }),
            },
        ],
        nic: Some(Nic {
            tap: "hype-abc".to_owned(),
            mac: "02:00:00:00:00:01".to_owned(),
            download: None,
            upload: None,
        }),
        host_devices: Vec::new(),
        workload_log: "/data/abc/app.log".into(),
        vmm_log: "/data/abc/vmm.log".into(),
    }
}

fn described(spec: &MachineSpec, start: Start) -> Value {
    config(spec, ALL, start).unwrap()
}

#[test]
fn a_whole_machine_is_described_as_ever() {
    let shown = serde_json::to_string_pretty(&described(&spec(), Start::Boot)).unwrap() + "\n";
    assert_eq!(shown, include_str!("golden/boot.json"));
}

#[test]
fn memory_that_may_be_added_has_a_place_behind_the_rest() {
    let mut larger = spec();
    larger.memory_bytes = (512 << 20) + 1;
    larger.hotplug_bytes = 300 << 20;
    let zone = described(&larger, Start::Boot)["memory"]["zones"][0].clone();
    assert_eq!(zone["hotplug_size"], 384_u64 << 20);
    assert_eq!(room_for_more(&spec()), 0);
    assert_eq!(place_for_more(512 << 20), 4 << 30);
    assert_eq!(place_for_more((5 << 30) + 1), (5_u64 << 30) + HOTPLUG_BLOCK);
    // Whole blocks, beside what the machine really began with.
    let begun = 513_u64 << 20;
    assert_eq!(zone_bytes(&larger, 0), begun);
    assert_eq!(zone_bytes(&larger, larger.memory_bytes), begun);
    assert_eq!(zone_bytes(&larger, larger.memory_bytes + 1), begun + PLUG_BLOCK);
    let all = larger.memory_bytes + larger.hotplug_bytes;
    assert_eq!(zone_bytes(&larger, all), begun + (300 << 20));
    assert_eq!(zone_bytes(&larger, u64::MAX), u64::MAX);
    let command_line = |spec: &MachineSpec| described(spec, Start::Boot)["payload"]["cmdline"].to_string();
    assert!(command_line(&larger).contains("memhp_default_state=online_movable"));
    assert!(!command_line(&spec()).contains("memhp"));
}

#[test]
fn a_machine_that_goes_on_differs_in_its_memory_alone() {
    let mut restored = spec();
    restored.memory = MemoryBacking::Private("/data/memory".into());
    let start = Start::Restore {
        balloon_bytes: 7 << 20,
    };
    let mut description = described(&restored, start);
    let zone = &description["memory"]["zones"][0];
    assert_eq!(zone["file"], "/data/memory");
    assert_eq!(zone["shared"], false);
    assert_eq!(description["memory"]["thp"], false);
    assert_eq!(description["balloon"]["size"], 7 << 20);
    let booted = described(&spec(), Start::Boot);
    for part in ["memory", "balloon"] {
        description[part] = booted[part].clone();
    }
    assert_eq!(description, booted);
}

#[test]
fn every_disk_is_raw_and_alone() {
    for disk in described(&spec(), Start::Boot)["disks"].as_array().unwrap() {
        assert_eq!(disk["image_type"], "Raw");
        assert_eq!(disk["backing_files"], false);
    }
}

#[test]
fn a_balloon_that_ends_the_machine_is_left_out() {
    let description = config(&spec(), Abilities { balloon: false }, Start::Boot).unwrap();
    assert!(description.get("balloon").is_none());
}

#[test]
fn memory_has_a_hole_below_four_gibibytes() {
    assert_eq!(segments(1 << 30), [1 << 30]);
    assert_eq!(segments(3 << 30), [3 << 30]);
    assert_eq!(segments((3 << 30) + (1 << 20)), [3 << 30, 1 << 20]);
    assert_eq!(segments(5 << 30), [3 << 30, 2 << 30]);
}

#[test]
fn what_no_machine_can_be_is_refused() {
    let refused = |change: fn(&mut MachineSpec)| {
        let mut spec = spec();
        change(&mut spec);
        matches!(config(&spec, ALL, Start::Boot), Err(VmmError::InvalidSpec(_)))
    };
    assert!(!refused(|_| {}));
    assert!(refused(|spec| spec.id = "a b".to_owned()));
    assert!(refused(|spec| spec.cpus = 0));
    assert!(refused(|spec| spec.cpus = 255));
    assert!(refused(|spec| spec.memory_bytes = 1 << 20));
    assert!(refused(|spec| spec.memory_bytes = u64::MAX));
    assert!(refused(
        |spec| spec.kernel_arguments = vec!["two words".to_owned()]
    ));
    assert!(refused(|spec| spec.kernel_arguments = vec!["x".repeat(3000)]));
    assert!(refused(|spec| spec.nic.as_mut().unwrap().tap = "a/b".to_owned()));
    assert!(refused(|spec| spec.nic.as_mut().unwrap().mac = "02:00".to_owned()));
    assert!(refused(|spec| spec.disks[0].path = "relative".into()));
    assert!(refused(|spec| spec.disks[0].path = "/a\nb".into()));
    assert!(refused(
        |spec| spec.disks = vec![spec.disks[0].clone(); MAX_DISKS + 1]
    ));
    assert!(refused(
        |spec| spec.runtime_directory = format!("/{}", "x".repeat(90)).into()
    ));
}

#[test]
fn host_devices_are_named_by_their_address_alone() {
    let devices = passed_through(&["0000:01:00.0".to_owned(), "0001:af:1f.7".to_owned()]).unwrap();
    assert_eq!(devices[1]["path"], "/sys/bus/pci/devices/0001:af:1f.7");
    assert_eq!(devices[1]["id"], "host1");
    for address in [
        "",
        "0000:01:00",
        "../../../x",
        "0000:01:00.0/../..",
        "0000:01:00.0 ",
        "0000:0G:00.0",
    ] {
        assert!(passed_through(&[address.to_owned()]).is_err(), "{address}");
    }
}

proptest! {
    /// Whatever words a spec has, they stay values: the description has the same members as ever.
    #[test]
    fn no_word_becomes_an_option(
        path in "/[ -~]{0,30}",
        argument in "[!-~]{1,30}",
        tap in "[a-zA-Z0-9._-]{1,15}",
    ) {
        let mut hostile = spec();
        hostile.disks[0].path = path.clone().into();
        hostile.kernel_arguments = vec![argument.clone()];
        hostile.nic.as_mut().unwrap().tap = tap.clone();
        hostile.initramfs = path.clone().into();
        let text = described(&hostile, Start::Boot).to_string();
        let mut read: Value = serde_json::from_str(&text).unwrap();
        prop_assert_eq!(&read["disks"][0]["path"], &json!(path));
        prop_assert_eq!(&read["net"][0]["tap"], &json!(tap));
        let line = read["payload"]["cmdline"].as_str().unwrap().to_owned();
        let last = format!(" {}", argument);
        prop_assert!(line.ends_with(&last));
        let plain = described(&spec(), Start::Boot);
        read["disks"][0]["path"] = plain["disks"][0]["path"].clone();
        read["net"][0]["tap"] = plain["net"][0]["tap"].clone();
        read["payload"] = plain["payload"].clone();
        prop_assert_eq!(read, plain);
    }

    #[test]
    fn a_bucket_lets_no_more_through_than_was_promised(sustained in 1_u64..1 << 40, burst in 0_u64..1 << 42) {
        let limit = IoLimit { bytes_per_second: sustained, burst_bytes_per_second: burst };
        let bucket = bucket(limit);
        let (size, milliseconds) = (bucket["size"].as_u64().unwrap(), bucket["refill_time"].as_u64().unwrap());
        prop_assert_eq!(size, burst.max(sustained));
        prop_assert!(u128::from(size) * 1000 <= u128::from(sustained) * u128::from(milliseconds));
    }
}
