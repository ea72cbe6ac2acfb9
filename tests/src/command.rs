//! The `hypeman` command line.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// A command line pointed at a server.
#[derive(Debug, Clone)]
pub struct CommandLine {
    program: PathBuf,
    environment: Vec<(&'static str, String)>,
    directory: PathBuf,
}

/// How a command ended.
#[derive(Debug)]
pub struct Finished {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    /// Fails the story unless it succeeded; standard output without white space at the end.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.stdout, self.stderr);
        self.stdout.trim_end().to_owned()
    }
}

impl CommandLine {
    pub(crate) fn new(program: PathBuf, base: &str, token: &str, directory: &Path) -> Self {
        let environment = vec![
            ("HYPEMAN_BASE_URL", base.to_owned()),
            ("HYPEMAN_API_KEY", token.to_owned()),
            // No settings of the person who runs the stories.
            ("HOME", directory.to_string_lossy().into_owned()),
            (
                "XDG_CONFIG_HOME",
                directory.join("config").to_string_lossy().into_owned(),
            ),
        ];
        Self {
            program,
            environment,
            directory: directory.to_owned(),
        }
    }

    /// Adds a variable.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: &str) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }

    /// Runs it to the end.
    pub async fn run<S: AsRef<OsStr>>(&self, words: &[S]) -> Finished {
        self.run_with_input(words, b"").await
    }

    /// Runs it with bytes on its standard input.
    pub async fn run_with_input<S: AsRef<OsStr>>(&self, words: &[S], input: &[u8]) -> Finished {
        let mut child = Command::new(&self.program)
            .args(words)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .current_dir(&self.directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("hypeman starts");
        let mut stdin = child.stdin.take().expect("stdin");
        let input = input.to_vec();
        // A command that does not read its input closes the pipe, which is no failure.
        let writer = tokio::spawn(async move {
            let _ = stdin.write_all(&input).await;
        });
        let output = tokio::time::timeout(crate::PATIENCE, child.wait_with_output())
            .await
            .expect("gave up waiting for the command")
            .expect("output");
        let _ = writer.await;
        Finished {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}
