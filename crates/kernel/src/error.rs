//! What can go wrong on the way to a bootable guest, and what to do then.

use std::path::PathBuf;

/// Why there is no kernel or initramfs.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelError {
    /// No place has a kernel.
    #[error(
        "no guest kernel was found in {looked}: build the small one with `kernel/build`, fetch the \
         distribution's with `kernel/fetch`, or install the package linux-image-cloud-amd64"
    )]
    NotFound {
        /// The places, in order.
        looked: String,
    },
    /// The configured kernel is not there.
    #[error("the configured guest kernel {0} does not exist")]
    Configured(PathBuf),
    /// The file is no kernel that can be booted.
    #[error("{path} cannot be used as a guest kernel: {reason}")]
    Unusable {
        /// Which file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The kernel lacks a driver that every guest needs.
    #[error(
        "the kernel {release} has no {module}, neither built in nor as a module in {directory}: install its \
         modules beside it or use `kernel/build`"
    )]
    MissingModule {
        /// Kernel release.
        release: String,
        /// Which driver.
        module: String,
        /// Where modules were looked for.
        directory: PathBuf,
    },
    /// An id that is not, or no longer, stored.
    #[error("the boot files {0} are not stored here")]
    UnknownId(String),
    /// A stored file is not what its name says.
    #[error("{0} is damaged: remove its directory, it is made again for new instances")]
    Damaged(PathBuf),
    /// Host I/O failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, with the path.
        context: String,
        /// The cause.
        source: std::io::Error,
    },
}

impl KernelError {
    pub(crate) fn io(context: &str, path: &std::path::Path) -> impl FnOnce(std::io::Error) -> Self {
        let context = format!("cannot {context} {}", path.display());
        move |source| Self::Io { context, source }
    }

    pub(crate) fn unusable(path: &std::path::Path, reason: impl Into<String>) -> Self {
        Self::Unusable {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
