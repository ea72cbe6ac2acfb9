//! Which kernel modules a guest needs, in the order in which they can be loaded, and what each waits for.
//!
//! A module names what it depends on, and the devices that it drives, in its own `.modinfo` section. That is read
//! instead of `modules.dep` and `modules.alias`, because a package that was merely unpacked has none.
//!
//! Each module costs a guest milliseconds of its boot, so a driver is loaded only where its device is, and one that
//! no program waits for only after the program has started. What another module needs is loaded whenever any module
//! is that needs it. Signatures are left out where the kernel does not insist on them: checking one takes longer than
//! loading the module.

mod need;
mod signature;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::KernelError;
use crate::decompress::decompress;
use crate::elf::Elf;

pub(crate) use need::Need;
pub(crate) use signature::{are_demanded, without_signature};

/// Without these no guest of ours comes up.
pub(crate) const REQUIRED: [&str; 4] = ["virtio_blk", "virtio_console", "overlay", "erofs"];
/// Taken where the kernel has them: transports first, so that devices are found while the rest loads.
const WANTED: [&str; 14] = [
    "virtio_pci",
    "virtio_mmio",
    "virtio_console",
    "virtio_blk",
    "erofs",
    "overlay",
    "ext4",
    "virtio_net",
    "virtio_rng",
    "virtio_balloon",
    "virtio_mem",
    "vmw_vsock_virtio_transport",
    "pvpanic_mmio",
    "tcp_diag",
];
/// Whoever needs these can wait until the program runs: the host has given the first entropy, and nobody takes
/// memory from a guest that boots, or gives it more. The last one ends the connections that a fork has from its source.
const LATE: [&str; 5] = [
    "virtio_rng",
    "virtio_balloon",
    "virtio_mem",
    "pvpanic_mmio",
    "tcp_diag",
];
/// Its devices can be named on the kernel's command line, where nothing asks for a driver.
const ALWAYS: [&str; 1] = ["virtio_mmio"];
/// Some names in dependencies are algorithms, not modules.
const ALGORITHMS: [(&str, &str); 1] = [("crc32c", "crc32c_generic")];
const MODULE_LIMIT: usize = 64 * 1024 * 1024;
/// More entries than any kernel package has.
const ENTRIES_LIMIT: usize = 200_000;

/// One module, expanded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// As in `virtio_blk`.
    pub(crate) name: String,
    /// The `.ko` file.
    pub(crate) content: Vec<u8>,
    /// When it is to be loaded.
    pub(crate) need: Need,
}

/// The modules of `directory` (as `/lib/modules/<release>`) that a guest needs, each after what it needs itself.
pub(crate) fn needed(directory: &Path, release: &str) -> Result<Vec<Module>, KernelError> {
    let present = index(&directory.join("kernel"))?;
    let built_in: HashSet<String> = fs::read_to_string(directory.join("modules.builtin"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| module_name(Path::new(line)))
        .collect();
    for required in REQUIRED {
        if !present.contains_key(required) && !built_in.contains(required) {
            return Err(KernelError::MissingModule {
                release: release.to_owned(),
                module: required.to_owned(),
                directory: directory.to_owned(),
            });
        }
    }
    let mut closure = Closure {
        present,
        taken: HashSet::new(),
        order: Vec::new(),
        depends: Vec::new(),
    };
    for wanted in WANTED {
        closure.take(wanted)?;
    }
    Ok(closure.judged())
}

struct Closure {
    present: BTreeMap<String, PathBuf>,
    taken: HashSet<String>,
    order: Vec<Module>,
    /// What each of `order` depends on.
    depends: Vec<Vec<String>>,
}

impl Closure {
    fn take(&mut self, name: &str) -> Result<(), KernelError> {
        let name = resolved(name);
        let Some(path) = self.present.get(name).cloned() else {
            return Ok(());
        };
        // Marked before its dependencies: a circle in a broken package must not be followed for ever.
        if !self.taken.insert(name.to_owned()) {
            return Ok(());
        }
        let packed = fs::read(&path).map_err(KernelError::io("read", &path))?;
        let content = decompress(&packed, MODULE_LIMIT)
            .map_err(|error| KernelError::unusable(&path, error.to_string()))?;
        let depends = dependencies(&content);
        for dependency in &depends {
            self.take(dependency)?;
        }
        let need = match WANTED.contains(&name) {
            true => own_need(name, &content),
            false => Need::Never,
        };
        self.order.push(Module {
            name: name.to_owned(),
            content,
            need,
        });
        self.depends.push(depends);
        Ok(())
    }

    /// The order, each with what it and all that build on it wait for.
    fn judged(mut self) -> Vec<Module> {
        // Who depends on a module comes after it, so from the end each is final when its turn comes.
        for index in (0..self.order.len()).rev() {
            let need = self.order[index].need.clone();
            for dependency in &self.depends[index] {
                let before = &mut self.order[..index];
                let module = before
                    .iter_mut()
                    .find(|module| module.name == resolved(dependency));
                if let Some(module) = module {
                    module.need = std::mem::replace(&mut module.need, Need::Never).or(need.clone());
                }
            }
        }
        self.order
    }
}

/// What a module of ours waits for by itself.
fn own_need(name: &str, content: &[u8]) -> Need {
    let devices: Vec<String> = fields(content)
        .into_iter()
        .filter_map(|field| field.strip_prefix("alias=").map(str::to_owned))
        .filter(|alias| need::is_of_a_device(alias))
        .collect();
    let late = LATE.contains(&name);
    match devices.is_empty() || ALWAYS.contains(&name) {
        true => Need::Always { late },
        false => Need::Device {
            late,
            aliases: devices.into_iter().collect(),
        },
    }
}

fn resolved(name: &str) -> &str {
    ALGORITHMS
        .iter()
        .find(|(algorithm, _)| *algorithm == name)
        .map_or(name, |(_, module)| module)
}

/// What must be loaded before this module.
fn dependencies(module: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    for field in fields(module) {
        if let Some(list) = field.strip_prefix("depends=") {
            names.extend(list.split(',').map(normal));
        } else if let Some(list) = field.strip_prefix("softdep=") {
            let before = list
                .split_ascii_whitespace()
                .skip_while(|word| *word != "pre:")
                .skip(1);
            names.extend(before.take_while(|word| !word.ends_with(':')).map(normal));
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// What a module says of itself.
fn fields(module: &[u8]) -> Vec<String> {
    Elf::parse(module)
        .and_then(|elf| elf.section(".modinfo"))
        .unwrap_or_default()
        .split(|byte| *byte == 0)
        .map(|field| String::from_utf8_lossy(field).into_owned())
        .collect()
}

fn normal(name: &str) -> String {
    name.trim().replace('-', "_")
}

/// `virtio_blk` for `…/virtio-blk.ko.xz`.
fn module_name(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?;
    let stem = [".ko", ".ko.xz", ".ko.zst", ".ko.gz"]
        .iter()
        .find_map(|ending| name.strip_suffix(ending))?;
    Some(normal(stem))
}

fn index(directory: &Path) -> Result<BTreeMap<String, PathBuf>, KernelError> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![directory.to_owned()];
    let mut entries = 0;
    while let Some(directory) = waiting.pop() {
        let listing = match fs::read_dir(&directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            listing => listing.map_err(KernelError::io("read", &directory))?,
        };
        for entry in listing {
            let entry = entry.map_err(KernelError::io("read", &directory))?;
            entries += 1;
            if entries > ENTRIES_LIMIT {
                return Err(KernelError::unusable(&directory, "it has too many files"));
            }
            let kind = entry
                .file_type()
                .map_err(KernelError::io("read", &entry.path()))?;
            if kind.is_dir() {
                waiting.push(entry.path());
            } else if let Some(name) = module_name(&entry.path()) {
                found.insert(name, entry.path());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests;
