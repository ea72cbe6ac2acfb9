//! Questions to the host that only an experiment answers, and what its processor is.

mod kvm;
mod processor;
mod tsc;

pub(crate) use kvm::{kvm_opens, kvm_runs_a_guest};
pub(crate) use processor::{processor_abilities, processor_name};
pub(crate) use tsc::TscFrequency;
