//! The papers are true: the rules between crates hold, and what they point at exists.

use std::collections::BTreeSet;
use std::path::Path;

use hypeman_tests::{Server, repository};

/// What each crate may use of the workspace, as ARCHITECTURE.md says.
const MAY_USE: [(&str, &[&str]); 16] = [
    ("core", &[]),
    ("api", &["core"]),
    ("store", &["core"]),
    ("erofs", &[]),
    ("images", &["core", "erofs"]),
    ("snapshots", &[]),
    ("jail", &[]),
    ("pager", &["snapshots"]),
    ("vmm", &["core", "guest-api", "jail"]),
    ("network", &["core"]),
    ("kernel", &["core"]),
    ("guest-api", &["core"]),
    ("guest", &["core", "guest-api"]),
    (
        "engine",
        &[
            "core",
            "store",
            "images",
            "snapshots",
            "pager",
            "vmm",
            "network",
            "kernel",
            "guest-api",
        ],
    ),
    (
        "server",
        &["core", "api", "engine", "guest-api", "images", "network", "vmm"],
    ),
    (
        "cli",
        &[
            "core", "api", "server", "engine", "images", "kernel", "network", "pager", "vmm",
        ],
    ),
];

fn read(path: impl AsRef<Path>) -> String {
    let path = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn crates_use_only_what_lies_below_them() {
    let mut crates: BTreeSet<String> = std::fs::read_dir(repository().join("crates"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    for (name, allowed) in MAY_USE {
        assert!(crates.remove(name), "the crate {name} is gone");
        let manifest = read(format!("crates/{name}/Cargo.toml"));
        let product = manifest.split("[dev-dependencies]").next().unwrap();
        for line in product.lines().filter(|line| line.starts_with("hypeman-")) {
            let used = line
                .trim_start_matches("hypeman-")
                .split(['.', ' ', '='])
                .next()
                .unwrap();
            assert!(allowed.contains(&used), "{name} must not use {used}");
        }
    }
    assert_eq!(crates, BTreeSet::new(), "crates without a rule");
}

#[test]
fn the_compatibility_table_names_tests_that_exist() {
    let table = read("docs/compatibility.md");
    let named: BTreeSet<&str> = table.split('`').filter(|word| word.contains("::")).collect();
    assert!(named.len() > 40, "{}", named.len());
    for name in named {
        let (module, test) = name.split_once("::").unwrap();
        let source = read(format!("tests/stories/{module}.rs"));
        assert!(source.contains(&format!("fn {test}(")), "{name} does not exist");
    }
}

#[test]
fn links_between_the_papers_lead_somewhere() {
    for paper in [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "docs/compatibility.md",
        "docs/configuration.md",
    ] {
        let text = read(paper);
        let directory = Path::new(paper).parent().unwrap();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.starts_with("http") || target.starts_with('#') {
                continue;
            }
            let path = repository().join(directory).join(target);
            assert!(path.exists(), "{paper} points at {target}");
        }
    }
}

#[tokio::test]
async fn the_configuration_page_has_every_key_and_its_default() {
    let server = Server::start().await;
    let listed = server.command_line().run(&["serve", "--list-keys"]).await.ok();
    let page = read("docs/configuration.md");
    for line in listed.lines().skip(1) {
        let mut words = line.split_whitespace();
        let (key, default) = (words.next().unwrap(), words.next().unwrap());
        let row = page.lines().find(|row| row.starts_with(&format!("| `{key}` |")));
        let row = row.unwrap_or_else(|| panic!("{key} is missing"));
        let shown = row.split('|').nth(2).unwrap().trim();
        assert!(
            shown == "–" || shown == format!("`{default}`"),
            "{key}: {shown} instead of {default}"
        );
    }
    for row in page
        .lines()
        .filter(|row| row.starts_with("| `") && row.contains('.') && !row.contains("--"))
    {
        let key = row.split('`').nth(1).unwrap();
        assert!(
            listed.contains(key.split(".<").next().unwrap()),
            "{key} is not a key any more"
        );
    }
}
