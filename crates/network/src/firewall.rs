//! Runs `nft`: the rule set goes in by standard input, one transaction a call, at start-up only.

use std::env;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use crate::error::NetworkError;

/// Longer than `nft` takes on a host with tens of thousands of foreign rules.
const DEADLINE: Duration = Duration::from_secs(30);

/// Where administrators' tools lie even when `$PATH` of a service does not say so.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/sbin", "/sbin", "/usr/local/sbin"];

/// Finds the program.
pub(crate) fn find_nft() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SYSTEM_FOLDERS.iter().map(PathBuf::from))
        .map(|folder| folder.join("nft"))
        .find(|candidate| candidate.is_file())
}

/// Applies a rule set: all of it or nothing.
pub(crate) async fn apply(rules: &str) -> Result<(), NetworkError> {
    run(&["-f", "-"], rules).await.map(drop)
}

/// Chains of other tables that drop forwarded packets unless told otherwise, as `family table chain`.
pub(crate) async fn foreign_forward_drops(own_table: &str) -> Result<Vec<String>, NetworkError> {
    Ok(parse_forward_drops(
        &run(&["list", "chains"], "").await?,
        own_table,
    ))
}

async fn run(arguments: &[&str], input: &str) -> Result<String, NetworkError> {
    let program =
        find_nft().ok_or_else(|| NetworkError::Unavailable("nft is missing; install nftables".into()))?;
    let fail = |source| NetworkError::kernel("run nft", source);
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(fail)?;
    let mut stdin = child.stdin.take();
    let work = async {
        if let Some(pipe) = &mut stdin {
            // A refusal at the first lines closes the pipe; the output then says why.
            let _ = pipe.write_all(input.as_bytes()).await;
        }
        drop(stdin);
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(DEADLINE, work)
        .await
        .map_err(|_| NetworkError::RuleSet(format!("no answer within {} s", DEADLINE.as_secs())))?
        .map_err(fail)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint: String = String::from_utf8_lossy(&output.stderr)
        .chars()
        .take(2000)
        .collect();
    Err(NetworkError::RuleSet(complaint.trim().to_owned()))
}

fn parse_forward_drops(listing: &str, own_table: &str) -> Vec<String> {
    let mut table = String::new();
    let mut chain = String::new();
    let mut found = Vec::new();
    for line in listing.lines().map(str::trim) {
        if let Some(rest) = line.strip_prefix("table ") {
            table = rest.trim_end_matches('{').trim().to_owned();
        } else if let Some(rest) = line.strip_prefix("chain ") {
            chain = rest.trim_end_matches('{').trim().to_owned();
        } else if line.contains("hook forward") && line.contains("policy drop") {
            let mut words = table.split(' ');
            let routed = matches!(words.next(), Some("ip" | "inet"));
            if routed && words.next() != Some(own_table) {
                found.push(format!("{table} {chain}"));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_firewall_that_drops_forwarded_packets_is_seen() {
        let listing = "table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n\
            \tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n\tchain DOCKER {\n\t}\n}\n\
            table ip6 filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n\
            table inet own {\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n";
        assert_eq!(parse_forward_drops(listing, "own"), ["ip filter FORWARD"]);
    }
}
