use super::*;

/// The smallest module: an ELF file with one section that says what it depends on.
fn module(information: &str) -> Vec<u8> {
    let names = b"\0.modinfo\0.shstrtab\0";
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(64, 0);
    let information_at = bytes.len();
    bytes.extend_from_slice(information.as_bytes());
    let names_at = bytes.len();
    bytes.extend_from_slice(names);
    let headers_at = bytes.len() as u64;
    for (name, at, length) in [
        (0, 0, 0),
        (1, information_at, information.len()),
        (10, names_at, names.len()),
    ] {
        let mut header = vec![0; 64];
        header[0] = name;
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[32..40].copy_from_slice(&(length as u64).to_le_bytes());
        bytes.extend(header);
    }
    bytes[40..48].copy_from_slice(&headers_at.to_le_bytes());
    bytes[58] = 64;
    bytes[60] = 3;
    bytes[62] = 2;
    bytes
}

fn package(modules: &[(&str, &str)], built_in: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (path, information) in modules {
        let path = directory.path().join("kernel").join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut content = module(information);
        if path.extension().is_some_and(|extension| extension == "zst") {
            content = zstd::encode_all(content.as_slice(), 1).unwrap();
        }
        fs::write(path, content).unwrap();
    }
    fs::write(directory.path().join("modules.builtin"), built_in).unwrap();
    directory
}

fn names(directory: &Path) -> Vec<String> {
    needed(directory, "6.1")
        .unwrap()
        .into_iter()
        .map(|module| module.name)
        .collect()
}

#[test]
fn each_module_comes_after_what_it_needs_and_once() {
    let package = package(
        &[
            ("drivers/virtio/virtio.ko", "license=GPL\0depends=\0"),
            ("drivers/virtio/virtio_ring.ko.zst", "depends=virtio\0"),
            ("drivers/block/virtio_blk.ko", "depends=virtio_ring,virtio\0"),
            (
                "drivers/char/virtio-console.ko",
                "depends=virtio\0softdep=pre: crc32c other post: later\0",
            ),
            ("crypto/crc32c_generic.ko", "depends=\0"),
            ("other/later.ko", "depends=\0"),
            ("fs/unrelated.ko", "depends=\0"),
        ],
        "kernel/fs/overlayfs/overlay.ko\nkernel/fs/erofs/erofs.ko\n",
    );
    let order = names(package.path());
    assert_eq!(
        order,
        [
            "virtio",
            "crc32c_generic",
            "virtio_console",
            "virtio_ring",
            "virtio_blk"
        ]
    );
}

#[test]
fn a_circle_and_a_broken_module_do_not_hang_us() {
    let package = package(
        &[
            ("a/virtio_blk.ko", "depends=b\0"),
            ("a/b.ko", "depends=virtio-blk\0"),
            ("a/overlay.ko", "\0\0"),
        ],
        "x/erofs.ko\nx/virtio_console.ko\n",
    );
    fs::write(package.path().join("kernel/a/virtio_net.ko"), b"no ELF at all").unwrap();
    assert_eq!(
        names(package.path()),
        ["b", "virtio_blk", "overlay", "virtio_net"]
    );
}

#[test]
fn a_kernel_without_a_needed_driver_is_refused_by_name() {
    let package = package(&[("a/virtio_blk.ko", "")], "x/erofs.ko\nx/overlay.ko\n");
    let error = needed(package.path(), "6.1.0-test").unwrap_err().to_string();
    assert!(
        error.contains("virtio_console") && error.contains("6.1.0-test"),
        "{error}"
    );
}

#[test]
fn a_driver_waits_for_its_device_and_what_it_builds_on_with_it() {
    let package = package(
        &[
            ("a/virtio.ko", "depends=\0"),
            ("a/virtio_ring.ko", "depends=virtio\0"),
            (
                "a/virtio_pci.ko",
                "alias=pci:v00001AF4d*sv*sd*bc*sc*i*\0depends=legacy,virtio_ring\0",
            ),
            ("a/legacy.ko", "depends=\0"),
            (
                "a/virtio_mmio.ko",
                "alias=acpi*:LNRO0005:*\0depends=virtio_ring\0",
            ),
            (
                "a/virtio_net.ko",
                "alias=virtio:d00000001v*\0depends=virtio,failover\0",
            ),
            ("a/failover.ko", "alias=of no bus\0"),
            (
                "a/virtio_balloon.ko",
                "alias=virtio:d00000005v*\0depends=virtio\0",
            ),
            ("a/erofs.ko", "alias=fs-erofs\0"),
        ],
        "x/virtio_console.ko\nx/virtio_blk.ko\nx/overlay.ko\n",
    );
    let list: String = needed(package.path(), "6.1")
        .unwrap()
        .into_iter()
        .map(|module| module.need.line(&module.name))
        .collect();
    assert_eq!(
        list,
        "now legacy pci:v00001AF4d*sv*sd*bc*sc*i*\n\
         now virtio\n\
         now virtio_ring\n\
         now virtio_pci pci:v00001AF4d*sv*sd*bc*sc*i*\n\
         now virtio_mmio\n\
         now erofs\n\
         now failover virtio:d00000001v*\n\
         now virtio_net virtio:d00000001v*\n\
         late virtio_balloon virtio:d00000005v*\n"
    );
}
