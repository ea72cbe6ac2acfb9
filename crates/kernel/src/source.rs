//! Where a guest kernel may come from, best first.
//!
//! 1. the configured file or directory;
//! 2. `system/kernel/<version>/` in the data directory, where somebody put one there;
//! 3. the directories to search, then the host's own root.
//!
//! In one directory, the `vmlinux` of a build comes before `boot/vmlinuz-*` beside `lib/modules/*` as a package has them.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};

use crate::KernelError;

/// Which kernel to use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelOptions {
    /// A kernel (vmlinux or vmlinuz) or a directory with one (`vmlinux`, or `boot/` and `lib/modules/` of an
    /// unpacked package). Nothing else is tried when it is set.
    pub kernel: Option<PathBuf>,
    /// Further directories to search, before the host's own root.
    pub search: Vec<PathBuf>,
}

/// A kernel as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Source {
    pub(crate) kernel: PathBuf,
    /// Directory with one subdirectory of modules a release; a kernel with everything built in needs none.
    pub(crate) modules: Option<PathBuf>,
}

/// Finds the best kernel.
pub(crate) fn locate(system_directory: &Path, options: &KernelOptions) -> Result<Source, KernelError> {
    if let Some(configured) = &options.kernel {
        if configured.is_dir() {
            return in_directory(configured).ok_or_else(|| KernelError::NotFound {
                looked: shown(&[configured]),
            });
        }
        return match configured.is_file() {
            true => Ok(beside(configured)),
            false => Err(KernelError::Configured(configured.clone())),
        };
    }
    let stored = system_directory.join("kernel");
    let root = PathBuf::from("/");
    let versions = stored_kernels(system_directory);
    let places: Vec<&PathBuf> = versions.iter().chain(&options.search).chain([&root]).collect();
    places
        .iter()
        .find_map(|place| in_directory(place))
        .ok_or_else(|| {
            let looked: Vec<&PathBuf> = [&stored]
                .into_iter()
                .chain(&options.search)
                .chain([&root])
                .collect();
            KernelError::NotFound {
                looked: shown(&looked),
            }
        })
}

fn shown(places: &[&PathBuf]) -> String {
    places
        .iter()
        .map(|place| place.display().to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// The kernels that somebody put into a system directory by name, newest version first. What is named by a hash is
/// unpacked already and has no modules beside it: it is no source.
#[must_use]
pub fn stored_kernels(system_directory: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(system_directory.join("kernel"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_dir() && !is_hash(path))
        .collect();
    found.sort_by(|left, right| by_version(right, left));
    found
}

pub(crate) fn is_hash(path: &Path) -> bool {
    path.file_name()
        .and_then(|name| name.to_str())
        .is_some_and(|name| name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn in_directory(directory: &Path) -> Option<Source> {
    let built = directory.join("vmlinux");
    if built.is_file() {
        return Some(beside(&built));
    }
    let mut images: Vec<PathBuf> = fs::read_dir(directory.join("boot"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| release_of(path).is_some() && path.is_file())
        .collect();
    // Kernels for clouds leave out what no virtual machine has, and start faster.
    let is_cloud = |path: &PathBuf| release_of(path).is_some_and(|release| release.contains("cloud"));
    images.sort_by(|left, right| {
        is_cloud(right)
            .cmp(&is_cloud(left))
            .then_with(|| by_version(right, left))
    });
    let kernel = images.into_iter().find(|path| fs::File::open(path).is_ok())?;
    Some(Source {
        kernel,
        modules: modules_in(directory),
    })
}

/// A single file: its modules may lie beside it, or beside the directory `boot` that it lies in.
fn beside(kernel: &Path) -> Source {
    let directory = kernel.parent().unwrap_or(Path::new("/"));
    let modules = [directory, directory.parent().unwrap_or(directory)]
        .into_iter()
        .filter(|candidate| *candidate == directory || directory.ends_with("boot"))
        .find_map(modules_in);
    Source {
        kernel: kernel.to_owned(),
        modules,
    }
}

/// Packages have their modules in either place, old ones in the first.
fn modules_in(directory: &Path) -> Option<PathBuf> {
    ["lib/modules", "usr/lib/modules"]
        .iter()
        .map(|place| directory.join(place))
        .find(|modules| modules.is_dir())
}

fn release_of(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()?.strip_prefix("vmlinuz-")
}

/// Numbers in names compare as numbers.
fn by_version(left: &Path, right: &Path) -> Ordering {
    let numbers = |path: &Path| -> Vec<u64> {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        name.split(|letter: char| !letter.is_ascii_digit())
            .filter_map(|number| number.parse().ok())
            .collect()
    };
    numbers(left).cmp(&numbers(right)).then_with(|| left.cmp(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(path: PathBuf) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }

    #[test]
    fn the_configured_kernel_wins_then_the_data_directory_then_the_search() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        let system = root.join("system");
        touch(root.join("distro/boot/vmlinuz-6.1.0-9-cloud-amd64"));
        touch(root.join("distro/boot/vmlinuz-6.1.0-10-cloud-amd64"));
        touch(root.join("distro/boot/vmlinuz-6.12.0-1-amd64"));
        fs::create_dir_all(root.join("distro/lib/modules")).unwrap();
        let mut options = KernelOptions {
            kernel: None,
            search: vec![root.join("none"), root.join("distro")],
        };

        let found = locate(&system, &options).unwrap();
        assert_eq!(
            found.kernel,
            root.join("distro/boot/vmlinuz-6.1.0-10-cloud-amd64")
        );
        assert_eq!(found.modules, Some(root.join("distro/lib/modules")));

        touch(system.join("kernel").join("a".repeat(64)).join("vmlinux"));
        assert_eq!(stored_kernels(&system), Vec::<PathBuf>::new());
        assert_eq!(locate(&system, &options).unwrap(), found);
        touch(root.join("distro/vmlinux"));
        assert_eq!(
            locate(&system, &options).unwrap().kernel,
            root.join("distro/vmlinux"),
            "a build comes before the distribution's"
        );

        touch(system.join("kernel/6.1.9/vmlinux"));
        touch(system.join("kernel/6.1.10/vmlinux"));
        assert_eq!(
            locate(&system, &options).unwrap().kernel,
            system.join("kernel/6.1.10/vmlinux")
        );

        options.kernel = Some(root.join("distro/boot/vmlinuz-6.12.0-1-amd64"));
        let found = locate(&system, &options).unwrap();
        assert_eq!(found.kernel, root.join("distro/boot/vmlinuz-6.12.0-1-amd64"));
        assert_eq!(found.modules, Some(root.join("distro/lib/modules")));

        options.kernel = Some(root.join("gone"));
        assert!(matches!(
            locate(&system, &options),
            Err(KernelError::Configured(_))
        ));
        options.kernel = Some(root.join("distro/lib"));
        let error = locate(&system, &options).unwrap_err().to_string();
        assert!(
            error.contains("kernel/fetch") && error.contains("distro/lib"),
            "{error}"
        );
    }
}
