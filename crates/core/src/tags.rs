//! Tags: up to 50 pairs that users attach to what they make, and filters over them.

use std::collections::BTreeMap;

use crate::InvalidValue;

/// Tags in a stable order.
pub type Tags = BTreeMap<String, String>;

/// Most tags of one object.
pub const MAX_ENTRIES: usize = 50;
/// Longest key, in characters.
pub const MAX_KEY: usize = 128;
/// Longest value, in characters.
pub const MAX_VALUE: usize = 256;

/// Characters of keys and values as a regular expression, for the OpenAPI document.
pub const PATTERN: &str = "^[A-Za-z0-9 _.:/=+@-]*$";

/// Checks tags against the limits and the alphabet.
///
/// # Errors
/// `invalid_request`, naming the first offending key.
pub fn check(tags: &Tags) -> Result<(), InvalidValue> {
    let refuse = |message: String| Err(InvalidValue::new("invalid_request", message).in_field("tags"));
    if tags.len() > MAX_ENTRIES {
        return refuse(format!(
            "at most {MAX_ENTRIES} tags are allowed, got {}",
            tags.len()
        ));
    }
    for (key, value) in tags {
        // The alphabet is ASCII, so bytes are characters in whatever passes.
        if key.is_empty() || key.len() > MAX_KEY {
            return refuse(format!("a tag key must be 1 to {MAX_KEY} characters"));
        }
        if !in_alphabet(key) {
            return refuse(format!(
                "tag key {key:?} may hold only letters, digits, space and _.:/=+@-"
            ));
        }
        if value.len() > MAX_VALUE {
            return refuse(format!(
                "the value of tag {key:?} must be at most {MAX_VALUE} characters"
            ));
        }
        if !in_alphabet(value) {
            return refuse(format!(
                "the value of tag {key:?} may hold only letters, digits, space and _.:/=+@-"
            ));
        }
    }
    Ok(())
}

fn in_alphabet(text: &str) -> bool {
    text.bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b" _.:/=+@-".contains(&byte))
}

/// Whether `tags` has every pair of `filter`. The empty filter matches everything.
#[must_use]
pub fn matches(filter: &Tags, tags: &Tags) -> bool {
    filter.iter().all(|(key, value)| tags.get(key) == Some(value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tags(pairs: &[(&str, &str)]) -> Tags {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn limits() {
        let long_key = "k".repeat(129);
        let long_value = "v".repeat(257);
        assert!(check(&tags(&[])).is_ok());
        assert!(check(&tags(&[("team", "backend"), ("a b_.:/=+@-Z9", "")])).is_ok());
        assert!(check(&tags(&[(&long_key[1..], &long_value[1..])])).is_ok());
        for bad in [
            ("", "x"),
            ("ä", "x"),
            ("k", "ä"),
            ("k", "a\nb"),
            ("k{", "x"),
            (&long_key, "x"),
            ("k", &long_value),
        ] {
            assert_eq!(
                check(&tags(&[bad])).unwrap_err().code,
                "invalid_request",
                "{bad:?}"
            );
        }
        let many: Tags = (0..50).map(|n| (n.to_string(), String::new())).collect();
        assert!(check(&many).is_ok());
        let too_many: Tags = (0..51).map(|n| (n.to_string(), String::new())).collect();
        assert!(check(&too_many).is_err());
    }

    #[test]
    fn filters_are_anded_and_exact() {
        let object = tags(&[("team", "backend"), ("env", "prod")]);
        assert!(matches(&tags(&[]), &object));
        assert!(matches(&tags(&[("team", "backend")]), &object));
        assert!(matches(&tags(&[("team", "backend"), ("env", "prod")]), &object));
        assert!(!matches(&tags(&[("team", "backend"), ("env", "test")]), &object));
        assert!(!matches(&tags(&[("team", "back")]), &object));
        assert!(!matches(&tags(&[("owner", "")]), &object));
    }

    proptest! {
        #[test]
        fn tags_match_themselves_and_any_part(all: BTreeMap<String, String>, keep: u8) {
            let part: Tags = all.iter().take(usize::from(keep)).map(|(k, v)| (k.clone(), v.clone())).collect();
            prop_assert!(matches(&part, &all));
        }
    }
}
