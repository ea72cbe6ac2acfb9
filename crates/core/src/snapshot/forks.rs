//! The names of several forks that are made at once: `name-1`, `name-2`, …

use crate::{InvalidValue, name};

/// Most forks of one request.
pub const MAX_FORKS: u32 = 100;

/// The names of `count` forks. One fork has the name itself.
///
/// # Errors
/// `invalid_request` when the count is not 1 to [`MAX_FORKS`], or the longest name would break the name rule.
pub fn fork_names(base: &str, count: u32) -> Result<Vec<String>, InvalidValue> {
    if !(1..=MAX_FORKS).contains(&count) {
        return Err(InvalidValue::new(
            "invalid_request",
            format!("count must be 1 to {MAX_FORKS}, not {count}"),
        )
        .in_field("count"));
    }
    name::check(base)?;
    if count == 1 {
        return Ok(vec![base.to_owned()]);
    }
    let names: Vec<String> = (1..=count).map(|number| format!("{base}-{number}")).collect();
    // The last is the longest; its own rule would speak of a name that nobody wrote.
    let longest = names.last().map_or(0, String::len);
    if longest > name::MAX_LENGTH {
        let room = name::MAX_LENGTH - (longest - base.len());
        return Err(InvalidValue::new(
            "invalid_request",
            format!(
                "name must be at most {room} characters, for each of {count} forks gets a number appended"
            ),
        )
        .in_field("name"));
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_fork_keeps_its_name_and_several_are_numbered() {
        assert_eq!(fork_names("web", 1).unwrap(), ["web"]);
        assert_eq!(fork_names("web", 3).unwrap(), ["web-1", "web-2", "web-3"]);
    }

    #[test]
    fn there_are_1_to_100() {
        assert!(fork_names("web", 0).is_err());
        assert!(fork_names("web", 100).is_ok());
        assert_eq!(fork_names("web", 101).unwrap_err().field, "count");
    }

    #[test]
    fn a_long_name_leaves_room_for_the_number() {
        let name = "a".repeat(61);
        assert!(fork_names(&name, 9).is_ok());
        let error = fork_names(&name, 10).unwrap_err();
        assert!(error.message.contains("at most 60 characters"), "{error}");
    }

    proptest! {
        #[test]
        fn names_are_valid_and_differ(base in "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", count in 1u32..=100) {
            if let Ok(names) = fork_names(&base, count) {
                prop_assert!(names.iter().all(|each| name::is_valid(each)));
                let different: BTreeSet<_> = names.iter().collect();
                prop_assert_eq!(different.len(), count as usize);
            } else {
                prop_assert!(base.len() > 59);
            }
        }
    }
}
