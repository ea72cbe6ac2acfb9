//! JSON as the schema means it.
//!
//! Derived deserialisers also take an array where an object belongs, field by field in order. No document says
//! so, hence this deserialiser takes objects only. It also knows where in the body an error is, in the words of
//! the client: `network.egress.enabled: invalid type: …`.

use std::fmt;

use serde::de::value::StringDeserializer;
use serde::de::{
    self, DeserializeOwned, DeserializeSeed, Deserializer, Error as _, IntoDeserializer, MapAccess,
    SeqAccess, Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;
use serde_json::Value;

/// What is wrong, and where.
#[derive(Debug)]
pub struct Error {
    /// Innermost part first.
    path: Vec<String>,
    message: String,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, part) in self.path.iter().rev().enumerate() {
            if index > 0 && !part.starts_with('[') {
                f.write_str(".")?;
            }
            f.write_str(part)?;
        }
        if !self.path.is_empty() {
            f.write_str(": ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

impl de::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self {
            path: Vec::new(),
            message: message.to_string(),
        }
    }
}

impl Error {
    fn below(mut self, part: String) -> Self {
        self.path.push(part);
        self
    }
}

/// Reads a value from JSON.
///
/// # Errors
/// When it is not JSON, or does not match the type.
pub fn from_slice<T: DeserializeOwned>(json: &[u8]) -> Result<T, Error> {
    let value: Value = serde_json::from_slice(json).map_err(Error::custom)?;
    T::deserialize(Strict(value))
}

struct Strict(Value);

impl Strict {
    fn unexpected(&self) -> Unexpected<'_> {
        match &self.0 {
            Value::Null => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Number(_) => Unexpected::Other("number"),
            Value::String(text) => Unexpected::Str(text),
            Value::Array(_) => Unexpected::Seq,
            Value::Object(_) => Unexpected::Map,
        }
    }
}

impl<'de> Deserializer<'de> for Strict {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(value),
            Value::Number(number) => {
                if let Some(value) = number.as_u64() {
                    visitor.visit_u64(value)
                } else if let Some(value) = number.as_i64() {
                    visitor.visit_i64(value)
                } else {
                    visitor.visit_f64(
                        number
                            .as_f64()
                            .ok_or_else(|| Error::custom("number out of range"))?,
                    )
                }
            }
            Value::String(text) => visitor.visit_string(text),
            Value::Array(items) => visitor.visit_seq(Items(items.into_iter().enumerate())),
            Value::Object(fields) => visitor.visit_map(Fields {
                rest: fields.into_iter(),
                current: None,
            }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_null() {
            visitor.visit_none()
        } else {
            visitor.visit_some(self)
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        if self.0.is_object() {
            self.deserialize_any(visitor)
        } else {
            Err(Error::invalid_type(self.unexpected(), &"an object"))
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0 {
            Value::String(text) => {
                let text: StringDeserializer<Error> = text.into_deserializer();
                visitor.visit_enum(text)
            }
            _ => Err(Error::invalid_type(self.unexpected(), &"a string")),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map identifier ignored_any
    }
}

struct Items(std::iter::Enumerate<std::vec::IntoIter<Value>>);

impl<'de> SeqAccess<'de> for Items {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        let Some((index, item)) = self.0.next() else {
            return Ok(None);
        };
        seed.deserialize(Strict(item))
            .map(Some)
            .map_err(|error| error.below(format!("[{index}]")))
    }
}

struct Fields {
    rest: serde_json::map::IntoIter,
    current: Option<(String, Value)>,
}

impl<'de> MapAccess<'de> for Fields {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((name, value)) = self.rest.next() else {
            return Ok(None);
        };
        let key: StringDeserializer<Error> = name.clone().into_deserializer();
        self.current = Some((name, value));
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let (name, value) = self
            .current
            .take()
            .ok_or_else(|| Error::custom("a value without a name"))?;
        let shown: String = name.chars().take(64).collect();
        seed.deserialize(Strict(value))
            .map_err(|error| error.below(shown))
    }
}

#[cfg(test)]
mod tests {
    use hypeman_api::exec::ExecRequest;
    use hypeman_api::instance::{CreateInstanceRequest, InstanceState};

    use super::*;

    fn error<T: DeserializeOwned + fmt::Debug>(json: &str) -> String {
        from_slice::<T>(json.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn objects_are_objects() {
        assert!(error::<ExecRequest>("[]").contains("expected an object"));
        assert!(error::<CreateInstanceRequest>(r#"["web","alpine"]"#).contains("expected an object"));
        let nested = error::<CreateInstanceRequest>(r#"{"name":"web","image":"a","network":[true]}"#);
        assert_eq!(nested, "network: invalid type: sequence, expected an object");
    }

    #[test]
    fn errors_say_where() {
        let of = error::<CreateInstanceRequest>;
        assert!(of(r#"{"name":"web"}"#).contains("missing field `image`"));
        assert!(
            of(r#"{"name":"w","image":"a","vcpus":"two"}"#)
                .starts_with("vcpus: invalid type: string \"two\"")
        );
        assert!(of(r#"{"name":"w","image":"a","vcpus":99999999999}"#).starts_with("vcpus: invalid value"));
        assert!(of(r#"{"name":"w","image":"a","cmd":["x",1]}"#).starts_with("cmd[1]: invalid type"));
        assert!(
            of(r#"{"name":"w","image":"a","network":{"egress":{"enabled":1}}}"#)
                .starts_with("network.egress.enabled: ")
        );
        assert!(
            of(r#"{"name":"w","image":"a","hypervisor":"xen"}"#)
                .contains("hypervisor: unknown variant `xen`")
        );
        assert!(of("{").contains("EOF"));
    }

    #[test]
    fn what_is_right_is_read() {
        let request: CreateInstanceRequest =
            from_slice(br#"{"name":"w","image":"a","env":{"A":"b"},"vcpus":null,"hypervisor":"qemu","unknown":[{"x":1.5}]}"#).unwrap();
        assert_eq!(request.env["A"], "b");
        assert_eq!(request.vcpus, None);
        assert_eq!(
            from_slice::<InstanceState>(b"\"Running\"").unwrap(),
            InstanceState::Running
        );
        assert!(from_slice::<InstanceState>(br#"{"Running":null}"#).is_err());
    }
}
