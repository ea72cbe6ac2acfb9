//! The one failure type of the command line: what happened, what to do next, and the exit code.

use std::io;

use crate::document::Document;

/// Exit codes, as `hypeman help` documents them.
pub mod exit {
    /// All went well.
    pub const SUCCESS: u8 = 0;
    /// The server refused, the instance failed, or something local went wrong.
    pub const FAILURE: u8 = 1;
    /// The command line itself was wrong (also clap's own code).
    pub const USAGE: u8 = 2;
    /// `wait` or `run` ran out of time.
    pub const TIMED_OUT: u8 = 124;
    /// Interrupted by Ctrl-C.
    pub const INTERRUPTED: u8 = 130;
    /// A snapshot of the instance ended the session of `exec`, and the command with it.
    pub const EXEC_SNAPSHOT: u8 = 254;
    /// `exec` could not run the command or lost the connection; every other code is the command's own.
    pub const EXEC_CLIENT: u8 = 255;
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// The server answered with an error.
    #[error("{}", api_text(*status, code, message))]
    Api {
        /// HTTP status.
        status: u16,
        /// The stable code of the error envelope, or the status text.
        code: String,
        /// The server's message.
        message: String,
    },
    /// The server could not be reached.
    #[error("cannot reach the server at {base_url}: {reason}")]
    Unreachable {
        /// Where the client looked.
        base_url: String,
        /// The system's words.
        reason: String,
        /// Whether nothing listens there (as opposed to a network that does not answer).
        refused: bool,
    },
    /// The server, or what answers in its place, does not speak the contract.
    #[error("unexpected answer from the server: {0}")]
    Protocol(String),
    /// A local file or stream.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, with the path.
        context: String,
        /// The cause.
        source: io::Error,
    },
    /// The command line or a configuration file is wrong.
    #[error("{message}")]
    Usage {
        /// What is wrong.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// Anything that failed with a known remedy.
    #[error("{message}")]
    Failed {
        /// What happened.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// A deadline that the user set has passed.
    #[error("{0}")]
    TimedOut(String),
    /// The user interrupted.
    #[error("interrupted")]
    Interrupted,
    /// A snapshot of the instance, or the rotation of its logs, ended the session, and the command with it.
    #[error(
        "ended by a snapshot of this instance, or the rotation of its logs: its hypervisor drops the connections to a guest whose state it writes"
    )]
    EndedBySnapshot,
    /// `exec` failed on this side of the guest.
    #[error(transparent)]
    Exec(Box<CliError>),
}

fn api_text(status: u16, code: &str, message: &str) -> String {
    if message.is_empty() {
        format!("the server answered {status} {code}")
    } else {
        message.to_owned()
    }
}

impl CliError {
    /// A local I/O failure with what was being done.
    pub fn io(context: impl Into<String>, source: io::Error) -> Self {
        Self::Io {
            context: context.into(),
            source,
        }
    }

    /// A failure without a particular hint.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::Failed {
            message: message.into(),
            hint: None,
        }
    }

    /// A failure with the way out of it.
    pub fn failed_with(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Failed {
            message: message.into(),
            hint: Some(hint.into()),
        }
    }

    /// A wrong command line or file.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::Usage {
            message: message.into(),
            hint: None,
        }
    }

    /// A wrong command line or file, with the way out of it.
    pub fn usage_with(message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Usage {
            message: message.into(),
            hint: Some(hint.into()),
        }
    }

    /// The process exit code for this failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage { .. } => exit::USAGE,
            Self::TimedOut(_) => exit::TIMED_OUT,
            Self::Interrupted => exit::INTERRUPTED,
            Self::Exec(inner) if matches!(**inner, Self::Interrupted) => exit::INTERRUPTED,
            Self::Exec(inner) if matches!(**inner, Self::EndedBySnapshot) => exit::EXEC_SNAPSHOT,
            Self::Exec(_) => exit::EXEC_CLIENT,
            _ => exit::FAILURE,
        }
    }

    /// What it is in one word, for programs: the server's own code where the server refused.
    pub fn code(&self) -> &str {
        match self {
            Self::Api { code, .. } => code,
            Self::Unreachable { .. } => "unreachable",
            Self::Protocol(_) => "protocol_error",
            Self::Io { .. } => "io_error",
            Self::Usage { .. } => "usage",
            Self::Failed { .. } => "failed",
            Self::TimedOut(_) => "timed_out",
            Self::Interrupted => "interrupted",
            Self::EndedBySnapshot => "ended_by_snapshot",
            Self::Exec(inner) => inner.code(),
        }
    }

    /// The HTTP status where the server refused.
    fn status(&self) -> Option<u16> {
        match self {
            Self::Api { status, .. } => Some(*status),
            Self::Exec(inner) => inner.status(),
            _ => None,
        }
    }

    /// All of it as a document: `code`, `message`, `status` of a refusal, `exit_code`, and `hint` where there is one.
    pub fn document(&self) -> Document {
        let number = |number: u64| Document::Number(number.into());
        let text = |text: &str| Document::String(text.to_owned());
        let mut members = vec![
            ("code".to_owned(), text(self.code())),
            ("message".to_owned(), text(&self.to_string())),
        ];
        members.extend(
            self.status()
                .map(|status| ("status".to_owned(), number(status.into()))),
        );
        members.push(("exit_code".to_owned(), number(self.exit_code().into())));
        members.extend(self.hint().map(|hint| ("hint".to_owned(), text(&hint))));
        Document::Object(members)
    }

    /// Whether the server said that the thing does not exist.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Api { status: 404, .. })
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Api {
                status,
                code,
                message,
            } => api_hint(*status, code, message),
            Self::Unreachable {
                refused: true,
                base_url,
                ..
            } => Some(format!(
                "nothing listens at {base_url}: start the server with `hypeman serve`, or name another one with \
                 --base-url or HYPEMAN_BASE_URL"
            )),
            Self::Unreachable { .. } => Some(
                "check --base-url, HYPEMAN_BASE_URL and base_url in ~/.config/hypeman/cli.yaml".to_owned(),
            ),
            Self::Protocol(_) => {
                Some("is that a hypeman server? `hypeman health` and `hypeman version` tell".to_owned())
            }
            Self::Usage { hint, .. } | Self::Failed { hint, .. } => hint.clone(),
            Self::TimedOut(_) => {
                Some("wait longer with --timeout, or see `hypeman logs` for what it does".to_owned())
            }
            Self::EndedBySnapshot => Some(
                "run it again; what must outlive snapshots belongs into the instance's own program, or on a hypervisor \
                 with snapshot-keeps-connections (`hypeman capabilities`)"
                    .to_owned(),
            ),
            Self::Exec(inner) => inner.hint(),
            Self::Io { .. } | Self::Interrupted => None,
        }
    }
}

/// One sentence for every error code of the API that says what to do next.
fn api_hint(status: u16, code: &str, message: &str) -> Option<String> {
    let hint = match (status, code) {
        (401, _) => {
            "mint a token with `hypeman token create --user-id you --save` on the server's machine, or set HYPEMAN_API_KEY"
        }
        (403, _) => {
            let scope = message.rsplit(' ').next().unwrap_or_default();
            if message.contains("scope") && scope.contains(':') {
                return Some(format!(
                    "this token lacks `{scope}`: mint one that has it with `hypeman token create --user-id you --scopes {scope}`"
                ));
            }
            "this token may not do that: see `hypeman token list-scopes`, then mint another one"
        }
        (404, "log_not_found") => {
            "that log has not been written yet: try --source hypeman, or start the instance"
        }
        (404, "platform_not_available") => {
            "the image has no such platform: leave --platform out, or name another"
        }
        (404, _) if message.contains("no endpoint") => {
            "this server does not have that: `hypeman capabilities` shows its version and what it can do"
        }
        (404, _) => {
            "`hypeman ps -a` lists instances, `hypeman image list` images, `hypeman snapshot list` snapshots"
        }
        (_, "ambiguous") => "more than one matches: give the full id (`hypeman ps -a`)",
        (_, "name_conflict" | "already_exists") => {
            "choose another --name, or `hypeman rm` the one that has it"
        }
        (_, "invalid_name") => {
            "names are lower-case letters, digits and inner dashes, at most 63; images are [registry/]repository[:tag]"
        }
        (_, "invalid_platform") => "platforms are linux/amd64 and linux/arm64",
        (_, "invalid_size" | "invalid_hotplug_size" | "invalid_overlay_size") => {
            "sizes are whole numbers with an optional unit in powers of 1024, for example 512MB or 2GB"
        }
        (_, "invalid_disk_io_bps") => "write bytes a second, for example 100MB/s",
        (_, "invalid_bandwidth_download" | "invalid_bandwidth_upload") => {
            "write bits (1Gbps) or bytes (100MB/s) a second"
        }
        (_, "invalid_ttl" | "invalid_timeout" | "invalid_compression_delay") => {
            "durations look like 90s, 30m or 2h45m"
        }
        (_, "invalid_expires_at") => "write a future time, for example 2030-01-31T12:00:00Z",
        (_, "instance_expired") => "its deadline has passed and it is being deleted",
        (_, "image_not_ready") => "wait for it: `hypeman image get NAME` shows its status",
        (_, "credential_conflict") => {
            "the same image is being pulled with other credentials: try again when that is done"
        }
        (_, "insufficient_resources") if message.contains("space") => {
            "free space in the server's data directory (`hypeman image delete`, `hypeman snapshot delete`) and try again"
        }
        (_, "insufficient_resources") => "see `hypeman resources`; stop something, or ask for less",
        (_, "invalid_digest") => "a digest is sha256: and 64 lower-case hexadecimal digits",
        (_, "invalid_manifest" | "unsupported_image") => {
            "the image itself is the reason: build it anew, or take another tag or --platform"
        }
        (_, "digest_mismatch" | "size_mismatch") => {
            "what came is not what was announced: try again; if it stays so, the image is damaged at its source"
        }
        (_, "too_large") => "it is beyond the server's limits: see `limits` in `hypeman serve --list-keys`",
        (_, "range_not_satisfiable") => "start the upload anew",
        (_, "registry_unauthorized") => {
            "the image may not exist, or may need a login: `docker login` as the server's user, or --username and \
             --password-stdin"
        }
        (_, "registry_untrusted") => {
            "the registry led somewhere it should not: check its address; images.trusted_realms and \
             images.insecure_registries of the server's configuration allow what is meant to be"
        }
        (_, "shutting_down") => "the server is ending: try again when it is back",
        (_, "rate_limited") => "the registry or the server limits requests: wait a moment and try again",
        (_, "invalid_state") => "see its state with `hypeman inspect`; start, stop or wait for it first",
        (_, "instance_in_standby") => "restore it first",
        (_, "conflict") => "it is in use or changing: try again when that is done",
        (_, "not_supported" | "not_implemented") => {
            "this hypervisor or server cannot do that: see `hypeman capabilities`"
        }
        (_, "incompatible") => {
            "nothing was started: do what the message says, or fork a Stopped snapshot instead"
        }
        (_, "snapshot_damaged") => {
            "nothing was started: `hypeman snapshot verify` says what else is damaged; use another snapshot"
        }
        (_, "memory_in_use") => {
            "the guest goes on with all of its memory: end what uses it, or `hypeman stop` it and take a Stopped snapshot"
        }
        (_, "restore_failed") => "`hypeman logs --source vmm` and `--source hypeman` of the instance say why",
        (_, "invalid_snapshot_compression") => "write zstd with level 1 to 19, or lz4 with level 0 to 9",
        (_, "invalid_cursor") => "give the id of a snapshot that the list has shown",
        (_, "cursor_gone") => {
            "these events are no longer kept: look at how things are, then listen from now on"
        }
        (_, "feature_disabled") => "switch it on in the server's configuration",
        (
            _,
            "invalid_health_check"
            | "invalid_restart_policy"
            | "invalid_auto_standby"
            | "invalid_snapshot_policy",
        ) => "see the command's --help for what it accepts",
        (_, "dependency_missing") => "`hypeman doctor` on the server's machine says what is missing",
        (_, "no_privilege" | "network_unavailable" | "permission_denied") => {
            "run the server as root for networking, or pass --network=false; `hypeman doctor` says more"
        }
        (507, _) | (_, "disk_full" | "no_space") => "free space in the server's data directory and try again",
        (408 | 504, _) => "the server took too long: try again, and see its log",
        (424, _) => {
            "the registry cannot be reached from the server: check the reference; `hypeman push` takes local images"
        }
        (429, _) => "too many requests: wait a moment and try again",
        (400, _) => "see the command's --help for what it accepts",
        (409, _) => "its state does not allow that now: see `hypeman inspect`",
        (502 | 503, _) => "the server, or a proxy in front of it, is not ready: try again in a moment",
        (500.., _) => "the server's own log has the cause (`hypeman logs --source hypeman` for an instance)",
        _ => return None,
    };
    Some(hint.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_of_the_contract_has_a_hint() {
        let codes = [
            (400, "invalid_name"),
            (400, "invalid_platform"),
            (404, "not_found"),
            (404, "platform_not_available"),
            (409, "credential_conflict"),
            (429, "rate_limited"),
            (409, "insufficient_resources"),
            (409, "invalid_state"),
            (409, "instance_expired"),
            (404, "log_not_found"),
            (500, "dependency_missing"),
            (400, "invalid_timeout"),
            (409, "instance_in_standby"),
            (400, "invalid_size"),
            (400, "invalid_hotplug_size"),
            (400, "invalid_overlay_size"),
            (400, "invalid_disk_io_bps"),
            (400, "invalid_bandwidth_download"),
            (400, "invalid_bandwidth_upload"),
            (400, "invalid_ttl"),
            (400, "invalid_expires_at"),
            (400, "invalid_request"),
            (400, "image_not_ready"),
            (400, "already_exists"),
            (400, "name_conflict"),
            (409, "ambiguous"),
            (409, "conflict"),
            (500, "internal_error"),
            (501, "not_supported"),
            (409, "incompatible"),
            (409, "snapshot_damaged"),
            (409, "restore_failed"),
            (409, "memory_in_use"),
            (400, "invalid_snapshot_compression"),
            (400, "invalid_compression_delay"),
            (400, "invalid_cursor"),
            (401, "Unauthorized"),
            (403, "Forbidden"),
            (400, "Bad Request"),
            (503, "Service Unavailable"),
        ];
        for (status, code) in codes {
            let failure = CliError::Api {
                status,
                code: code.to_owned(),
                message: "x".to_owned(),
            };
            assert!(failure.hint().is_some(), "{status} {code} has no hint");
        }
    }

    #[test]
    fn what_only_the_code_tells_is_not_answered_with_what_holds_for_its_status() {
        let codes = [
            (400, "invalid_manifest"),
            (400, "unsupported_image"),
            (400, "invalid_digest"),
            (400, "digest_mismatch"),
            (400, "size_mismatch"),
            (400, "too_large"),
            (400, "range_not_satisfiable"),
            (400, "registry_unauthorized"),
            (400, "image_not_ready"),
            (400, "invalid_snapshot_compression"),
            (409, "incompatible"),
            (409, "snapshot_damaged"),
            (409, "restore_failed"),
            (409, "memory_in_use"),
            (409, "insufficient_resources"),
            (410, "cursor_gone"),
            (424, "registry_untrusted"),
            (503, "shutting_down"),
        ];
        for (status, code) in codes {
            let hint = api_hint(status, code, "x");
            assert!(hint.is_some(), "{status} {code} has no hint");
            assert_ne!(
                hint,
                api_hint(status, "code_of_the_future", "x"),
                "{status} {code}"
            );
        }
        let full = api_hint(409, "insufficient_resources", "no space left on device");
        assert!(full.unwrap().contains("free space"));
    }

    #[test]
    fn a_missing_scope_is_named_in_the_command_that_mints_it() {
        let failure = CliError::Api {
            status: 403,
            code: "Forbidden".to_owned(),
            message: "missing required scope: image:write".to_owned(),
        };
        assert!(failure.hint().unwrap().contains("--scopes image:write"));
    }

    #[test]
    fn exec_failures_never_look_like_the_code_of_the_command() {
        let refused = CliError::Api {
            status: 409,
            code: "invalid_state".to_owned(),
            message: String::new(),
        };
        assert_eq!(CliError::Exec(Box::new(refused)).exit_code(), exit::EXEC_CLIENT);
        assert_eq!(
            CliError::Exec(Box::new(CliError::Interrupted)).exit_code(),
            exit::INTERRUPTED
        );
    }
}
