//! Docker's credential helpers: programs that keep what `docker login` would else write into `config.json`.
//!
//! ```text
//!  docker-credential-NAME get     standard input: the registry
//!                                 standard output: {"Username": …, "Secret": …}, or that there is nothing
//! ```
//!
//! Invariants:
//! * Only the server's own user chooses the program, in the file of Docker's credentials. A name is lower-case
//!   letters, digits and dashes; no shell reads it, and it leads to no path.
//! * What a client of the server said (the registry) goes to standard input and is never an argument.
//! * A helper has a deadline and may say so much and no more; it ends with whoever asked.
//! * What it says is a secret: neither logged nor part of an error.

use std::ffi::OsStr;
use std::process::Stdio;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use super::credentials::Credentials;

/// Longest answer that is read, in bytes.
const MAX_ANSWER_BYTES: u64 = 64 << 10;

/// The user name by which a helper says that its secret is an identity token.
const IDENTITY: &str = "<token>";

/// What helpers say, and end with a failure, when they know nothing of a registry.
const NOTHING: &str = "credentials not found in native keychain";

/// A helper, and what it calls the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Helper {
    /// What follows `docker-credential-`.
    pub(super) name: String,
    /// Key of the registry, as Docker stores it.
    pub(super) registry: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Answer {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// Asks a helper, which is looked for in `path` or where this process looks for programs. The failure is a part of a
/// sentence for people.
pub(super) async fn ask(
    helper: &Helper,
    path: Option<&OsStr>,
    limit: Duration,
) -> Result<Option<Credentials>, String> {
    let name = &helper.name;
    if !is_name(name) {
        let shown: String = name.chars().take(64).collect();
        return Err(format!(
            "Docker's configuration names the credential helper {shown:?}, and such names are lower-case letters, \
             digits and dashes"
        ));
    }
    let program = format!("docker-credential-{name}");
    match tokio::time::timeout(limit, run(&program, &helper.registry, path)).await {
        Ok(Ok((success, said))) => read(success, &said).map_err(|reason| format!("{program} {reason}")),
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => Err(format!(
            "{program}, which Docker's configuration names, is not in the server's PATH"
        )),
        Ok(Err(error)) => Err(format!("{program} cannot be run: {error}")),
        Err(_) => Err(format!("{program} gave no answer within {} s", limit.as_secs())),
    }
}

fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    (1..=64).contains(&name.len()) && name.bytes().all(plain)
}

/// Runs a helper to its end: whether it succeeded, and what it said, at most one byte too much.
async fn run(program: &str, registry: &str, path: Option<&OsStr>) -> std::io::Result<(bool, Vec<u8>)> {
    let mut command = Command::new(program);
    command
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    if let Some(path) = path {
        command.env("PATH", path);
    }
    let mut child = command.spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // One that answers without having read closes the pipe, which is no failure.
        let _ = input.write_all(format!("{registry}\n").as_bytes()).await;
    }
    let mut said = Vec::new();
    if let Some(output) = child.stdout.take() {
        output.take(MAX_ANSWER_BYTES + 1).read_to_end(&mut said).await?;
    }
    if said.len() as u64 > MAX_ANSWER_BYTES {
        // It may wait for somebody to read the rest.
        let _ = child.start_kill();
    }
    Ok((child.wait().await?.success(), said))
}

/// Understands an answer. The failure is the end of a sentence and quotes nothing of it.
fn read(success: bool, said: &[u8]) -> Result<Option<Credentials>, String> {
    if said.len() as u64 > MAX_ANSWER_BYTES {
        return Err(format!("said more than {MAX_ANSWER_BYTES} bytes"));
    }
    if !success {
        return match said.trim_ascii() == NOTHING.as_bytes() {
            true => Ok(None),
            false => Err(
                "failed: run it by hand as the server's user, the registry on its standard input".to_owned(),
            ),
        };
    }
    let answer: Answer =
        serde_json::from_slice(said).map_err(|_| "said something that is no credentials".to_owned())?;
    Ok(match (answer.username.as_str(), answer.secret) {
        (_, secret) if secret.is_empty() => None,
        (IDENTITY, secret) => Some(Credentials::identity_token(secret)),
        (username, secret) => Some(Credentials::basic(username, secret)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_leads_to_no_path_and_to_no_shell() {
        for good in ["pass", "ecr-login", "osxkeychain", "gcloud2"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "../sh", "a/b", "a b", "a;b", "A", "a\n", ".", "désktop", "$x"] {
            assert!(!is_name(bad), "{bad:?}");
        }
        assert!(!is_name(&"a".repeat(65)));
    }

    #[test]
    fn answers_become_credentials_or_a_reason_that_quotes_nothing() {
        let basic = read(true, br#"{"ServerURL":"r","Username":"me","Secret":"hush"}"#).unwrap();
        assert_eq!(basic, Some(Credentials::basic("me", "hush")));
        let token = read(true, br#"{"Username":"<token>","Secret":"hush"}"#).unwrap();
        assert_eq!(token, Some(Credentials::identity_token("hush")));
        assert_eq!(read(true, br#"{"Username":"","Secret":""}"#).unwrap(), None);
        assert_eq!(
            read(false, b"credentials not found in native keychain\n").unwrap(),
            None
        );
        let long = vec![b'x'; usize::try_from(MAX_ANSWER_BYTES).unwrap() + 1];
        let others: [(bool, &[u8]); 4] = [(false, b"hush"), (true, b"hush"), (true, b"[1]"), (true, &long)];
        for (success, said) in others {
            let reason = read(success, said).unwrap_err();
            assert!(!reason.contains("hush"), "{reason}");
        }
    }
}
