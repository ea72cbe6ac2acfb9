//! The guest program: process 1 of every instance, and its agent.
//!
//! ```text
//! boot ─► modules, agent port ─► wait for the configuration ─► disks, network, identity
//!                                                               ├─ exec mode: start the program, stay process 1
//!                                                               └─ systemd mode: fork the agent, become the init
//! agent: handshake ─► requests, one stream each ─► connection lost ─► handshake …
//! ```
//!
//! Build it with `cargo build -p hypeman-guest --profile guest --target x86_64-unknown-linux-musl`; where that
//! target is absent, with `RUSTFLAGS="-C target-feature=+crt-static"` and `--target x86_64-unknown-linux-gnu`. The
//! initramfs needs the program as `/init` and, for kernels with modules, `/modules/order` with one module a line.
//!
//! * [`agent`] serves the host and needs nothing but a byte stream; it runs in any process.
//! * [`machine`] is what only process 1 of a virtual machine may do.
//!
//! Everything runs on one thread, with a blocking pool for files. The program never exits before the machine is
//! off, and never panics: errors are answers to the host or lines in the kernel log.

pub mod agent;
pub(crate) mod birth;
pub mod log;
pub mod machine;
