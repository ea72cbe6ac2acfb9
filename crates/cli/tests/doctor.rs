//! `hypeman doctor` on a host where a server has run.

// Helpers of tests may panic like the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// What is asked of a kernel before it boots: an ELF image with a PVH note, a banner, and the names of its drivers.
fn kernel(release: &str, drivers: &str) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(64, 0);
    image[32] = 64;
    image[54] = 56;
    image[56] = 1;
    let mut header = vec![0; 56];
    header[0] = 4;
    header[8] = 120;
    header[32] = 20;
    image.extend(header);
    for word in [4_u32, 4, 18] {
        image.extend(word.to_le_bytes());
    }
    image.extend(b"Xen\0\0\0\x10\0");
    image.extend(format!("Linux version {release} (test) {drivers}").as_bytes());
    image
}

fn put(path: &Path, bytes: &[u8]) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The line of the report about the kernel.
fn kernel_line(home: &Path) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_hypeman"))
        .args(["doctor", "--format", "json"])
        .env_clear()
        .env("HOME", home)
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("DATA_DIR", home.join("data"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let lines = report.as_array().unwrap();
    let line = lines.iter().find(|line| line["check"] == "kernel");
    line.unwrap().clone()
}

#[test]
fn a_kernel_that_a_server_has_unpacked_is_not_taken_for_one_to_choose() {
    let home = tempfile::tempdir().unwrap();
    let all = "virtio_blk virtio_console overlay erofs";
    let cache = home.path().join(".cache/hypeman/kernel");
    put(
        &cache.join("boot/vmlinuz-6.1.0-9-cloud-amd64"),
        &kernel("6.1.0-9-cloud-amd64", all),
    );
    // What a server unpacks lies alone: its modules are in the initramfs.
    let system = home.path().join("data/system/kernel");
    put(
        &system.join("a".repeat(64)).join("vmlinux"),
        &kernel("6.1.0-8-cloud-amd64", "none of them"),
    );
    let line = kernel_line(home.path());
    assert_eq!(line["status"], "ok", "{line}");
    assert!(
        line["found"].as_str().unwrap().starts_with("6.1.0-9-cloud-amd64"),
        "{line}"
    );

    // One that somebody put there by name is the server's choice, and so the one that is told of.
    put(
        &system.join("6.1.10/vmlinux"),
        &kernel("6.1.10", "virtio_blk virtio_console overlay"),
    );
    let line = kernel_line(home.path());
    assert_eq!(line["status"], "fail", "{line}");
    assert!(line["found"].as_str().unwrap().contains("no erofs"), "{line}");
    assert!(
        line["fix"].as_str().unwrap().starts_with("kernel/fetch"),
        "{line}"
    );
}
