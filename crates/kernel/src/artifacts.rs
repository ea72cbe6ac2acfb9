//! Kernel and initramfs as a pair that instances boot, kept by what they are.

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::cpio::Archive;
use crate::files::{TEMPORARY, write_durably};
use crate::modules::Module;
use crate::source::{Source, is_hash, locate};
use crate::{KernelError, KernelOptions, image, modules};

const KERNEL_FILE: &str = "vmlinux";
const INITRAMFS_FILE: &str = "initramfs.cpio";

/// What a machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootArtifacts {
    /// Names this pair of kernel and initramfs for ever (64 hexadecimal digits).
    pub id: String,
    /// Uncompressed kernel with a PVH entry.
    pub kernel: PathBuf,
    /// Initial RAM file system with the guest program as `/init`.
    pub initramfs: PathBuf,
    /// Release of the kernel, as `uname -r` prints it in the guest.
    pub kernel_release: String,
    /// Names of the modules in the initramfs, in load order; empty for a kernel with everything built in.
    pub modules: Vec<String>,
}

/// The boot files of one data directory.
#[derive(Debug, Clone)]
pub struct Kernels {
    directory: PathBuf,
    options: KernelOptions,
    /// One preparation at a time: two would do the same work twice.
    preparing: Arc<Mutex<()>>,
}

/// Record of a pair: the files are found by their hashes.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    kernel: String,
    initramfs: String,
    kernel_release: String,
    modules: Vec<String>,
}

/// Record of a kernel that was unpacked before, so that it need not be again.
#[derive(Debug, Serialize, Deserialize)]
struct Unpacked {
    kernel: String,
    release: String,
    /// A driver that it needs as a module.
    lacks: Option<String>,
}

impl Kernels {
    /// Opens `data_dir/system`, makes it if need be, and clears what a crash left half written.
    pub fn open(system_directory: &Path, options: KernelOptions) -> Result<Self, KernelError> {
        let kernels = Self {
            directory: system_directory.to_owned(),
            options,
            preparing: Arc::default(),
        };
        for part in ["kernel", "initramfs", "boot", "sources"] {
            let directory = kernels.directory.join(part);
            fs::create_dir_all(&directory).map_err(KernelError::io("make", &directory))?;
            remove_temporary(&directory);
            for subdirectory in list(&directory)
                .into_iter()
                .filter(|path| is_hash(path) && path.is_dir())
            {
                remove_temporary(&subdirectory);
            }
        }
        Ok(kernels)
    }

    /// Finds the kernel, unpacks it and puts the initramfs around `guest` (the static program that becomes
    /// `/init`). What is already there is verified and used. Blocks: call it off the event loop.
    pub fn prepare(&self, guest: &[u8]) -> Result<BootArtifacts, KernelError> {
        let _one_at_a_time = self.preparing.lock().unwrap_or_else(PoisonError::into_inner);
        let source = locate(&self.directory, &self.options)?;
        let unpacked = self.unpack(&source)?;
        let directory = source
            .modules
            .as_ref()
            .map(|directory| directory.join(&unpacked.release));
        let needed = match (directory.filter(|directory| directory.is_dir()), &unpacked.lacks) {
            (Some(directory), _) => modules::needed(&directory, &unpacked.release)?,
            (None, None) => Vec::new(),
            (None, Some(module)) => {
                let beside = source.kernel.parent().unwrap_or(Path::new("/")).to_owned();
                return Err(KernelError::MissingModule {
                    release: unpacked.release,
                    module: module.clone(),
                    directory: source.modules.unwrap_or(beside),
                });
            }
        };
        let signed = modules::are_demanded(&source.kernel, &unpacked.release);
        let archive = initramfs(guest, &needed, signed);
        let initramfs = blake3::hash(&archive).to_hex().to_string();
        let path = self.initramfs_path(&initramfs);
        if !holds(&path, &initramfs) {
            write_durably(&path, &archive)?;
        }
        let record = Record {
            kernel: unpacked.kernel,
            initramfs,
            kernel_release: unpacked.release,
            modules: needed.into_iter().map(|module| module.name).collect(),
        };
        let id = blake3::hash(format!("{} {}", record.kernel, record.initramfs).as_bytes())
            .to_hex()
            .to_string();
        self.write_record(&self.record_path(&id), &record)?;
        tracing::info!(kernel = %source.kernel.display(), release = record.kernel_release, id, "boot files are ready");
        Ok(self.artifacts(id, record))
    }

    /// The boot files that an instance started with.
    pub fn load(&self, id: &str) -> Result<BootArtifacts, KernelError> {
        if !is_hash(Path::new(id)) {
            return Err(KernelError::UnknownId(id.to_owned()));
        }
        let path = self.record_path(id);
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(KernelError::UnknownId(id.to_owned()));
            }
            bytes => bytes.map_err(KernelError::io("read", &path))?,
        };
        let record: Record =
            serde_json::from_slice(&bytes).map_err(|_| KernelError::Damaged(path.clone()))?;
        if !is_hash(Path::new(&record.kernel)) || !is_hash(Path::new(&record.initramfs)) {
            return Err(KernelError::Damaged(path));
        }
        let artifacts = self.artifacts(id.to_owned(), record);
        for file in [&artifacts.kernel, &artifacts.initramfs] {
            if !file.is_file() {
                return Err(KernelError::Damaged(file.clone()));
            }
        }
        Ok(artifacts)
    }

    /// Removes boot files that none of the ids in `keep` names. Returns how many pairs were removed.
    pub fn prune(&self, keep: &HashSet<String>) -> Result<usize, KernelError> {
        let _one_at_a_time = self.preparing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut removed = 0;
        let (mut kernels, mut archives) = (HashSet::new(), HashSet::new());
        for path in list(&self.directory.join("boot")) {
            let Some(id) = path.file_stem().and_then(|stem| stem.to_str()) else {
                continue;
            };
            if keep.contains(id) {
                let artifacts = self.load(id)?;
                kernels.extend(artifacts.kernel.parent().map(Path::to_owned));
                archives.extend(artifacts.initramfs.parent().map(Path::to_owned));
            } else {
                fs::remove_file(&path).map_err(KernelError::io("remove", &path))?;
                removed += 1;
            }
        }
        for (part, used) in [("kernel", kernels), ("initramfs", archives)] {
            for path in list(&self.directory.join(part))
                .into_iter()
                .filter(|path| is_hash(path))
            {
                if !used.contains(&path) {
                    fs::remove_dir_all(&path).map_err(KernelError::io("remove", &path))?;
                }
            }
        }
        Ok(removed)
    }

    /// The source as a bootable kernel under its hash, unpacked at most once.
    fn unpack(&self, source: &Source) -> Result<Unpacked, KernelError> {
        let path = &source.kernel;
        let metadata = fs::metadata(path).map_err(KernelError::io("read", path))?;
        let stamp = format!(
            "{} {} {} {}.{}",
            path.display(),
            metadata.ino(),
            metadata.len(),
            metadata.mtime(),
            metadata.mtime_nsec()
        );
        let remembered = self
            .directory
            .join("sources")
            .join(format!("{}.json", blake3::hash(stamp.as_bytes()).to_hex()));
        let known = fs::read(&remembered)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Unpacked>(&bytes).ok());
        if let Some(known) = known.filter(|known| holds(&self.kernel_path(&known.kernel), &known.kernel)) {
            return Ok(known);
        }
        let bytes = fs::read(path).map_err(KernelError::io("read", path))?;
        let image = image::bootable(path, &bytes)?;
        let release = image::release(&image)
            .filter(|release| !release.contains('/') && !release.starts_with('.'))
            .ok_or_else(|| KernelError::unusable(path, "it does not say which release it is"))?;
        let kernel = blake3::hash(&image).to_hex().to_string();
        let stored = self.kernel_path(&kernel);
        if !holds(&stored, &kernel) {
            write_durably(&stored, &image)?;
        }
        let lacks = image::lacks(&image).map(str::to_owned);
        let unpacked = Unpacked {
            kernel,
            release,
            lacks,
        };
        self.write_record(&remembered, &unpacked)?;
        Ok(unpacked)
    }

    fn write_record(&self, path: &Path, record: &impl Serialize) -> Result<(), KernelError> {
        let bytes =
            serde_json::to_vec(record).map_err(|error| KernelError::io("write", path)(error.into()))?;
        if fs::read(path).is_ok_and(|present| present == bytes) {
            return Ok(());
        }
        write_durably(path, &bytes)
    }

    fn artifacts(&self, id: String, record: Record) -> BootArtifacts {
        BootArtifacts {
            id,
            kernel: self.kernel_path(&record.kernel),
            initramfs: self.initramfs_path(&record.initramfs),
            kernel_release: record.kernel_release,
            modules: record.modules,
        }
    }

    fn kernel_path(&self, hash: &str) -> PathBuf {
        self.directory.join("kernel").join(hash).join(KERNEL_FILE)
    }

    fn initramfs_path(&self, hash: &str) -> PathBuf {
        self.directory.join("initramfs").join(hash).join(INITRAMFS_FILE)
    }

    fn record_path(&self, id: &str) -> PathBuf {
        self.directory.join("boot").join(format!("{id}.json"))
    }
}

/// `signed`: modules keep their signatures.
fn initramfs(guest: &[u8], needed: &[Module], signed: bool) -> Vec<u8> {
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "run"] {
        archive.directory(directory);
    }
    // The kernel opens it for the first program before anything is mounted.
    archive.character_device("dev/console", 5, 1);
    archive.file("init", 0o755, guest);
    if !needed.is_empty() {
        archive.directory("modules");
        let order: String = needed
            .iter()
            .map(|module| module.need.line(&format!("/modules/{}.ko", module.name)))
            .collect();
        archive.file("modules/order", 0o644, order.as_bytes());
        for module in needed {
            let content = match signed {
                true => &module.content,
                false => modules::without_signature(&module.content),
            };
            archive.file(&format!("modules/{}.ko", module.name), 0o644, content);
        }
    }
    archive.finish()
}

/// True when the file is there and has this hash.
fn holds(path: &Path, hash: &str) -> bool {
    let mut hasher = blake3::Hasher::new();
    fs::File::open(path)
        .and_then(|file| hasher.update_reader(file).map(drop))
        .is_ok_and(|()| hasher.finalize().to_hex().as_str() == hash)
}

fn list(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect()
}

fn remove_temporary(directory: &Path) {
    for path in list(directory) {
        if path.extension().is_some_and(|extension| extension == TEMPORARY) {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests;
