use super::*;

/// An ELF image with a PVH note and a banner: all that is asked of a kernel before it boots.
fn kernel(release: &str) -> Vec<u8> {
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
    image
        .extend(format!("Linux version {release} (test) virtio_blk virtio_console overlay erofs").as_bytes());
    image
}

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let place = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        fs::write(place.source(), kernel("6.1.9-small")).unwrap();
        place
    }

    fn source(&self) -> PathBuf {
        self.directory.path().join("vmlinux")
    }

    fn system(&self) -> PathBuf {
        self.directory.path().join("system")
    }

    fn open(&self) -> Kernels {
        let options = KernelOptions {
            kernel: Some(self.source()),
            search: Vec::new(),
        };
        Kernels::open(&self.system(), options).unwrap()
    }
}

#[test]
fn the_same_inputs_give_the_same_id_also_after_a_restart() {
    let place = Place::new();
    let first = place.open().prepare(b"guest").unwrap();
    assert_eq!(first.kernel_release, "6.1.9-small");
    assert_eq!(fs::read(&first.kernel).unwrap(), kernel("6.1.9-small"));
    assert!(first.modules.is_empty());
    let second = place.open().prepare(b"guest").unwrap();
    assert_eq!(first, second);
    assert_eq!(place.open().load(&first.id).unwrap(), first);
}

#[test]
fn an_instance_keeps_its_pair_when_kernel_and_guest_change() {
    let place = Place::new();
    let kernels = place.open();
    let old = kernels.prepare(b"guest 1").unwrap();
    fs::write(place.source(), kernel("6.1.10-small")).unwrap();
    let new = kernels.prepare(b"guest 2").unwrap();
    assert_ne!(old.id, new.id);
    assert_eq!(kernels.load(&old.id).unwrap(), old);

    assert_eq!(kernels.prune(&HashSet::from([new.id.clone()])).unwrap(), 1);
    assert!(matches!(kernels.load(&old.id), Err(KernelError::UnknownId(_))));
    assert!(!old.kernel.exists() && !old.initramfs.exists());
    assert_eq!(kernels.load(&new.id).unwrap(), new);
}

#[test]
fn a_small_kernel_is_preferred_once_it_is_built_and_an_instance_keeps_what_it_started_with() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    fs::create_dir_all(cache.join("boot")).unwrap();
    fs::write(
        cache.join("boot/vmlinuz-6.1.0-9-cloud-amd64"),
        kernel("6.1.0-9-cloud-amd64"),
    )
    .unwrap();
    let system = directory.path().join("system");
    let open = || {
        let options = KernelOptions {
            kernel: None,
            search: vec![cache.clone()],
        };
        Kernels::open(&system, options).unwrap()
    };
    let old = open().prepare(b"guest").unwrap();
    assert_eq!(old.kernel_release, "6.1.0-9-cloud-amd64");
    fs::write(cache.join("vmlinux"), kernel("6.1.9-small")).unwrap();
    let new = open().prepare(b"guest").unwrap();
    assert_eq!(new.kernel_release, "6.1.9-small");
    assert_eq!(open().load(&old.id).unwrap(), old);
}

#[test]
fn damage_and_leftovers_of_a_crash_are_repaired() {
    let place = Place::new();
    let made = place.open().prepare(b"guest").unwrap();
    fs::write(&made.kernel, b"damaged").unwrap();
    fs::write(&made.initramfs, b"").unwrap();
    let leftover = made.kernel.with_extension("99.tmp");
    fs::write(&leftover, b"half").unwrap();
    let again = place.open().prepare(b"guest").unwrap();
    assert_eq!(again, made);
    assert_eq!(fs::read(&again.kernel).unwrap(), kernel("6.1.9-small"));
    assert!(fs::metadata(&again.initramfs).unwrap().len() > 0);
    assert!(!leftover.exists());
}

#[test]
fn a_kernel_that_needs_modules_is_not_used_without_them() {
    let place = Place::new();
    let image = String::from_utf8_lossy(&kernel("6.1.9")).replace("erofs", "");
    fs::write(place.source(), image).unwrap();
    let error = place.open().prepare(b"guest").unwrap_err();
    assert!(
        matches!(&error, KernelError::MissingModule { module, .. } if module == "erofs"),
        "{error}"
    );
}

#[test]
fn an_id_from_elsewhere_names_no_path() {
    let kernels = Place::new().open();
    for id in ["", "../../etc/passwd", "latest", &"0".repeat(64)] {
        assert!(matches!(kernels.load(id), Err(KernelError::UnknownId(_))), "{id}");
    }
}

/// The real thing, where `HYPEMAN_TEST_KERNEL` is what `kernel/fetch` unpacked.
#[test]
fn a_distributions_package_gives_a_kernel_and_its_modules() {
    let package = std::env::var_os("HYPEMAN_TEST_KERNEL").map_or_else(PathBuf::new, PathBuf::from);
    if !package.join("boot").is_dir() {
        println!("SKIPPED: HYPEMAN_TEST_KERNEL names no unpacked kernel package");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let options = KernelOptions {
        kernel: Some(package),
        search: Vec::new(),
    };
    let made = Kernels::open(directory.path(), options)
        .unwrap()
        .prepare(b"guest")
        .unwrap();
    println!("{made:?}");
    let place = |name: &str| made.modules.iter().position(|module| module == name).unwrap();
    assert!(place("virtio") < place("virtio_blk") && place("virtio_ring") < place("virtio_console"));
    assert!(place("libcrc32c") < place("erofs"));
    assert!(image::release(&fs::read(&made.kernel).unwrap()).unwrap() == made.kernel_release);
}
