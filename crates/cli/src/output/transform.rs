//! What `--transform` takes out of a result.
//!
//! ```text
//!  network.ip       a member of a member        \.   a dot that belongs to a name
//!  0.id             an element, from zero       #    of a list: how many, or at its place before more: of each one
//!  #.name
//! ```
//!
//! This much of GJSON, by its rules. What GJSON knows besides (queries, wildcards, modifiers, multipaths, pipes) is
//! refused and never taken for a name.

use crate::document::Document;

/// A path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transform(Vec<String>);

impl Transform {
    /// Reads a path.
    ///
    /// # Errors
    /// When it is empty or uses what is not known here.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut parts = vec![String::new()];
        let mut characters = text.chars();
        while let Some(character) = characters.next() {
            let letter = match character {
                '.' => {
                    parts.push(String::new());
                    continue;
                }
                '\\' => characters
                    .next()
                    .ok_or("the path ends in the middle of an escape")?,
                '*' | '?' | '|' | '@' | '!' | '(' | ')' | '[' | ']' | '{' | '}' | '"' => {
                    return Err(format!(
                        "{character:?} has a meaning in GJSON that is not known here: names, numbers and # joined by \
                         dots are, and jq does the rest"
                    ));
                }
                other => other,
            };
            if let Some(part) = parts.last_mut() {
                part.push(letter);
            }
        }
        match parts.iter().any(String::is_empty) {
            true => {
                Err("a path is names, numbers and # joined by dots, such as network.ip or #.name".to_owned())
            }
            false => Ok(Self(parts)),
        }
    }

    /// What the path leads to; the whole when it leads nowhere, as the original does.
    pub fn apply(&self, document: &Document) -> Document {
        walk(document, &self.0).unwrap_or_else(|| document.clone())
    }
}

fn walk(document: &Document, path: &[String]) -> Option<Document> {
    let Some((part, rest)) = path.split_first() else {
        return Some(document.clone());
    };
    match document {
        Document::Array(items) if part == "#" && rest.is_empty() => {
            Some(Document::Number(u64::try_from(items.len()).ok()?.into()))
        }
        Document::Array(items) if part == "#" => Some(Document::Array(
            items.iter().filter_map(|item| walk(item, rest)).collect(),
        )),
        Document::Array(items) => walk(items.get(part.parse::<usize>().ok()?)?, rest),
        Document::Object(members) => {
            let (_, value) = members.iter().find(|(key, _)| key == part)?;
            walk(value, rest)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(path: &str) -> String {
        let list =
            br#"[{"name":"a","network":{"ip":"10.0.0.2"},"tags":{"x.y":"z"}},{"name":"b","env":null}]"#;
        let document = Document::parse(list).unwrap();
        serde_json::to_string(&Transform::parse(path).unwrap().apply(&document)).unwrap()
    }

    #[test]
    fn names_numbers_and_hashes_lead_into_a_result() {
        assert_eq!(taken("0.network.ip"), r#""10.0.0.2""#);
        assert_eq!(taken("#"), "2");
        assert_eq!(taken("#.name"), r#"["a","b"]"#);
        assert_eq!(taken("#.network.ip"), r#"["10.0.0.2"]"#);
        assert_eq!(taken(r"0.tags.x\.y"), r#""z""#);
        assert_eq!(taken("1.env"), "null");
    }

    #[test]
    fn a_path_that_leads_nowhere_leaves_the_whole() {
        assert_eq!(taken("7.name"), taken("absent"));
        assert!(taken("absent").starts_with("[{\"name\":\"a\""));
    }

    #[test]
    fn what_is_not_known_is_refused_and_not_taken_for_a_name() {
        for path in [
            "",
            "a..b",
            "a.",
            "a*",
            "#(name==\"a\")",
            "@reverse",
            "a|b",
            "{a,b}",
            "a\\",
        ] {
            assert!(Transform::parse(path).is_err(), "{path}");
        }
    }
}
