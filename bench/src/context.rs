//! What all benches share: programs, places, how often.

use std::path::PathBuf;

use crate::error::{BenchError, Result};

/// Settings of one run.
#[derive(Debug, Clone)]
pub struct Context {
    /// The binary that is measured.
    pub hypeman: PathBuf,
    /// Guest kernel to use instead of the one that the server finds.
    pub kernel: Option<PathBuf>,
    /// Its modules, where the server does not find them itself.
    pub modules: Option<PathBuf>,
    /// Kind of hypervisor of the guests that are captured and restored.
    pub hypervisor: String,
    /// Fewer repetitions: for a look, not for a record.
    pub quick: bool,
    /// Repetitions, instead of what each bench finds right.
    pub rounds: Option<usize>,
    /// Words of which a guest's name must have one, to be captured; empty: all are.
    pub guests: Vec<String>,
    /// Nothing is measured on a file system whose files share blocks.
    pub usual_place: bool,
    /// When the server is to serve memory of Firecracker page by page: `auto`, `off` or `always`.
    pub pager: String,
}

impl Context {
    /// Repetitions: `full`, never below 10, or `quick` when asked for, unless a number was named.
    pub fn repetitions(&self, full: usize, quick: usize) -> usize {
        let usual = if self.quick { quick } else { full.max(10) };
        self.rounds.unwrap_or(usual)
    }

    /// Repetitions of what takes long enough for 5 to do.
    pub fn few_repetitions(&self) -> usize {
        let usual = if self.quick { 1 } else { 5 };
        self.rounds.map_or(usual, |rounds| rounds.min(5))
    }

    /// Whether KVM is taken for good without an experiment: for hypervisors that cannot do without it.
    pub fn trusts_kvm(&self) -> bool {
        !self.hypervisor.starts_with("qemu")
    }

    /// Whether compressed memory comes page by page instead of being expanded first.
    pub fn serves_pages(&self) -> bool {
        self.hypervisor == "firecracker" && self.pager != "off"
    }

    /// Refuses when the binary has not been built.
    ///
    /// # Errors
    /// [`BenchError::Missing`].
    pub fn need_hypeman(&self) -> Result<()> {
        if self.hypeman.is_file() {
            return Ok(());
        }
        Err(BenchError::Missing(format!(
            "{} is not built",
            self.hypeman.display()
        )))
    }
}

/// A guest kernel of which somebody says that it runs with this host's KVM: `HYPEMAN_TEST_KVM_KERNEL`.
pub fn kernel_for_kvm() -> Option<PathBuf> {
    let named = std::env::var_os("HYPEMAN_TEST_KVM_KERNEL").map(PathBuf::from);
    named.filter(|path| path.exists())
}

/// Finds a program in `$PATH`.
///
/// # Errors
/// [`BenchError::Missing`], naming it.
pub fn need_program(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| BenchError::Missing(format!("the program {name} is not installed")))
}
