//! How a filtered list is read: one condition leads through an index, the others are checked for each row.

use rusqlite::types::Value;
use rusqlite::{Connection, params_from_iter};

use super::Filter;
use crate::StoreError;

/// Lists longer than this are not told apart: any of them may lead.
const COUNTED: u32 = 512;

/// One part of a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition<'a> {
    Source(&'a str),
    Name(&'a str),
    Kind(&'a str),
    Tag(&'a str, &'a str),
}

impl<'a> Condition<'a> {
    /// The rows that satisfy it, sorted by position through one index. `INDEXED BY` refuses to be anything else.
    fn source(self) -> &'static str {
        match self {
            Self::Source(_) => "snapshots AS s INDEXED BY snapshots_source",
            Self::Name(_) => "snapshots AS s INDEXED BY snapshots_name",
            Self::Kind(_) => "snapshots AS s INDEXED BY snapshots_kind",
            // A cross join is read from left to right.
            Self::Tag(..) => "snapshot_tags AS t CROSS JOIN snapshots AS s ON s.position = t.position",
        }
    }

    /// The condition when it leads.
    fn leading(self) -> &'static str {
        match self {
            Self::Tag(..) => "t.key = ? AND t.value = ?",
            other => other.checking(),
        }
    }

    /// The condition when another one leads.
    fn checking(self) -> &'static str {
        match self {
            Self::Source(_) => "s.source_instance_id = ?",
            Self::Name(_) => "s.name = ?",
            Self::Kind(_) => "s.kind = ?",
            Self::Tag(..) => {
                "EXISTS (SELECT 1 FROM snapshot_tags AS x WHERE x.key = ? AND x.value = ? AND x.position = s.position)"
            }
        }
    }

    /// How many rows satisfy it, up to a bound; reads the index alone.
    fn count(self) -> &'static str {
        match self {
            Self::Source(_) => {
                "SELECT 1 FROM snapshots INDEXED BY snapshots_source WHERE source_instance_id = ?"
            }
            Self::Name(_) => "SELECT 1 FROM snapshots INDEXED BY snapshots_name WHERE name = ?",
            Self::Kind(_) => "SELECT 1 FROM snapshots INDEXED BY snapshots_kind WHERE kind = ?",
            Self::Tag(..) => "SELECT 1 FROM snapshot_tags WHERE key = ? AND value = ?",
        }
    }

    /// Column by which the leading list is sorted.
    fn position(self) -> &'static str {
        match self {
            Self::Tag(..) => "t.position",
            _ => "s.position",
        }
    }

    fn values(self) -> impl Iterator<Item = Value> {
        let (first, second) = match self {
            Self::Source(text) | Self::Name(text) | Self::Kind(text) => (text, None),
            Self::Tag(key, value) => (key, Some(value)),
        };
        std::iter::once(first)
            .chain(second)
            .map(|text| Value::Text(text.to_owned()))
    }
}

/// The parts of a filter.
pub(super) fn conditions(filter: &Filter) -> Vec<Condition<'_>> {
    let columns = [
        filter.name.as_deref().map(Condition::Name),
        filter.source_instance_id.as_deref().map(Condition::Source),
        filter.kind.as_deref().map(Condition::Kind),
    ];
    let tags = filter.tags.iter().map(|(key, value)| Condition::Tag(key, value));
    columns.into_iter().flatten().chain(tags).collect()
}

/// Which condition has the fewest rows.
pub(super) fn shortest(
    connection: &Connection,
    conditions: &[Condition<'_>],
) -> Result<Option<usize>, StoreError> {
    if conditions.len() < 2 {
        return Ok((!conditions.is_empty()).then_some(0));
    }
    let mut best = None;
    for (number, condition) in conditions.iter().enumerate() {
        let text = format!("SELECT count(*) FROM ({} LIMIT {COUNTED})", condition.count());
        let rows: u32 = connection
            .prepare_cached(&text)?
            .query_row(params_from_iter(condition.values()), |row| row.get(0))?;
        if best.is_none_or(|(fewest, _)| rows < fewest) {
            best = Some((rows, number));
        }
    }
    Ok(best.map(|(_, number)| number))
}

/// The statement of a list, led by the condition number `first`, and its values.
pub(super) fn select(
    conditions: &[Condition<'_>],
    first: Option<usize>,
    after: Option<i64>,
    limit: Option<u32>,
) -> (String, Vec<Value>) {
    let leader = first.and_then(|number| conditions.get(number));
    let (source, position) = leader.map_or(("snapshots AS s", "s.position"), |leader| {
        (leader.source(), leader.position())
    });
    let mut text = format!("SELECT s.position, s.document FROM {source} WHERE {position} < ?");
    let mut values = vec![Value::Integer(after.unwrap_or(i64::MAX))];
    if let Some(leader) = leader {
        text += " AND ";
        text += leader.leading();
        values.extend(leader.values());
    }
    for (number, condition) in conditions.iter().enumerate() {
        if Some(number) != first {
            text += " AND ";
            text += condition.checking();
            values.extend(condition.values());
        }
    }
    text += &format!(" ORDER BY {position} DESC LIMIT ?");
    // Negative: no limit.
    values.push(Value::Integer(limit.map_or(-1, i64::from)));
    (text, values)
}
