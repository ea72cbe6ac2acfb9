//! Names of instances, ingresses and snapshots: `^[a-z0-9]([a-z0-9-]*[a-z0-9])?$`, at most 63 characters.
//!
//! The rule is that of a DNS label, because an instance's name becomes its host name.

use crate::InvalidValue;

/// Longest name.
pub const MAX_LENGTH: usize = 63;

/// Longest prefix of scheduled snapshots' names, which a time is added to.
pub const MAX_PREFIX_LENGTH: usize = 47;

/// The rule as a regular expression, for the OpenAPI document.
pub const PATTERN: &str = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$";

/// Checks a name.
///
/// # Errors
/// `invalid_request` with the rule that is broken.
pub fn check(name: &str) -> Result<(), InvalidValue> {
    check_bounded(name, MAX_LENGTH)
}

/// Checks a name prefix of a snapshot schedule.
///
/// # Errors
/// `invalid_request` with the rule that is broken.
pub fn check_prefix(prefix: &str) -> Result<(), InvalidValue> {
    check_bounded(prefix, MAX_PREFIX_LENGTH)
}

fn check_bounded(name: &str, max: usize) -> Result<(), InvalidValue> {
    let refuse = |message: String| Err(InvalidValue::new("invalid_request", message).in_field("name"));
    if name.is_empty() {
        return refuse("name is required".to_owned());
    }
    if name.len() > max {
        return refuse(format!("name must be at most {max} characters"));
    }
    if !name
        .bytes()
        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    {
        return refuse("name may hold only lower-case letters, digits and dashes".to_owned());
    }
    if name.starts_with('-') || name.ends_with('-') {
        return refuse("name must begin and end with a letter or a digit".to_owned());
    }
    Ok(())
}

/// Whether `name` is a valid name.
#[must_use]
pub fn is_valid(name: &str) -> bool {
    check(name).is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn table() {
        let longest = "a".repeat(63);
        let too_long = "a".repeat(64);
        for (name, valid) in [
            ("a", true),
            ("0", true),
            ("web-1", true),
            ("a--b", true),
            (longest.as_str(), true),
            ("", false),
            ("-a", false),
            ("a-", false),
            ("-", false),
            ("Web", false),
            ("a_b", false),
            ("a.b", false),
            ("ä", false),
            ("a b", false),
            ("a\n", false),
            (too_long.as_str(), false),
        ] {
            assert_eq!(is_valid(name), valid, "{name:?}");
        }
        assert!(check_prefix(&"a".repeat(47)).is_ok());
        assert!(check_prefix(&"a".repeat(48)).is_err());
    }

    proptest! {
        #[test]
        fn whatever_the_pattern_makes_is_valid(name in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?") {
            prop_assert!(is_valid(&name));
        }
    }
}
