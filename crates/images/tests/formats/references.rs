//! References and platforms.

use hypeman_images::{Digest, Platform, Reference};
use proptest::prelude::*;

const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn names_are_normalised() {
    for (text, canonical) in [
        ("alpine", "docker.io/library/alpine:latest"),
        ("alpine:3.20", "docker.io/library/alpine:3.20"),
        ("library/alpine", "docker.io/library/alpine:latest"),
        ("docker.io/alpine", "docker.io/library/alpine:latest"),
        (
            "index.docker.io/library/alpine",
            "docker.io/library/alpine:latest",
        ),
        ("user/app", "docker.io/user/app:latest"),
        ("ghcr.io/a/b/c/d:v1", "ghcr.io/a/b/c/d:v1"),
        ("GHCR.io/a/b", "ghcr.io/a/b:latest"),
        ("localhost/app", "localhost/app:latest"),
        ("localhost:5000/app", "localhost:5000/app:latest"),
        ("127.0.0.1:5000/a/b:c", "127.0.0.1:5000/a/b:c"),
        ("[::1]:5000/app", "[::1]:5000/app:latest"),
        ("localhost", "docker.io/library/localhost:latest"),
        ("a__b-d---e/x_y.z", "docker.io/a__b-d---e/x_y.z:latest"),
        ("app:UPPER_case.1-2", "docker.io/library/app:UPPER_case.1-2"),
    ] {
        assert_eq!(Reference::parse(text).unwrap().to_string(), canonical, "{text}");
    }
    let text = format!("alpine@{DIGEST}");
    let reference = Reference::parse(&text).unwrap();
    assert_eq!(reference.to_string(), format!("docker.io/library/{text}"));
    assert_eq!(
        (reference.tag(), reference.digest()),
        (None, Some(&Digest::of(b"")))
    );
    let both = Reference::parse(&format!("alpine:3@{DIGEST}")).unwrap();
    assert_eq!(
        (both.tag(), both.manifest_selector()),
        (Some("3"), DIGEST.to_owned())
    );
}

#[test]
fn what_is_no_name_is_refused_with_the_reason() {
    let long = "a".repeat(300);
    let hex = "0".repeat(64);
    for text in [
        "",
        " ",
        "a b",
        "Upper",
        "UPPER/app",
        "/a",
        "a/",
        "a//b",
        "a:",
        "a:-x",
        "a:.x",
        "a@",
        "a@sha256:abc",
        "a@sha512:00",
        "a@md5:00",
        "-a",
        "a-",
        "a.",
        ".a",
        "a___b",
        "a._b",
        "a..b",
        "ghcr.io/",
        "ghcr.io:x/a",
        "ghcr.io:0/a",
        "ghcr.io:70000/a",
        "ghcr.io:/a",
        "-x.io/a",
        "x..io/a",
        "[::1/a",
        "[zz]/a",
        "[::1]x/a",
        "../a",
        "a/../b",
        "http://a/b",
        "a\0b",
        "ä",
        "a@b@c",
        "a?b",
        "a#b",
        "u:p@h.io/a",
        &long,
        &hex,
    ] {
        let error = Reference::parse(text).unwrap_err();
        assert_eq!(error.code(), "invalid_name", "{text:?}");
        assert!(error.to_string().len() < 400);
    }
}

#[test]
fn parts_of_a_registry_request_make_a_reference() {
    let tagged = Reference::from_parts("localhost:8080", "a/b/c", "v1").unwrap();
    assert_eq!(tagged.to_string(), "localhost:8080/a/b/c:v1");
    let pinned = Reference::from_parts("localhost:8080", "a", DIGEST).unwrap();
    assert_eq!(pinned.to_string(), format!("localhost:8080/a@{DIGEST}"));
    assert!(Reference::from_parts("localhost:8080", "a:b", "v1").is_err());
    assert!(Reference::from_parts("localhost:8080", "a", "sha256:zz").is_err());
    assert_eq!(pinned.with_tag("v2").unwrap().to_string(), "localhost:8080/a:v2");
    assert!(pinned.with_tag("a/b").is_err());
}

#[test]
fn platforms_are_read_and_ranked() {
    for text in ["linux/amd64", "linux/arm64", "linux/arm64/v8"] {
        assert_eq!(Platform::parse_supported(text).unwrap().to_string(), &text[..11]);
    }
    for text in [
        "",
        "linux",
        "linux/",
        "/amd64",
        "linux/amd64/",
        "linux/amd64/v3",
        "linux/amd64/a/b",
        "Linux/amd64",
        "linux/riscv64",
        "windows/amd64",
        "linux/amd64 ",
        "linux/arm64/v9",
    ] {
        assert!(Platform::parse_supported(text).is_err(), "{text:?}");
    }
    let rank = |wanted: &str, offered: &str| {
        Platform::parse(wanted)
            .unwrap()
            .rank(&Platform::parse(offered).unwrap())
    };
    assert_eq!(rank("linux/arm64", "linux/arm64/v8"), Some(0));
    assert_eq!(rank("linux/arm64/v8", "linux/arm64"), Some(0));
    assert_eq!(rank("linux/amd64", "linux/amd64/v3"), None);
    assert_eq!(rank("linux/arm/v7", "linux/arm/v6"), Some(1));
    assert_eq!(rank("linux/arm/v6", "linux/arm/v7"), None);
    assert_eq!(rank("linux/amd64", "linux/arm64"), None);
}

proptest! {
    #[test]
    fn what_is_parsed_and_shown_parses_to_the_same(
        registry in "(|docker\\.io/|localhost/|[a-z]{1,5}(\\.[a-z]{2,4}){1,2}(:[1-9][0-9]{0,3})?/|\\[::1\\]:80/)",
        path in "[a-z0-9]{1,6}((\\.|_|__|-{1,3}|/)[a-z0-9]{1,6}){0,4}",
        tag in "(|:[A-Za-z0-9_][A-Za-z0-9_.-]{0,20})",
        pinned in any::<bool>(),
    ) {
        let digest = if pinned { format!("@{DIGEST}") } else { String::new() };
        let reference = Reference::parse(&format!("{registry}{path}{tag}{digest}"));
        prop_assume!(reference.is_ok() || path.contains('.'));
        if let Ok(reference) = reference {
            prop_assert_eq!(&Reference::parse(&reference.to_string()).unwrap(), &reference);
        }
    }

    #[test]
    fn any_text_is_refused_or_survives_the_round(text in "\\PC{0,60}") {
        if let Ok(reference) = Reference::parse(&text) {
            prop_assert_eq!(&Reference::parse(&reference.to_string()).unwrap(), &reference);
        }
        let _ = Platform::parse(&text);
        let _ = Digest::parse(&text);
    }

    #[test]
    fn text_made_of_the_grammars_characters_survives_the_round(text in "[a-z0-9A-Z./:@_\\[\\]-]{0,40}") {
        if let Ok(reference) = Reference::parse(&text) {
            prop_assert_eq!(&Reference::parse(&reference.to_string()).unwrap(), &reference);
        }
    }
}
