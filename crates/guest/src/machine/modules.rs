//! Loads the kernel modules that the initramfs brings, in the order that it names.
//!
//! ```text
//! /modules/order:   now  /modules/virtio.ko
//!                   now  /modules/virtio_net.ko virtio:d00000001v*      only if a device is there that matches
//!                   late /modules/virtio_balloon.ko virtio:d00000005v*  and once the program runs
//! ```
//!
//! The late ones are opened early: the place where they lie is gone by then.

use std::{
    fs::{self, File},
    path::Path,
};

use rustix::{io::Errno, system::finit_module};

use crate::log_line;

const ORDER: &str = "/modules/order";

/// Buses whose devices are all known when the kernel starts us; those of virtio appear with its transports.
const FIXED_BUSES: [&str; 3] = ["pci", "acpi", "platform"];
const VIRTIO: &str = "virtio";

/// `MODULE_INIT_COMPRESSED_FILE` of the kernel.
const COMPRESSED: i32 = 4;

/// One line of the list.
#[derive(Debug, PartialEq, Eq)]
struct Entry<'a> {
    late: bool,
    path: &'a str,
    patterns: Vec<&'a str>,
}

/// A module that waits for its time.
struct Module {
    path: String,
    file: File,
}

/// The modules that nothing waits for.
pub(super) struct Late(Vec<Module>);

/// Loads what the boot needs. A kernel with everything built in has no list; a module that fails is logged and
/// skipped, because whether it was needed shows later and better.
pub(super) fn load() -> Late {
    let mut late = Vec::new();
    let mut devices = Devices::default();
    let order = fs::read_to_string(ORDER).unwrap_or_default();
    for entry in order.lines().filter_map(entry) {
        if !entry.patterns.is_empty() && !entry.patterns.iter().any(|pattern| devices.have(pattern)) {
            continue;
        }
        let file = match File::open(entry.path) {
            Ok(file) => file,
            Err(error) => {
                log_line!("module {}: {error}", entry.path);
                continue;
            }
        };
        let module = Module {
            path: entry.path.to_owned(),
            file,
        };
        if entry.late {
            late.push(module);
            continue;
        }
        module.load();
        devices.may_be_more(&entry);
    }
    Late(late)
}

/// What the devices say of themselves, read when first asked for.
#[derive(Default)]
struct Devices {
    fixed: Option<Vec<String>>,
    virtio: Option<Vec<String>>,
}

impl Devices {
    fn have(&mut self, pattern: &str) -> bool {
        let known = match pattern.starts_with(VIRTIO) {
            true => self.virtio.get_or_insert_with(|| aliases(&[VIRTIO])),
            false => self.fixed.get_or_insert_with(|| aliases(&FIXED_BUSES)),
        };
        known.iter().any(|device| matches(pattern, device))
    }

    /// Any module but a driver of virtio devices may have brought such devices.
    fn may_be_more(&mut self, loaded: &Entry<'_>) {
        let is_driver = |pattern: &&str| pattern.starts_with(VIRTIO);
        if loaded.patterns.is_empty() || !loaded.patterns.iter().all(is_driver) {
            self.virtio = None;
        }
    }
}

impl Late {
    /// Loads them. Takes a while: call it where nothing waits.
    pub(super) fn load(self) {
        for module in self.0 {
            module.load();
        }
    }
}

impl Module {
    fn load(self) {
        let flags = match Path::new(&self.path).extension().is_some_and(|kind| kind != "ko") {
            true => COMPRESSED,
            false => 0,
        };
        match finit_module(&self.file, c"", flags) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => log_line!("module {}: {error}", self.path),
        }
    }
}

fn entry(line: &str) -> Option<Entry<'_>> {
    let mut words = line.split_ascii_whitespace();
    let late = words.next()? == "late";
    Some(Entry {
        late,
        path: words.next()?,
        patterns: words.collect(),
    })
}

fn aliases(buses: &[&str]) -> Vec<String> {
    buses
        .iter()
        .filter_map(|bus| fs::read_dir(format!("/sys/bus/{bus}/devices")).ok())
        .flat_map(|directory| directory.flatten())
        .filter_map(|device| fs::read_to_string(device.path().join("modalias")).ok())
        .map(|alias| alias.trim_end().to_owned())
        .collect()
}

/// Whether a pattern with `*` for any characters matches.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(name) = name.strip_prefix(start) else {
        return false;
    };
    (0..=name.len())
        .filter(|at| name.is_char_boundary(*at))
        .any(|at| matches(rest, &name[at..]))
}

#[cfg(test)]
mod tests {
    use super::{Entry, entry, matches};

    #[test]
    fn a_line_says_when_what_and_for_which_devices() {
        let line = "late /modules/virtio_balloon.ko virtio:d00000005v* virtio:d00000099v*";
        let expected = Entry {
            late: true,
            path: "/modules/virtio_balloon.ko",
            patterns: vec!["virtio:d00000005v*", "virtio:d00000099v*"],
        };
        assert_eq!(entry(line), Some(expected));
        assert_eq!(
            entry("now /modules/a.ko").map(|entry| (entry.late, entry.patterns.len())),
            Some((false, 0))
        );
        assert_eq!(entry(""), None);
        assert_eq!(entry("now"), None);
    }

    #[test]
    fn patterns_are_those_of_the_kernel() {
        let q35_disk = "pci:v00001AF4d00001042sv00001AF4sd00001100bc01sc00i00";
        assert!(matches("pci:v00001AF4d*sv*sd*bc*sc*i*", q35_disk));
        assert!(!matches(
            "pci:v00001AF4d*sv*sd*bc*sc*i*",
            "pci:v00008086d00002918sv00001AF4sd00001100bc06sc01i00"
        ));
        assert!(matches("acpi*:LNRO0005:*", "acpi:LNRO0005:"));
        assert!(matches("virtio:d00000001v*", "virtio:d00000001v554D4551"));
        assert!(!matches("virtio:d00000001v*", "virtio:d00000010v554D4551"));
        assert!(matches("exactly", "exactly") && !matches("exactly", "exactly so"));
    }
}
