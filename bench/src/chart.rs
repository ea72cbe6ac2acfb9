//! A section as a picture: two bars a line, ours and the reference, each line on a scale of its own because units
//! differ.

use std::fmt::Write as _;

use crate::report::{Row, Section, number};

const WIDTH: f64 = 760.0;
const BARS_FROM: f64 = 250.0;
const BARS_TO: f64 = 640.0;
const LINE: f64 = 46.0;
const HEAD: f64 = 60.0;
const OURS: &str = "#2563eb";
const REFERENCE: &str = "#9ca3af";

/// Draws the section as SVG.
pub fn draw(section: &Section) -> String {
    let height = HEAD + LINE * section.rows.len() as f64 + 16.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"16\" y=\"24\" font-size=\"15\" font-weight=\"bold\">{}</text>\n\
         <rect x=\"16\" y=\"36\" width=\"10\" height=\"10\" fill=\"{OURS}\"/><text x=\"32\" y=\"45\">hypeman</text>\n\
         <rect x=\"110\" y=\"36\" width=\"10\" height=\"10\" fill=\"{REFERENCE}\"/>\
         <text x=\"126\" y=\"45\">reference</text>\n",
        escape(&section.title)
    );
    for (index, row) in section.rows.iter().enumerate() {
        draw_row(&mut svg, row, HEAD + LINE * index as f64);
    }
    svg + "</svg>\n"
}

fn draw_row(svg: &mut String, row: &Row, top: f64) {
    let longest = row.ours.max(row.reference.unwrap_or(0.0)).max(f64::MIN_POSITIVE);
    let verdict = match row.met() {
        Some(true) => " ✓",
        Some(false) => " ✗",
        None => "",
    };
    let label = format!("{}{verdict}", row.name);
    let _ = writeln!(
        svg,
        "<text x=\"16\" y=\"{:.1}\">{}</text>",
        top + 22.0,
        escape(&label)
    );
    let bars = [
        Some((row.ours, OURS)),
        row.reference.map(|reference| (reference, REFERENCE)),
    ];
    for (place, (value, colour)) in bars.into_iter().flatten().enumerate() {
        let y = top + 6.0 + 16.0 * place as f64;
        let length = (value / longest).clamp(0.0, 1.0) * (BARS_TO - BARS_FROM);
        let _ = writeln!(
            svg,
            "<rect x=\"{BARS_FROM}\" y=\"{y:.1}\" width=\"{length:.1}\" height=\"13\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" font-size=\"11\">{} {}</text>",
            BARS_FROM + length + 6.0,
            y + 10.5,
            number(value),
            escape(row.unit),
        );
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}
