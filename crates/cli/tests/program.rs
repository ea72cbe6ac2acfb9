//! The built program, as scripts use it: standard output, standard error and exit codes.

// Helpers of tests may panic like the tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

struct Program {
    home: tempfile::TempDir,
}

impl Program {
    fn new() -> Self {
        Self {
            home: tempfile::tempdir().unwrap(),
        }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hypeman"));
        command
            .args(arguments)
            .env_clear()
            .env("HOME", self.home.path())
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("DATA_DIR", self.home.path().join("data"))
            .stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Answers each request on a port of its own with a fixed status and body, by path, until the test ends.
fn server(answers: Vec<(&'static str, u16, Value)>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = answer(stream.unwrap(), &answers);
        }
    });
    format!("http://{address}")
}

fn answer(mut stream: TcpStream, answers: &[(&str, u16, Value)]) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let wanted = first.split(' ').take(2).collect::<Vec<_>>().join(" ");
    let (status, body) = answers
        .iter()
        .find(|(path, _, _)| wanted.starts_with(path))
        .map_or(
            (404, json!({"code": "not_found", "message": "resource not found"})),
            |(_, status, body)| (*status, body.clone()),
        );
    // Text is a stream of events, all else JSON.
    let body = match body {
        Value::String(stream) => stream,
        other => other.to_string(),
    };
    write!(
        stream,
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[test]
fn version_and_completion_need_nothing() {
    let program = Program::new();
    assert!(out(&program.run(&["version"])).starts_with(concat!("hypeman ", env!("CARGO_PKG_VERSION"))));
    assert_eq!(
        out(&program.run(&["version", "-q"])).trim(),
        env!("CARGO_PKG_VERSION")
    );
    let document: Value = serde_json::from_str(&out(&program.run(&["version", "--format", "json"]))).unwrap();
    assert_eq!(document["version"], env!("CARGO_PKG_VERSION"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(
            out(&program.run(&["completion", shell])).contains("hypeman"),
            "{shell}"
        );
    }
}

#[test]
fn wrong_usage_is_2_and_a_server_that_is_not_there_is_explained() {
    let program = Program::new();
    assert_eq!(program.run(&["frobnicate"]).status.code(), Some(2));
    assert_eq!(
        program.run(&["ps", "--base-url", "localhost"]).status.code(),
        Some(2)
    );
    // Nothing listens on a port that nobody is ever given; one that was just given back could be another test's now.
    let closed = "127.0.0.1:1";
    let output = program.run(&["ps", "--base-url", &format!("http://{closed}")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        err(&output).contains("error: cannot reach the server"),
        "{}",
        err(&output)
    );
    assert!(
        err(&output).contains("hint: ") && err(&output).contains("hypeman serve"),
        "{}",
        err(&output)
    );
    assert_eq!(out(&output), "");
    let output = program.run(&["exec", "web", "true", "--base-url", &format!("http://{closed}")]);
    assert_eq!(
        output.status.code(),
        Some(255),
        "options after the instance belong to the command"
    );
}

#[test]
fn tokens_are_made_offline_and_verify() {
    let program = Program::new();
    let missing = program.run(&["token", "create", "--user-id", "me"]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(err(&missing).contains("hypeman serve"), "{}", err(&missing));

    let data = program.home.path().join("data");
    fs::create_dir(&data).unwrap();
    write_private(&data.join("jwt_secret"), "a secret for this test\n");
    let made = program.run(&[
        "token",
        "create",
        "--user-id",
        "me",
        "--scopes",
        "instance:read,image:read",
    ]);
    let token = out(&made).trim().to_owned();
    let verifier = hypeman_server::auth::Verifier::new("a secret for this test");
    let identity = verifier
        .verify(Some(format!("Bearer {token}").as_bytes()))
        .unwrap();
    assert_eq!(identity.subject, "me");
    assert!(identity.permissions.allow("image:read".parse().unwrap()));
    assert!(!identity.permissions.allow("image:write".parse().unwrap()));
    let other = hypeman_server::auth::Verifier::new("another");
    assert!(other.verify(Some(format!("Bearer {token}").as_bytes())).is_err());

    for wrong in [
        &[
            "token",
            "create",
            "--user-id",
            "me",
            "--scopes",
            "instance:everything",
        ][..],
        &["token", "create", "--user-id", "me", "--scopes", ""],
        &["token", "create", "--user-id", "me", "--duration", "soon"],
        &["token", "create", "--user-id", "me", "--duration", "0s"],
        &["token", "create"],
    ] {
        assert_eq!(program.run(wrong).status.code(), Some(2), "{wrong:?}");
    }
    assert_eq!(
        out(&program.run(&["token", "list-scopes", "-q"])).lines().count(),
        23
    );

    let saved = program.run(&[
        "token",
        "create",
        "--user-id",
        "me",
        "--save",
        "-q",
        "--base-url",
        "http://h:1",
    ]);
    assert_eq!((saved.status.code(), out(&saved)), (Some(0), String::new()));
    let file = fs::read_to_string(program.home.path().join(".config/hypeman/cli.yaml")).unwrap();
    assert!(
        file.contains("base_url: http://h:1") && file.contains("api_key: "),
        "{file}"
    );
}

fn write_private(path: &Path, text: &str) {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

#[test]
fn lists_have_every_format_and_secrets_stay_hidden() {
    let program = Program::new();
    let instance = json!({
        "id": "tz4a98xxat96iws9zmbrgj3a", "name": "web", "image": "alpine", "state": "Running",
        "env": {"PASSWORD": "hush"}, "network": {"enabled": false, "ip": null, "mac": null},
        "created_at": "2026-09-01T12:00:00Z", "field_of_the_future": 1
    });
    let base = server(vec![
        ("GET /instances/web", 200, instance.clone()),
        ("GET /instances?", 200, json!([instance])),
        (
            "GET /instances/many",
            409,
            json!({"code": "ambiguous", "message": "multiple resources match"}),
        ),
    ]);
    let run = |arguments: &[&str]| {
        let output = program
            .command(arguments)
            .env("HYPEMAN_BASE_URL", &base)
            .output()
            .unwrap();
        assert!(
            !out(&output).contains("hush") || arguments.contains(&"--show-env"),
            "{arguments:?}"
        );
        output
    };
    assert!(out(&run(&["ps"])).starts_with("INSTANCE ID"));
    assert_eq!(out(&run(&["ps", "-q"])), "tz4a98xxat96iws9zmbrgj3a\n");
    let list: Value = serde_json::from_str(&out(&run(&["ps", "--format", "json"]))).unwrap();
    assert_eq!(list[0]["field_of_the_future"], 1);
    assert_eq!(out(&run(&["ps", "--format", "jsonl"])).lines().count(), 1);
    assert!(out(&run(&["ps", "--format", "yaml"])).contains("name: web"));
    assert_eq!(out(&run(&["ps", "--format", "raw"])).lines().count(), 1);
    assert!(out(&run(&["inspect", "web"])).contains("PASSWORD=****"));
    assert!(out(&run(&["inspect", "web", "--show-env"])).contains("PASSWORD=hush"));
    let absent = run(&["inspect", "absent"]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(
        err(&absent).contains("error: absent: resource not found\nhint: "),
        "{}",
        err(&absent)
    );
    assert!(err(&run(&["inspect", "many"])).contains("hint: more than one matches"));
    let refused = run(&["rm", "web"]);
    assert!(err(&refused).contains("hypeman rm -f web"), "{}", err(&refused));
}

#[test]
fn failures_are_documents_where_programs_read_them() {
    let program = Program::new();
    let base = server(Vec::new());
    let run = |arguments: &[&str]| {
        let output = program
            .command(arguments)
            .env("HYPEMAN_BASE_URL", &base)
            .output()
            .unwrap();
        assert_eq!((output.status.code(), out(&output)), (Some(1), String::new()));
        err(&output)
    };
    // Of several, each is told.
    let told = run(&["stop", "one", "two", "--format-error", "jsonl"]);
    let failures: Vec<Value> = told
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(failures.len(), 2, "{told}");
    for (failure, name) in failures.iter().zip(["one", "two"]) {
        assert_eq!(
            (&failure["code"], &failure["status"]),
            (&json!("not_found"), &json!(404))
        );
        assert!(failure["message"].as_str().unwrap().contains(name), "{failure}");
        assert!(failure["hint"].is_string(), "{failure}");
    }
    assert_eq!(
        run(&["inspect", "absent", "--transform-error", "code"]),
        "\"not_found\"\n"
    );
    assert_eq!(
        run(&[
            "inspect",
            "absent",
            "--transform-error",
            "exit_code",
            "--format-error",
            "yaml"
        ]),
        "1\n"
    );
    // How results are printed says nothing about failures.
    assert!(run(&["inspect", "absent", "--format", "json"]).starts_with("error: "));
}

#[test]
fn lists_of_snapshots_have_every_format() {
    let program = Program::new();
    let id = "q7z1w7l2af4l8y7q1h7g2m3s";
    let base = server(vec![(
        "GET /snapshots",
        200,
        json!([{"id": id, "name": "base", "kind": "Stopped", "source_instance_name": "web", "size_bytes": 1}]),
    )]);
    for command in ["list", "tree"] {
        let run = |more: &[&str]| {
            let arguments = [&["snapshot", command, "--base-url", &base][..], more].concat();
            out(&program.run(&arguments))
        };
        assert!(run(&[]).contains(id), "{command}");
        assert_eq!(run(&["-q"]), format!("{id}\n"), "{command}");
        for format in ["json", "pretty", "jsonl", "raw"] {
            let document: Value = serde_json::from_str(&run(&["--format", format])).unwrap();
            let first = if document.is_array() {
                &document[0]
            } else {
                &document
            };
            assert_eq!(first["id"], id, "{command} {format}");
        }
        assert!(
            run(&["--format", "yaml"]).starts_with(&format!("- id: {id}\n")),
            "{command}"
        );
    }
}

#[test]
fn waiting_tells_timeout_from_failure() {
    let program = Program::new();
    let base = server(vec![
        (
            "GET /instances/slow/wait",
            200,
            json!({"state": "Initializing", "timed_out": true}),
        ),
        (
            "GET /instances/dead/wait",
            200,
            json!({"state": "Stopped", "timed_out": false}),
        ),
        (
            "GET /instances/good/wait",
            200,
            json!({"state": "Running", "timed_out": false}),
        ),
    ]);
    for (instance, code) in [("slow", 124), ("dead", 1), ("good", 0), ("gone", 1)] {
        let arguments = [
            "wait",
            instance,
            "--state",
            "Running",
            "--timeout",
            "1ms",
            "--base-url",
            &base,
        ];
        assert_eq!(program.run(&arguments).status.code(), Some(code), "{instance}");
    }
}

#[test]
fn run_pulls_creates_waits_and_explains_a_failure() {
    let program = Program::new();
    let image =
        |status: &str| json!({"name": "docker.io/library/app:latest", "status": status, "error": null});
    let base = server(vec![
        ("POST /images", 202, image("pending")),
        ("GET /images/docker.io", 200, image("ready")),
        (
            "POST /instances",
            201,
            json!({"id": "abc123", "name": "bad", "state": "Initializing"}),
        ),
        (
            "GET /instances/abc123/wait",
            200,
            json!({"state": "Stopped", "timed_out": false}),
        ),
        ("GET /instances/abc123/logs", 200, json!("data: \"ignored\"")),
        (
            "GET /instances/abc123",
            200,
            json!({"id": "abc123", "state": "Stopped", "exit_code": 127, "exit_message": "command not found"}),
        ),
    ]);
    let output = program.run(&["run", "app", "--name", "bad", "--base-url", &base]);
    assert_eq!(out(&output), "abc123\n");
    assert_eq!(output.status.code(), Some(1));
    let said = err(&output);
    assert!(
        said.contains("error: bad is Stopped with exit code 127: command not found"),
        "{said}"
    );
    assert!(
        said.contains("pending"),
        "progress is told without a terminal too: {said}"
    );
}

#[test]
fn configuration_errors_name_the_key_and_the_place() {
    let program = Program::new();
    let file = program.home.path().join("config.yaml");
    fs::write(&file, "prot: 1\n").unwrap();
    let path = file.display().to_string();
    let output = program.run(&["serve", "--config", &path]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        err(&output).contains("no configuration key \"prot\"\nhint: did you mean port?"),
        "{}",
        err(&output)
    );
    let output = program
        .command(&["serve"])
        .env("LOGGING__LEVEL", "loud")
        .output()
        .unwrap();
    assert!(err(&output).contains("choose error, warn"), "{}", err(&output));
    assert!(out(&program.run(&["serve", "--list-keys"])).contains("limits.max_overlay_size"));
}

#[test]
fn snapshots_are_found_by_name_and_forks_are_told_one_by_one() {
    let program = Program::new();
    let snapshot = |id: &str, parent: Value| {
        json!({
            "id": id, "name": "base", "kind": "Standby", "source_instance_id": "tz4a98xxat96iws9zmbrgj3a",
            "source_instance_name": "web", "source_hypervisor": "qemu", "size_bytes": 1024, "parent": parent,
            "created_at": "2026-09-01T12:00:00Z", "compression_state": "none"
        })
    };
    let base = snapshot("q7z1w7l2af4l8y7q1h7g2m3s", Value::Null);
    let next = snapshot("a7z1w7l2af4l8y7q1h7g2m3s", json!("q7z1w7l2af4l8y7q1h7g2m3s"));
    let address = server(vec![
        ("GET /snapshots?name=base", 200, json!([base])),
        ("GET /snapshots?name=twice", 200, json!([base, next])),
        ("GET /snapshots?name=absent", 200, json!([])),
        (
            "GET /snapshots/q7z1w7l2af4l8y7q1h7g2m3s/usage",
            200,
            json!({"own_bytes": 2048, "shared_bytes": 0, "freed_by_delete_bytes": 2048}),
        ),
        ("GET /snapshots/q7z1w7l2af4l8y7q1h7g2m3s", 200, base.clone()),
        ("GET /snapshots", 200, json!([next, base])),
        (
            "POST /snapshots/q7z1w7l2af4l8y7q1h7g2m3s/fork",
            201,
            json!({"forks": [
                {"name": "w-1", "instance": {"id": "abc123", "name": "w-1", "env": {"PASSWORD": "hush"}}},
                {"name": "w-2", "error": {"code": "conflict", "message": "the name is taken"}}
            ]}),
        ),
        (
            "POST /instances/web/fork",
            201,
            json!({"id": "abc123", "name": "copy"}),
        ),
        (
            "POST /instances/web/standby",
            409,
            json!({"code": "invalid_state", "message": "instance must be running to go to standby"}),
        ),
    ]);
    let run = |arguments: &[&str]| {
        let output = program
            .command(arguments)
            .env("HYPEMAN_BASE_URL", &address)
            .output()
            .unwrap();
        assert!(!out(&output).contains("hush"), "{arguments:?}");
        output
    };
    assert!(out(&run(&["snapshot", "list"])).starts_with("SNAPSHOT ID"));
    assert_eq!(
        out(&run(&["snapshot", "list", "-q"])),
        "a7z1w7l2af4l8y7q1h7g2m3s\nq7z1w7l2af4l8y7q1h7g2m3s\n"
    );
    let tree = out(&run(&["snapshot", "tree"]));
    assert!(
        tree.starts_with("q7z1w7l2af4l8y7q1h7g2m3s base (web") && tree.contains("\n└─ a7z1"),
        "{tree}"
    );
    assert!(out(&run(&["snapshot", "get", "base"])).contains("q7z1w7l2af4l8y7q1h7g2m3s"));
    assert!(out(&run(&["snapshot", "usage", "base"])).contains("2.0 KiB"));
    let twice = err(&run(&["snapshot", "get", "twice"]));
    assert!(
        twice.contains("several snapshots") && twice.contains("hint: give one of the ids"),
        "{twice}"
    );
    assert!(err(&run(&["snapshot", "delete", "absent"])).contains("hypeman snapshot list"));

    let forks = run(&["snapshot", "fork", "base", "w", "--count", "2"]);
    assert_eq!(
        (forks.status.code(), out(&forks)),
        (Some(1), "abc123\n".to_owned())
    );
    assert!(err(&forks).contains("w-2: the name is taken"), "{}", err(&forks));
    run(&[
        "snapshot", "fork", "base", "w", "--count", "2", "--format", "json",
    ]);
    assert_eq!(out(&run(&["fork", "web", "copy"])), "abc123\n");

    let refused = run(&["standby", "web"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        err(&refused).contains("must be running") && err(&refused).contains("hint: "),
        "{}",
        err(&refused)
    );
}

#[test]
fn verification_is_followed_to_its_result() {
    let program = Program::new();
    let progress = r#"data: {"state":"running","verified_bytes":512,"total_bytes":1024}"#;
    let base = server(vec![
        (
            "POST /snapshots/aaaaaaaaaaaaaaaaaaaaaaaa/verify",
            200,
            json!(format!(
                "{progress}\n\ndata: {{\"state\":\"intact\",\"verified_bytes\":1024,\"total_bytes\":1024}}\n\n"
            )),
        ),
        (
            "POST /snapshots/bbbbbbbbbbbbbbbbbbbbbbbb/verify",
            200,
            json!(
                "data: {\"state\":\"damaged\",\"verified_bytes\":0,\"total_bytes\":1024,\"damage\":\"frame 3 of memory\"}\n\n"
            ),
        ),
        (
            "POST /snapshots/cccccccccccccccccccccccc/verify",
            200,
            json!(format!("{progress}\n\n")),
        ),
    ]);
    let run = |id: &str, more: &[&str]| {
        let mut arguments = vec!["snapshot", "verify", id, "--base-url", &base];
        arguments.extend(more);
        program.run(&arguments)
    };
    let intact = run("aaaaaaaaaaaaaaaaaaaaaaaa", &[]);
    assert_eq!(
        (intact.status.code(), out(&intact)),
        (
            Some(0),
            "aaaaaaaaaaaaaaaaaaaaaaaa is intact: 1.0 KiB read\n".to_owned()
        )
    );
    let damaged = run("bbbbbbbbbbbbbbbbbbbbbbbb", &["--format", "json"]);
    assert_eq!(damaged.status.code(), Some(1));
    assert!(err(&damaged).contains("frame 3 of memory"), "{}", err(&damaged));
    let document: Value = serde_json::from_str(&out(&damaged)).unwrap();
    assert_eq!(document["state"], "damaged");
    let broken = run("cccccccccccccccccccccccc", &[]);
    assert_eq!(broken.status.code(), Some(1));
    assert!(err(&broken).contains("without a result"), "{}", err(&broken));
}
