//! Results: tables for people, `bench.json` for programs, a picture per table.

use std::fs;
use std::path::Path;

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::calm::Calm;
use crate::chart;
use crate::error::BenchError;
use crate::statistics::{Sample, milliseconds};

/// What a number has to reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Ours divided by the reference is at most this.
    RatioAtMost(f64),
    /// Ours divided by the reference is at least this.
    RatioAtLeast(f64),
    /// Ours is at most the reference plus this.
    MoreByAtMost(f64),
    /// Ours is at most this.
    AtMost(f64),
    /// Ours is at least this.
    AtLeast(f64),
    /// Shown for information.
    None,
}

/// One line of a table.
#[derive(Debug, Clone)]
pub struct Row {
    /// `bench/what`.
    pub name: String,
    /// Unit of both numbers.
    pub unit: &'static str,
    /// Our number.
    pub ours: f64,
    /// The number of the bare limit or of the peer.
    pub reference: Option<f64>,
    /// What is aimed at.
    pub goal: Goal,
}

/// The lines of one bench.
#[derive(Debug, Clone)]
pub struct Section {
    /// Name of the bench.
    pub name: &'static str,
    /// What is measured against what.
    pub title: String,
    /// Its numbers.
    pub rows: Vec<Row>,
    /// Remarks: repetitions, what the reference is, what was left out.
    pub notes: Vec<String>,
    /// Why there are no numbers.
    pub skipped: Option<String>,
}

/// A line of `bench.json`.
#[derive(Debug, Serialize)]
struct Entry<'a> {
    name: &'a str,
    unit: &'a str,
    ours: Option<f64>,
    reference: Option<f64>,
    ratio: Option<f64>,
    goal: Option<String>,
    met: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    skipped: Option<&'a str>,
}

impl Row {
    /// Ours divided by the reference.
    pub fn ratio(&self) -> Option<f64> {
        self.reference
            .filter(|reference| *reference > 0.0)
            .map(|reference| self.ours / reference)
    }

    fn goal_text(&self) -> Option<String> {
        Some(match self.goal {
            Goal::RatioAtMost(most) => format!("at most {most} times"),
            Goal::RatioAtLeast(least) => format!("at least {least} times"),
            Goal::MoreByAtMost(more) => format!("at most {more} {} more", self.unit),
            Goal::AtMost(most) => format!("at most {most} {}", self.unit),
            Goal::AtLeast(least) => format!("at least {least} {}", self.unit),
            Goal::None => return None,
        })
    }

    /// Whether the goal is reached; nothing without a goal or what it compares with.
    pub fn met(&self) -> Option<bool> {
        match self.goal {
            Goal::RatioAtMost(most) => self.ratio().map(|ratio| ratio <= most),
            Goal::RatioAtLeast(least) => self.ratio().map(|ratio| ratio >= least),
            Goal::MoreByAtMost(more) => self.reference.map(|reference| self.ours - reference <= more),
            Goal::AtMost(most) => Some(self.ours <= most),
            Goal::AtLeast(least) => Some(self.ours >= least),
            Goal::None => None,
        }
    }
}

impl Section {
    /// An empty section.
    pub fn new(name: &'static str, title: impl Into<String>) -> Self {
        Self {
            name,
            title: title.into(),
            rows: Vec::new(),
            notes: Vec::new(),
            skipped: None,
        }
    }

    /// Adds a number.
    pub fn row(&mut self, what: &str, unit: &'static str, ours: f64, reference: Option<f64>, goal: Goal) {
        let name = format!("{}/{what}", self.name);
        // A run may take long, or be ended before its table is drawn.
        let beside = reference.map(|reference| format!(", reference {}", number(reference)));
        eprintln!("  {name}: {} {unit}{}", number(ours), beside.unwrap_or_default());
        self.rows.push(Row {
            name,
            unit,
            ours,
            reference,
            goal,
        });
    }

    /// Adds the medians of runs taken in turns with their reference, in milliseconds. They are judged unless something
    /// else decided them.
    pub fn judged(&mut self, what: &str, ours: &Sample, reference: &Sample, goal: Goal, calm: &Calm) {
        let disturbance = calm.disturbance(ours, reference);
        let goal = if disturbance.is_some() { Goal::None } else { goal };
        let [ours, reference] = [ours, reference].map(|runs| milliseconds(runs.median()));
        self.row(what, "ms", ours, Some(reference), goal);
        if let Some(reason) = disturbance {
            self.note(format!("{what}: not judged: {reason}"));
        }
    }

    /// Adds a remark.
    pub fn note(&mut self, text: impl Into<String>) {
        self.notes.push(text.into());
    }

    /// The section as text for a terminal.
    pub fn to_text(&self) -> String {
        let mut text = format!("\n{}: {}\n", self.name, self.title);
        if let Some(reason) = &self.skipped {
            text += &format!("  skipped: {reason}\n");
        }
        if !self.rows.is_empty() {
            let mut table = Table::new();
            table.load_preset(presets::UTF8_FULL_CONDENSED);
            table.set_header(["", "unit", "ours", "reference", "ratio", "goal", "met"]);
            for row in &self.rows {
                table.add_row([
                    row.name.clone(),
                    row.unit.to_owned(),
                    number(row.ours),
                    row.reference.map(number).unwrap_or_default(),
                    row.ratio().map(|ratio| format!("{ratio:.2}")).unwrap_or_default(),
                    row.goal_text().unwrap_or_default(),
                    row.met()
                        .map(|met| if met { "yes" } else { "NO" }.to_owned())
                        .unwrap_or_default(),
                ]);
            }
            for column in 2..5 {
                if let Some(column) = table.column_mut(column) {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
            text += &format!("{table}\n");
        }
        for note in &self.notes {
            text += &format!("  {note}\n");
        }
        text
    }
}

/// A number with as many decimals as make sense.
pub fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 1000.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

/// Writes `bench.json` and one picture per section below `out`.
///
/// # Errors
/// The files cannot be written.
pub fn write(out: &Path, sections: &[Section]) -> Result<(), BenchError> {
    let pictures = out.join("bench");
    fs::create_dir_all(&pictures).map_err(|error| BenchError::io("create the folder of pictures", error))?;
    let mut entries = Vec::new();
    for section in sections {
        entries.extend(section.rows.iter().map(|row| Entry {
            name: &row.name,
            unit: row.unit,
            ours: Some(row.ours),
            reference: row.reference,
            ratio: row.ratio(),
            goal: row.goal_text(),
            met: row.met(),
            skipped: None,
        }));
        if let Some(reason) = &section.skipped {
            entries.push(Entry {
                name: section.name,
                unit: "",
                ours: None,
                reference: None,
                ratio: None,
                goal: None,
                met: None,
                skipped: Some(reason),
            });
        }
        if !section.rows.is_empty() {
            let path = pictures.join(format!("{}.svg", section.name));
            fs::write(path, chart::draw(section))
                .map_err(|error| BenchError::io("write a picture", error))?;
        }
    }
    let text = serde_json::to_string_pretty(&entries)?;
    fs::write(out.join("bench.json"), text + "\n").map_err(|error| BenchError::io("write bench.json", error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(ours: f64, reference: Option<f64>, goal: Goal) -> Row {
        Row {
            name: "x/y".into(),
            unit: "ms",
            ours,
            reference,
            goal,
        }
    }

    #[test]
    fn a_goal_is_judged_by_what_it_compares() {
        assert_eq!(row(13.0, Some(10.0), Goal::RatioAtMost(1.35)).met(), Some(true));
        assert_eq!(row(14.0, Some(10.0), Goal::RatioAtMost(1.35)).met(), Some(false));
        assert_eq!(row(14.0, None, Goal::RatioAtMost(1.35)).met(), None);
        assert_eq!(row(9.0, Some(10.0), Goal::RatioAtLeast(0.9)).met(), Some(true));
        assert_eq!(row(8.0, Some(10.0), Goal::RatioAtLeast(0.9)).met(), Some(false));
        assert_eq!(row(14.0, Some(10.0), Goal::MoreByAtMost(3.0)).met(), Some(false));
        assert_eq!(row(14.0, None, Goal::AtMost(15.0)).met(), Some(true));
        assert_eq!(row(14.0, Some(1.0), Goal::None).met(), None);
    }

    #[test]
    fn the_files_say_what_the_tables_say() {
        let out = tempfile::tempdir().unwrap();
        let mut section = Section::new("boot", "create <to> running");
        section.row("q35", "ms", 900.0, Some(700.0), Goal::RatioAtMost(1.35));
        let mut other = Section::new("convert", "image");
        other.skipped = Some("umoci is missing".into());
        write(out.path(), &[section, other]).unwrap();
        let json: serde_json::Value =
            serde_json::from_str(&fs::read_to_string(out.path().join("bench.json")).unwrap()).unwrap();
        assert_eq!(json[0]["met"], true);
        assert_eq!(json[0]["name"], "boot/q35");
        assert_eq!(json[1]["skipped"], "umoci is missing");
        let svg = fs::read_to_string(out.path().join("bench/boot.svg")).unwrap();
        assert!(svg.contains("create &lt;to&gt; running"), "{svg}");
        assert!(!out.path().join("bench/convert.svg").exists());
    }
}
