//! Text in aligned columns, coloured where the reader is a terminal.

use anstyle::{AnsiColor, Style};
use std::fmt::Write;

/// Something that went as it should.
pub const GOOD: Style = AnsiColor::Green.on_default();
/// Something that did not.
pub const BAD: Style = AnsiColor::Red.on_default().bold();
/// Something that the eye may skip.
pub const DIM: Style = Style::new().dimmed();
/// A heading.
pub const HEAD: Style = Style::new().bold();
/// Nothing in particular.
pub const PLAIN: Style = Style::new();

/// On which side a column's cells are flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Text.
    Left,
    /// Numbers.
    Right,
}

/// A cell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cell {
    /// What it says.
    pub text: String,
    /// How it looks.
    pub style: Style,
}

impl Cell {
    /// A cell of this look.
    pub fn new(text: impl Into<String>, style: Style) -> Self {
        Self { text: text.into(), style }
    }
}

impl<T: Into<String>> From<T> for Cell {
    fn from(text: T) -> Self {
        Self::new(text, PLAIN)
    }
}

/// Blanks between two columns.
const GAP: usize = 2;

/// Rows in columns.
#[derive(Clone, Debug, Default)]
pub struct Table {
    columns: Vec<Align>,
    rows: Vec<Row>,
}

#[derive(Clone, Debug)]
struct Row {
    cells: Vec<Cell>,
    /// Whether it has titles for more than one column.
    has_titles: bool,
}

impl Row {
    /// Whether a cell may run over into the blank one behind it: a title, or one with nothing else behind it.
    fn runs_over(&self, column: usize) -> bool {
        let is_blank = |cell: &Cell| cell.text.is_empty();
        match self.cells.get(column + 1..) {
            Some(behind @ [next, ..]) => {
                is_blank(next) && (self.has_titles || behind.iter().all(is_blank))
            }
            _ => false,
        }
    }
}

impl Table {
    /// A table of these columns.
    #[must_use]
    pub fn new(columns: &[Align]) -> Self {
        Self { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Adds a heading; empty ones leave the column's heading blank.
    pub fn heading(&mut self, titles: &[&str]) {
        self.row(titles.iter().map(|title| Cell::new(*title, HEAD)));
    }

    /// Adds a row. Missing cells are blank.
    pub fn row(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(Row { cells: cells.into_iter().collect(), has_titles: false });
    }

    /// Adds a row of titles, which run over into the blank cells behind them.
    pub fn titles(&mut self, cells: impl IntoIterator<Item = Cell>) {
        self.rows.push(Row { cells: cells.into_iter().collect(), has_titles: true });
    }

    /// The table as text with colours; print it through `anstream`, which drops them where they do not belong.
    #[must_use]
    pub fn render(&self) -> String {
        let widths: Vec<usize> = (0..self.columns.len()).map(|column| self.width(column)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut start = 0;
            let mut end = 0;
            for ((cell, width), align) in row.cells.iter().zip(&widths).zip(&self.columns) {
                let length = cell.text.chars().count();
                if length != 0 {
                    let flush =
                        if *align == Align::Right { width.saturating_sub(length) } else { 0 };
                    let soonest = if end == 0 { 0 } else { end + GAP };
                    let blanks = soonest.max(start + flush) - end;
                    let (on, off) = (cell.style.render(), cell.style.render_reset());
                    // Writing to a string cannot fail.
                    let _ = write!(text, "{:blanks$}{on}{}{off}", "", cell.text);
                    end += blanks + length;
                }
                start += width + GAP;
            }
            text.push('\n');
        }
        text
    }

    /// A column is as wide as its widest cell, but for those that run over.
    fn width(&self, column: usize) -> usize {
        self.rows
            .iter()
            .filter(|row| !row.runs_over(column))
            .filter_map(|row| row.cells.get(column))
            .map(|cell| cell.text.chars().count())
            .max()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_no_line_ends_in_a_blank() {
        let mut table = Table::new(&[Align::Right, Align::Left, Align::Right]);
        table.heading(&["nr", "call", "bytes"]);
        table.row(["7".into(), "GetGDT".into(), "12".into()]);
        table.row(["10".into(), "GetTR".into()]);
        let plain = anstream::adapter::strip_str(&table.render()).to_string();
        assert_eq!(plain, "nr  call    bytes\n 7  GetGDT     12\n10  GetTR\n");
    }

    #[test]
    fn a_title_runs_over_the_blank_cells_behind_it() {
        let mut table = Table::new(&[Align::Left, Align::Left, Align::Left]);
        table.titles(["a long title".into(), "".into(), "next".into()]);
        table.row(["a".into(), "b".into(), "c".into()]);
        let plain = anstream::adapter::strip_str(&table.render()).to_string();
        assert_eq!(plain, "a long title  next\na  b  c\n");
    }

    #[test]
    fn a_blank_cell_leaves_the_columns_as_wide_as_they_are() {
        let mut table = Table::new(&[Align::Left, Align::Left, Align::Left]);
        table.row(["a long name".into(), "".into(), "x".into()]);
        table.row(["a".into(), "b".into(), "c".into()]);
        let plain = anstream::adapter::strip_str(&table.render()).to_string();
        assert_eq!(plain, "a long name     x\na            b  c\n");
    }

    #[test]
    fn blank_and_missing_cells_do_no_harm() {
        let mut table = Table::new(&[Align::Left, Align::Left]);
        table.row([]);
        table.row(["".into(), "x".into()]);
        assert_eq!(anstream::adapter::strip_str(&table.render()).to_string(), "\n  x\n");
        assert_eq!(Table::new(&[]).render(), "");
    }
}
