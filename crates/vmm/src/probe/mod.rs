//! Questions to the host that only an experiment answers.

mod kvm;
mod tsc;

pub(crate) use kvm::kvm_runs_a_guest;
pub(crate) use tsc::TscFrequency;
