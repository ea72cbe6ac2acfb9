//! Identifiers: 24 characters of `[a-z0-9]` that begin with a letter, made from random bytes.
//!
//! 26 · 36²³ values: two ids collide after about 10¹⁸ of them, so uniqueness is never checked.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize};

use crate::InvalidValue;

/// Characters of an id.
pub const LENGTH: usize = 24;

/// Random bytes that [`Id::from_random`] consumes.
pub const RANDOM_BYTES: usize = LENGTH;

const LETTERS: &[u8; 26] = b"abcdefghijklmnopqrstuvwxyz";
const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// A well-formed identifier.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Id(String);

impl Id {
    /// Makes an id from random bytes.
    ///
    /// The bytes are read as one large number in base 256 and written in base 36 (the first digit in base 26),
    /// so no character is more likely than another by more than 2⁻⁶⁰.
    #[must_use]
    pub fn from_random(random: &[u8; RANDOM_BYTES]) -> Self {
        let mut number = *random;
        let mut text = String::with_capacity(LENGTH);
        text.push(char::from(LETTERS[usize::from(divide(&mut number, 26))]));
        for _ in 1..LENGTH {
            text.push(char::from(ALPHABET[usize::from(divide(&mut number, 36))]));
        }
        Self(text)
    }

    /// Takes an id from outside.
    ///
    /// # Errors
    /// `invalid_id` when it is not 24 characters of `[a-z0-9]` with a letter first.
    pub fn parse(text: &str) -> Result<Self, InvalidValue> {
        if is_id(text) {
            Ok(Self(text.to_owned()))
        } else {
            Err(InvalidValue::new(
                "invalid_id",
                "an id is 24 lower-case letters and digits, with a letter first",
            ))
        }
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id as an owned text.
    #[must_use]
    pub fn into_string(self) -> String {
        self.0
    }
}

/// Divides a big-endian number in place and returns the remainder.
fn divide(number: &mut [u8; RANDOM_BYTES], by: u16) -> u8 {
    let mut remainder = 0u16;
    for byte in number.iter_mut() {
        let value = remainder << 8 | u16::from(*byte);
        *byte = u8::try_from(value / by).unwrap_or(u8::MAX);
        remainder = value % by;
    }
    u8::try_from(remainder).unwrap_or(0)
}

/// Whether `text` has the form of an id.
#[must_use]
pub fn is_id(text: &str) -> bool {
    text.len() == LENGTH
        && text
            .bytes()
            .next()
            .is_some_and(|first| first.is_ascii_lowercase())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for Id {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_random_value_makes_a_well_formed_id(random: [u8; RANDOM_BYTES]) {
            let id = Id::from_random(&random);
            prop_assert!(is_id(id.as_str()));
            prop_assert_eq!(Id::parse(id.as_str()).unwrap(), id);
        }

        #[test]
        fn different_randomness_makes_different_ids(a: [u8; RANDOM_BYTES], b: [u8; RANDOM_BYTES]) {
            // 24 bytes hold more than an id does; equal ids from random pairs would mean lost entropy.
            prop_assume!(a != b);
            prop_assert_ne!(Id::from_random(&a), Id::from_random(&b));
        }
    }

    #[test]
    fn foreign_ids_are_checked() {
        assert!(Id::parse("tz4a98xxat96iws9zmbrgj3a").is_ok());
        for bad in [
            "",
            "tz4a98xxat96iws9zmbrgj3",
            "1z4a98xxat96iws9zmbrgj3a",
            "tz4a98xxat96iws9zmbrgj3A",
            "tz4a98xxat96iws9zmbrgé3",
        ] {
            assert_eq!(Id::parse(bad).unwrap_err().code, "invalid_id", "{bad}");
        }
    }
}
