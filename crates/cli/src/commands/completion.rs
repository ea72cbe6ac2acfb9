//! `hypeman completion`.

use clap::{Args, CommandFactory as _, ValueEnum};

use crate::args::Cli;
use crate::error::CliError;
use crate::output;

/// Arguments of `completion`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  source <(hypeman completion bash)                      for this shell
  hypeman completion bash > /etc/bash_completion.d/hypeman
  hypeman completion zsh > \"${fpath[1]}/_hypeman\"
  hypeman completion fish > ~/.config/fish/completions/hypeman.fish")]
pub struct CompletionArgs {
    /// Which shell
    shell: Shell,
}

/// Shells with completion.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Prints the script.
pub(crate) fn run(arguments: &CompletionArgs) -> Result<(), CliError> {
    let shell = match arguments.shell {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "hypeman", &mut script);
    output::bytes_out(&script)
}
