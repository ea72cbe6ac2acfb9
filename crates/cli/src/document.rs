//! A JSON value that keeps the order of its keys.
//!
//! Answers of the server are shown as the server wrote them: fields that this client does not know are kept, and
//! keys stay in the server's order, which is the order people expect (`id`, `name`, …, not alphabetical).

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde::ser::{Serialize, SerializeMap, Serializer};

/// One JSON value.
#[derive(Debug, Clone, PartialEq)]
pub enum Document {
    /// `null`.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// Any number.
    Number(serde_json::Number),
    /// Text.
    String(String),
    /// A list.
    Array(Vec<Document>),
    /// Members in the order they were written.
    Object(Vec<(String, Document)>),
}

impl Document {
    /// Parses JSON text.
    ///
    /// # Errors
    /// When the text is not JSON.
    pub fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(text)
    }

    /// Turns any serialisable value into a document.
    ///
    /// # Errors
    /// When the value cannot be represented as JSON.
    pub fn of<T: Serialize>(value: &T) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(&serde_json::to_vec(value)?)
    }

    /// The member at a dotted path, for example `network.ip`. Absent and `null` are both `None`.
    pub fn get(&self, path: &str) -> Option<&Document> {
        let mut here = self;
        for part in path.split('.') {
            let Self::Object(members) = here else { return None };
            here = members
                .iter()
                .find(|(key, _)| key == part)
                .map(|(_, value)| value)?;
        }
        (!matches!(here, Self::Null)).then_some(here)
    }

    /// The member as text, when it is text.
    pub fn text(&self, path: &str) -> Option<&str> {
        match self.get(path) {
            Some(Self::String(text)) => Some(text),
            _ => None,
        }
    }

    /// The member as a signed integer.
    pub fn integer(&self, path: &str) -> Option<i64> {
        match self.get(path) {
            Some(Self::Number(number)) => number.as_i64(),
            _ => None,
        }
    }

    /// The member as a number.
    pub fn number(&self, path: &str) -> Option<f64> {
        match self.get(path) {
            Some(Self::Number(number)) => number.as_f64(),
            _ => None,
        }
    }

    /// The member as a boolean.
    pub fn flag(&self, path: &str) -> Option<bool> {
        match self.get(path) {
            Some(Self::Bool(flag)) => Some(*flag),
            _ => None,
        }
    }

    /// The elements when this is a list, nothing otherwise.
    pub fn items(&self) -> &[Document] {
        match self {
            Self::Array(items) => items,
            _ => &[],
        }
    }

    /// The members when this is an object, nothing otherwise.
    pub fn members(&self) -> &[(String, Document)] {
        match self {
            Self::Object(members) => members,
            _ => &[],
        }
    }

    /// Replaces the values of every object that is a member `key` by stars, however deep it lies. Used for `env`,
    /// which the server returns in clear.
    pub fn mask_values(&mut self, key: &str) {
        match self {
            Self::Array(items) => items.iter_mut().for_each(|item| item.mask_values(key)),
            Self::Object(members) => {
                for (name, value) in members {
                    if name == key
                        && let Self::Object(entries) = value
                    {
                        for (_, secret) in entries {
                            *secret = Self::String("********".to_owned());
                        }
                    } else {
                        value.mask_values(key);
                    }
                }
            }
            _ => {}
        }
    }
}

impl Serialize for Document {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Null => serializer.serialize_unit(),
            Self::Bool(flag) => serializer.serialize_bool(*flag),
            Self::Number(number) => number.serialize(serializer),
            Self::String(text) => serializer.serialize_str(text),
            Self::Array(items) => serializer.collect_seq(items),
            Self::Object(members) => {
                let mut map = serializer.serialize_map(Some(members.len()))?;
                for (key, value) in members {
                    map.serialize_entry(key, value)?;
                }
                map.end()
            }
        }
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Document;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("any JSON value")
    }

    fn visit_unit<E>(self) -> Result<Document, E> {
        Ok(Document::Null)
    }

    fn visit_bool<E>(self, flag: bool) -> Result<Document, E> {
        Ok(Document::Bool(flag))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Document, E> {
        Ok(Document::Number(number.into()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Document, E> {
        Ok(Document::Number(number.into()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Document, E> {
        Ok(serde_json::Number::from_f64(number).map_or(Document::Null, Document::Number))
    }

    fn visit_str<E>(self, text: &str) -> Result<Document, E> {
        Ok(Document::String(text.to_owned()))
    }

    fn visit_string<E>(self, text: String) -> Result<Document, E> {
        Ok(Document::String(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Document, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = elements.next_element()? {
            items.push(item);
        }
        Ok(Document::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Document, A::Error> {
        let mut members = Vec::new();
        while let Some(member) = entries.next_entry()? {
            members.push(member);
        }
        Ok(Document::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_keep_the_order_of_the_server() {
        let text = br#"{"id":"a","name":"b","env":{"Z":"1","A":"2"},"cpus":2,"ratio":0.5,"none":null}"#;
        let document = Document::parse(text).unwrap();
        assert_eq!(serde_json::to_vec(&document).unwrap(), text);
        assert_eq!(document.integer("cpus"), Some(2));
        assert_eq!(document.get("none"), None);
        assert_eq!(document.text("env.Z"), Some("1"));
    }

    #[test]
    fn values_of_the_environment_are_masked_in_lists_and_objects() {
        let mut list = Document::parse(br#"[{"name":"a","env":{"TOKEN":"secret"}}]"#).unwrap();
        list.mask_values("env");
        let text = serde_json::to_string(&list).unwrap();
        assert_eq!(text, r#"[{"name":"a","env":{"TOKEN":"********"}}]"#);
    }
}
