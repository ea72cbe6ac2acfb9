//! The whole command line in one file: every help text, as a user sees it.
//!
//! Run with `HYPEMAN_UPDATE_REFERENCE=1` to write the file anew after an intended change.

// Helpers of tests may panic like the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;

use clap::{Command, CommandFactory as _};
use hypeman_cli::args::Cli;

fn write_help(command: &mut Command, name: &str, text: &mut String) {
    text.push_str(&format!("===== {name} --help\n\n"));
    text.push_str(&command.clone().bin_name(name).render_long_help().to_string());
    text.push_str("\n\n");
    let names: Vec<String> = command
        .get_subcommands()
        .map(|sub| sub.get_name().to_owned())
        .collect();
    for sub in names.iter().filter(|sub| *sub != "help") {
        if let Some(found) = command.find_subcommand_mut(sub) {
            write_help(found, &format!("{name} {sub}"), text);
        }
    }
}

fn reference() -> String {
    let mut command = Cli::command().term_width(110);
    command.build();
    let mut text = String::new();
    write_help(&mut command, "hypeman", &mut text);
    text.lines()
        .map(|line| format!("{}\n", line.trim_end()))
        .collect()
}

#[test]
fn the_reference_is_what_the_program_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference.txt");
    let said = reference();
    if std::env::var_os("HYPEMAN_UPDATE_REFERENCE").is_some() {
        std::fs::write(&path, &said).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        said == written,
        "the help texts changed: run this test with HYPEMAN_UPDATE_REFERENCE=1 and look at the difference"
    );
}

#[test]
fn the_definition_is_sound() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_that_does_something_has_examples() {
    fn check(command: &Command, path: &str) {
        let simple = ["list", "get", "delete", "tag", "list-scopes", "help"];
        if !simple.contains(&command.get_name()) {
            let after = command.get_after_help().or(command.get_after_long_help());
            let examples = after.is_some_and(|text| text.to_string().contains("Examples:"));
            assert!(examples, "{path} has no examples");
        }
        for sub in command.get_subcommands() {
            check(sub, &format!("{path} {}", sub.get_name()));
        }
    }
    check(&Cli::command(), "hypeman");
}
