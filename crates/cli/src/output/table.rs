//! Tables for people: upper-case heads, two spaces between columns, no lines.

use comfy_table::{ContentArrangement, Table as Grid, presets};

use super::clean;

/// A table that is built row by row.
#[derive(Debug)]
pub struct Table {
    grid: Grid,
    columns: usize,
}

impl Table {
    /// A table with these column heads.
    pub fn new(heads: &[&str]) -> Self {
        let mut table = Self::bare(heads.len());
        table.grid.set_header(heads);
        table.pad();
        table
    }

    /// A table without heads, for lists of names and values.
    pub fn bare(columns: usize) -> Self {
        let mut grid = Grid::new();
        grid.load_preset(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Disabled);
        Self { grid, columns }
    }

    /// Adds a row; absent cells are shown as `-`.
    pub fn row<I: IntoIterator<Item = Option<String>>>(&mut self, cells: I) {
        let cells: Vec<String> = cells
            .into_iter()
            .map(|cell| match cell {
                Some(text) if !text.is_empty() => clean(&text).replace(['\n', '\t'], " "),
                _ => "-".to_owned(),
            })
            .collect();
        debug_assert_eq!(cells.len(), self.columns);
        self.grid.add_row(cells);
        self.pad();
    }

    fn pad(&mut self) {
        for column in self.grid.column_iter_mut() {
            column.set_padding((0, 2));
        }
    }

    /// The finished text, without blanks at the line ends.
    pub fn render(&self) -> String {
        self.grid
            .lines()
            .map(|line| format!("{}\n", line.trim_end()))
            .collect()
    }
}

/// A number of bytes as people read it, in powers of 1024: `0 B`, `1.5 GiB`.
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_have_no_trailing_blanks() {
        let mut table = Table::new(&["ID", "NAME"]);
        table.row([Some("a".to_owned()), Some("long name".to_owned())]);
        table.row([Some("bcd".to_owned()), None]);
        assert_eq!(table.render(), "ID   NAME\na    long name\nbcd  -\n");
    }

    #[test]
    fn a_cell_cannot_break_its_row() {
        let mut table = Table::bare(1);
        table.row([Some("one\ntwo\u{1b}[2J".to_owned())]);
        assert_eq!(table.render(), "one two\u{fffd}[2J\n");
    }

    #[test]
    fn byte_counts_use_the_unit_that_fits() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (1 << 30, "1.0 GiB"),
        ];
        for (count, expected) in cases {
            assert_eq!(bytes(count), expected);
        }
    }
}
