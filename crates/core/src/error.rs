//! The one error of all grammars.

/// A value that its grammar or limit refuses.
///
/// Displays as the message alone; the field is a separate part so that callers can name it in their own way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct InvalidValue {
    /// Name of the offending field or parameter; empty when the caller knows it better.
    pub field: String,
    /// Stable error code of the API, such as `invalid_size`.
    pub code: &'static str,
    /// What is wrong and what would be right, for people.
    pub message: String,
}

impl InvalidValue {
    /// An error without a field.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            field: String::new(),
            code,
            message: message.into(),
        }
    }

    /// The same error, attributed to `field`.
    #[must_use]
    pub fn in_field(mut self, field: impl Into<String>) -> Self {
        self.field = field.into();
        self
    }

    /// The same error under another code: `hotplug_size` and `size` share a grammar but not a code.
    #[must_use]
    pub fn with_code(mut self, code: &'static str) -> Self {
        self.code = code;
        self
    }
}
