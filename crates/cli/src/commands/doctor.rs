//! `hypeman doctor`.

use std::path::PathBuf;

use clap::Args;

use super::block_on;
use crate::args::GlobalArgs;
use crate::doctor::{Check, Subject, Verdict, examine};
use crate::error::{CliError, exit};
use crate::output::{self, Output};

/// Arguments of `doctor`.
#[derive(Debug, Args)]
#[command(after_help = "\
Each line is ok, warn (it works, but not as well as it could) or fail; what is not ok says how to \
mend it.

Exit codes: 0 nothing failed, 1 something did.

Examples:
  hypeman doctor
  hypeman doctor --format json | jq -r '.[] | select(.status != \"ok\") | .fix'")]
pub struct DoctorArgs {
    /// Configuration file of the server
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Data directory of the server
    #[arg(long, value_name = "DIRECTORY")]
    data_dir: Option<PathBuf>,
}

/// Checks this machine and answers the exit code.
pub(crate) fn run(arguments: &DoctorArgs, global: &GlobalArgs) -> Result<u8, CliError> {
    let subject = Subject {
        file: arguments.config.clone(),
        data_dir: arguments.data_dir.clone(),
    };
    let checks = block_on(examine(&subject))?;
    let output = Output::new(global);
    let shown: Vec<&Check> = checks
        .iter()
        .filter(|check| !global.quiet || check.verdict != Verdict::Ok)
        .collect();
    if output.human() {
        output::text(&report(&shown))?;
    } else {
        output.machine(&crate::document::Document::Array(
            shown.iter().map(|check| check.document()).collect(),
        ))?;
    }
    let failed = checks.iter().any(|check| check.verdict == Verdict::Fail);
    Ok(if failed { exit::FAILURE } else { exit::SUCCESS })
}

fn report(checks: &[&Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let found = output::clean(&check.found).replace('\n', " ");
        text.push_str(&format!(
            "{:<4}  {:<width$}  {found}\n",
            check.verdict.word(),
            check.name
        ));
        if let Some(fix) = &check.fix {
            text.push_str(&format!("{:<4}  {:<width$}  → {}\n", "", "", output::clean(fix)));
        }
    }
    text
}
