//! `hypeman-bench`: measures the server against bare limits and peers, in one run on one machine.
//!
//! ```text
//!  bench/run ─► hypeman-bench ─┬─► Server (a private one per bench) ◄── http, load, CLI
//!                              ├─► peers: bare QEMU (booting, resuming), bare hyper, umoci + mkfs.erofs, dd, zstd, lz4
//!                              └─► Section ─► table, target/bench/*.svg, target/bench.json
//! ```
//!
//! Ours and the reference are taken in turns within one run, so that what disturbs one disturbs the other; only
//! ratios are worth keeping.

// The output of this program is its purpose.
#![allow(clippy::print_stdout, clippy::print_stderr)]
// Numbers for people: a rounding in the 53rd bit does not matter.
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

mod bare_cloud_hypervisor;
mod bare_http;
mod bare_offload;
mod bare_pause;
mod bare_qemu;
mod bare_qmp;
mod bare_restore;
mod benches;
mod calm;
mod chart;
mod context;
mod error;
mod guests;
mod http;
mod load;
mod offload;
mod paged;
mod place;
mod process;
mod registry;
mod remote;
mod report;
mod server;
mod source;
mod statistics;
mod tree;
mod virsh;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::context::Context;
use crate::error::Result;
use crate::report::Section;

/// Measures hypeman against bare limits and peers.
#[derive(Debug, Parser)]
#[command(name = "bench/run", args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    inner: Option<Inner>,
    #[command(flatten)]
    outer: Outer,
}

#[derive(Debug, Args)]
struct Outer {
    /// Benches to run; all when none is named
    names: Vec<String>,
    /// Fewer repetitions and less data: for a look, not for a record
    #[arg(long)]
    quick: bool,
    /// Repetitions, instead of what each bench finds right; fewer than 5 are shown and not judged
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Guests to capture, by a part of their names, as `--guest '256 MiB idle'`; all when none is named
    #[arg(long = "guest")]
    guests: Vec<String>,
    /// Leave out the file system whose files share blocks
    #[arg(long)]
    usual_place: bool,
    /// List the benches and stop
    #[arg(long)]
    list: bool,
    /// The binary to measure
    #[arg(long, default_value = "target/release/hypeman")]
    hypeman: PathBuf,
    /// Guest kernel to boot instead of the one that the server finds. Where KVM is needed, HYPEMAN_TEST_KVM_KERNEL comes
    /// first
    #[arg(long, overrides_with = "kernel")]
    kernel: Option<PathBuf>,
    /// Directory with the modules of that kernel
    #[arg(long)]
    modules: Option<PathBuf>,
    /// What runs the guests of restore, fork, capture and scaling; one that needs KVM is trusted to run here
    #[arg(long, default_value = "qemu")]
    hypervisor: String,
    /// Where bench.json and the pictures go
    #[arg(long, default_value = "target")]
    out: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Inner {
    /// (for this program itself) Serve a file to every HTTP request
    #[command(hide = true)]
    BareHttp { file: PathBuf },
    /// (for this program itself) Convert layers to a root disk
    #[command(hide = true)]
    ConvertOnce {
        disk: PathBuf,
        layers: Vec<PathBuf>,
        #[arg(long)]
        lz4: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.inner {
        Some(Inner::BareHttp { file }) => bare_http::serve(&file).map(|()| ExitCode::SUCCESS),
        Some(Inner::ConvertOnce { disk, layers, lz4 }) => {
            benches::convert_once(&disk, &layers, lz4).map(|()| ExitCode::SUCCESS)
        }
        None => run(&arguments.outer),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("bench: {error}");
        ExitCode::FAILURE
    })
}

fn run(arguments: &Outer) -> Result<ExitCode> {
    if arguments.list {
        for (name, title, _) in benches::ALL {
            println!("{name:11} {title}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(unknown) = arguments
        .names
        .iter()
        .find(|name| !benches::ALL.iter().any(|(known, ..)| known == name))
    {
        eprintln!("bench: there is no bench {unknown}; --list lists them");
        return Ok(ExitCode::from(2));
    }
    // Whoever names a mode compares with it.
    let pager = std::env::var("HYPERVISOR__FIRECRACKER__PAGER").unwrap_or_else(|_| "auto".to_owned());
    let mut context = Context {
        hypeman: arguments.hypeman.clone(),
        kernel: arguments.kernel.clone(),
        modules: arguments.modules.clone(),
        hypervisor: arguments.hypervisor.clone(),
        quick: arguments.quick,
        rounds: arguments.rounds.map(|rounds| rounds as usize),
        guests: arguments.guests.clone(),
        usual_place: arguments.usual_place,
        pager,
    };
    if context.trusts_kvm() {
        context.kernel = context::kernel_for_kvm().or(context.kernel);
    }
    server::clean_up_when_interrupted()?;
    let mut sections: Vec<Section> = Vec::new();
    for (name, title, bench) in benches::ALL {
        if arguments.names.is_empty() || arguments.names.iter().any(|wanted| wanted == name) {
            eprintln!("bench: {name} …");
            let section = benches::run(name, title, bench, &context);
            print!("{}", section.to_text());
            sections.push(section);
        }
    }
    report::write(&arguments.out, &sections)?;
    println!(
        "\nwritten: {0}/bench.json, {0}/bench/*.svg",
        arguments.out.display()
    );
    let missed = sections
        .iter()
        .flat_map(|section| &section.rows)
        .filter(|row| row.met() == Some(false))
        .count();
    if missed > 0 {
        println!("{missed} goals missed");
    }
    Ok(ExitCode::SUCCESS)
}
