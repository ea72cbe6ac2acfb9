//! The limits of tags, as the OpenAPI document tells them.

use utoipa::openapi::schema::{ObjectBuilder, Schema, SchemaType, Type};

/// Characters of keys and values.
const PATTERN: &str = "^[A-Za-z0-9 _.:/=+@-]*$";

/// At most 50 pairs; keys of 1 to 128 characters, values of up to 256.
#[must_use]
pub fn schema() -> Schema {
    let text = |min: usize, max: usize| {
        let builder = ObjectBuilder::new()
            .schema_type(SchemaType::Type(Type::String))
            .pattern(Some(PATTERN));
        builder.min_length(Some(min)).max_length(Some(max)).build()
    };
    ObjectBuilder::new()
        .schema_type(SchemaType::Type(Type::Object))
        .property_names(Some(text(1, 128)))
        .additional_properties(Some(Schema::from(text(0, 256))))
        .max_properties(Some(50))
        .description(Some("Pairs of the user's own."))
        .build()
        .into()
}
