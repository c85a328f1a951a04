//! Exits over time as a picture: a panel for each run, all to the same scale.

use super::{Record, microseconds};
use std::collections::BTreeSet;
use std::fmt::Write;
use vmi_hv_backend::reference::interface::Counters;

/// Pieces that time is cut into, and how wide each is drawn.
const PIECES: usize = 220;
const PIECE_WIDTH: usize = 4;

/// Measures of a panel: room at the left, the curve's height, the strip of updates below it, the room between panels.
const LEFT: usize = 70;
const HEIGHT: usize = 120;
const STRIP: usize = 10;
const GAP: usize = 46;

/// Where the first panel begins, and what the legend needs for a line.
const TOP: usize = 56;
const LEGEND: usize = 18;
const LEGEND_COLUMNS: usize = 4;

/// Colours of causes, in the order of [`Counters::EXITS`].
const COLOURS: [&str; Counters::EXITS.len()] = [
    "#e8a33d", "#5b8def", "#d1495b", "#8d99ae", "#7fb069", "#3d5a80", "#9b5de5", "#c9ada7",
    "#00a6a6", "#b5838d", "#6d6875", "#2a9d4e", "#f15bb5", "#adb5bd",
];

/// What happened in a piece of time.
#[derive(Clone, Copy, Default)]
struct Piece {
    exits: [u32; Counters::EXITS.len()],
    updates: u32,
}

impl Piece {
    fn height(&self) -> u32 {
        self.exits.iter().sum()
    }
}

/// The pieces of a run, each so many ticks long.
fn pieces(record: &Record, length: u64) -> Vec<Piece> {
    let mut pieces = vec![Piece::default(); PIECES];
    for exit in record.exits.iter().filter(|exit| exit.is_counted()) {
        let at = (exit.exited.saturating_sub(record.started) / length) as usize;
        let piece = &mut pieces[at.min(PIECES - 1)];
        piece.exits[usize::from(exit.cause)] += 1;
        piece.updates += u32::from(exit.updates);
    }
    pieces
}

/// The picture of runs, each with its name, as SVG.
#[must_use]
pub fn picture(runs: &[(String, &Record)]) -> String {
    let end = |record: &Record| {
        record.exits.last().map_or(0, |exit| exit.exited.saturating_sub(record.started))
    };
    let longest = runs.iter().map(|(_, record)| end(record)).max().unwrap_or_default();
    let length = (longest / PIECES as u64 + 1).max(1);
    let panels: Vec<Vec<Piece>> = runs.iter().map(|(_, record)| pieces(record, length)).collect();
    let all = || panels.iter().flatten();
    let highest = all().map(Piece::height).max().unwrap_or_default().max(1);
    let most_updates = all().map(|piece| piece.updates).max().unwrap_or_default().max(1);
    let causes: BTreeSet<usize> = all()
        .flat_map(|piece| piece.exits.iter().enumerate())
        .filter(|(_, count)| **count != 0)
        .map(|(cause, _)| cause)
        .collect();

    let width = LEFT + PIECES * PIECE_WIDTH + 20;
    let panel_height = HEIGHT + STRIP + GAP;
    let legend_top = TOP + panels.len() * panel_height;
    let legend_lines = (causes.len() + 1).div_ceil(LEGEND_COLUMNS);
    let height = legend_top + legend_lines * LEGEND + 10;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n"
    );
    // Writing to a string cannot fail, here and below.
    let _ = writeln!(
        svg,
        "<text x=\"{LEFT}\" y=\"18\">exits in each {:.1} ms of the machine's time</text>",
        microseconds(length) / 1000.0
    );
    for (index, ((name, record), pieces)) in runs.iter().zip(&panels).enumerate() {
        let top = TOP + index * panel_height;
        panel(&mut svg, top, pieces, (highest, most_updates));
        let bottom = top + HEIGHT;
        let name = name.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            svg,
            "<text x=\"{LEFT}\" y=\"{}\">{name}: {} exits in {:.0} ms</text>\n\
             <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{highest}</text>\n\
             <text x=\"{}\" y=\"{bottom}\" text-anchor=\"end\">0</text>\n\
             <text x=\"{}\" y=\"{}\" text-anchor=\"end\">updates</text>",
            top - 8,
            record.count,
            microseconds(end(record)) / 1000.0,
            LEFT - 6,
            top + 10,
            LEFT - 6,
            LEFT - 6,
            bottom + STRIP + 1,
        );
    }
    let names = causes.iter().map(|cause| (Counters::EXITS[*cause], COLOURS[*cause]));
    let strip = ("updates carried", UPDATES);
    for (index, (name, colour)) in names.chain([strip]).enumerate() {
        let (column, line) = (index % LEGEND_COLUMNS, index / LEGEND_COLUMNS);
        let x = LEFT + column * PIECES * PIECE_WIDTH / LEGEND_COLUMNS;
        let y = legend_top + line * LEGEND;
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>\
             <text x=\"{}\" y=\"{}\">{name}</text>",
            x + 18,
            y + 11
        );
    }
    svg.push_str("</svg>\n");
    svg
}

/// The colour of updates.
const UPDATES: &str = "#1d3557";

/// The bars of a panel, one on the other by cause, and below them how many updates there were.
fn panel(svg: &mut String, top: usize, pieces: &[Piece], (highest, most_updates): (u32, u32)) {
    let bottom = top + HEIGHT;
    let _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{top}\" width=\"{}\" height=\"{HEIGHT}\" fill=\"#f4f5f7\"/>",
        PIECES * PIECE_WIDTH
    );
    let scaled = |count: u32| f64::from(count) * HEIGHT as f64 / f64::from(highest);
    for (index, piece) in pieces.iter().enumerate() {
        let x = LEFT + index * PIECE_WIDTH;
        let mut below = 0;
        for (count, colour) in piece.exits.iter().zip(COLOURS).filter(|(count, _)| **count != 0) {
            below += count;
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{:.1}\" width=\"{PIECE_WIDTH}\" height=\"{:.1}\" fill=\"{colour}\"/>",
                bottom as f64 - scaled(below),
                scaled(*count)
            );
        }
        if piece.updates != 0 {
            let opacity = f64::from(piece.updates) / f64::from(most_updates);
            let _ = writeln!(
                svg,
                "<rect x=\"{x}\" y=\"{}\" width=\"{PIECE_WIDTH}\" height=\"{}\" fill=\"{UPDATES}\" opacity=\"{:.2}\"/>",
                bottom + 2,
                STRIP - 2,
                opacity.max(0.15)
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmi_hv_backend::reference::record::Exit;

    #[test]
    fn each_run_has_a_panel_and_bars_are_as_high_as_there_were_exits() {
        let cause = 5;
        let exit = |exited, updates| Exit { exited, cause, updates, ..Exit::default() };
        let many = Record {
            started: 0,
            count: 4,
            exits: vec![exit(1, 0), exit(2, 0), exit(3, 0), exit(99_000, 9)],
        };
        let few = Record { started: 0, count: 1, exits: vec![exit(5, 0)] };
        let svg = picture(&[("a<b".to_owned(), &many), ("c".to_owned(), &few)]);
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(svg.contains(">a&lt;b: 4 exits in 0 ms</text>") && svg.contains(">c: 1 exits"));
        let colour = format!("fill=\"{}\"", COLOURS[usize::from(cause)]);
        let heights: Vec<&str> = svg
            .lines()
            .filter(|line| line.contains(&colour) && !line.contains("<text"))
            .filter_map(|line| line.split("height=\"").nth(1)?.split('"').next())
            .collect();
        // Three in the first piece, and one each later and in the other run.
        assert_eq!(heights, ["120.0", "40.0", "40.0"]);
        assert_eq!(svg.matches("opacity=\"1.00\"").count(), 1, "{svg}");
        assert!(svg.contains(Counters::EXITS[usize::from(cause)]), "no legend: {svg}");
    }

    #[test]
    fn nothing_is_drawn_without_complaint() {
        let none = Record { started: 7, count: 0, exits: Vec::new() };
        assert!(picture(&[("a".to_owned(), &none)]).contains("a: 0 exits"));
        assert!(picture(&[]).ends_with("</svg>\n"));
    }
}
