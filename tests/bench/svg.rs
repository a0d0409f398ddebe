//! The ratios as a bar chart.
//!
//! One group per workload, one bar per target, a line at the limit. Bars that would leave the
//! chart are cut and say their value like all others.

use std::fmt::Write as _;

use super::record::{Place, Results, Spread};
use super::report::{grouped, rows};

/// Height of a bar, in pixels like everything here.
const BAR: f64 = 11.0;

/// Space between groups.
const GAP: f64 = 14.0;

/// Left edge of the bars.
const LEFT: f64 = 190.0;

/// Width of one unit of the ratio.
const UNIT: f64 = 300.0;

/// The largest ratio that is drawn to scale.
const MAX_RATIO: f64 = 2.2;

/// Space above the first group.
const TOP: f64 = 92.0;

/// Colours of the targets after the limit, in order: ours green, the others not.
const COLOURS: [&str; 8] =
    ["#a8d08d", "#1b7f3b", "#5aae61", "#bdbdbd", "#2c6fbb", "#7fb0dd", "#8e6bb5", "#d98b4a"];

/// The chart of one place.
pub fn chart(results: &Results, place: &Place) -> String {
    let targets: Vec<&str> =
        results.targets.iter().map(String::as_str).filter(|t| *t != "limit").collect();
    let workloads: Vec<&str> = rows(results, place).collect();
    let group = BAR * targets.len() as f64 + GAP;
    let height = group.mul_add(workloads.len() as f64, TOP + 30.0);
    let width = UNIT.mul_add(MAX_RATIO, LEFT + 60.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" \
         width=\"{width:.0}\" height=\"{height:.0}\" font-family=\"sans-serif\" \
         font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let title = format!(
        "IOPS relative to io_uring on the raw file, {}: medians, whiskers from min to max",
        escaped(&format!("{} ({})", place.name, place.file_system))
    );
    text(&mut svg, (12.0, 22.0), "start", "font-size=\"15\" font-weight=\"bold\"", &title);
    let about = format!(
        "{}, {} processors, Linux {}",
        results.machine.processor, results.machine.processors, results.machine.kernel
    );
    text(&mut svg, (12.0, 40.0), "start", "fill=\"#555\"", &escaped(&about));
    legend(&mut svg, &targets);
    grid(&mut svg, height - 24.0);
    for (at, workload) in workloads.iter().enumerate() {
        let y = group.mul_add(at as f64, TOP);
        let limit = results.spread(&place.name, workload, "limit", |record| record.iops);
        let limit = limit.map_or_else(String::new, |limit| grouped(limit.median));
        let middle = y + (group - GAP) / 2.0;
        let name = "font-size=\"12\" font-weight=\"bold\"";
        text(&mut svg, (LEFT - 8.0, middle), "end", name, workload);
        let limit = format!("limit {limit} IOPS");
        text(&mut svg, (LEFT - 8.0, middle + 14.0), "end", "fill=\"#777\"", &limit);
        for (number, target) in targets.iter().enumerate() {
            if let Some(ratio) = results.to_limit(&place.name, workload, target) {
                let colour = COLOURS[number % COLOURS.len()];
                bar(&mut svg, BAR.mul_add(number as f64, y), ratio, colour);
            }
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// Text at a point.
fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, style: &str, words: &str) {
    let place = format!("x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\"");
    let _ = writeln!(svg, "<text {place} {style}>{words}</text>");
}

/// `words` without the characters that mean something in XML.
fn escaped(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// The colours and their targets.
fn legend(svg: &mut String, targets: &[&str]) {
    let mut x = 12.0;
    for (number, target) in targets.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.1}\" y=\"52\" width=\"11\" height=\"11\" fill=\"{colour}\"/>"
        );
        text(svg, (x + 15.0, 62.0), "start", "", target);
        x += (target.len() as f64).mul_add(6.3, 32.0);
    }
}

/// Vertical lines at ratios, a strong one at the limit.
fn grid(svg: &mut String, bottom: f64) {
    for step in 0..=8 {
        let ratio = f64::from(step) * 0.25;
        let x = UNIT.mul_add(ratio, LEFT);
        let style = if step == 4 {
            "stroke=\"#c00\" stroke-width=\"1.5\""
        } else {
            "stroke=\"#ddd\" stroke-width=\"1\""
        };
        let top = TOP - 6.0;
        let _ = writeln!(
            svg,
            "<line x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\" {style}/>"
        );
        let words = if step == 4 { "limit".to_owned() } else { format!("{ratio:.2}") };
        text(svg, (x, bottom + 14.0), "middle", "fill=\"#777\"", &words);
        text(svg, (x, TOP - 9.0), "middle", "fill=\"#777\"", &words);
    }
}

/// One bar with its whisker and its value.
fn bar(svg: &mut String, y: f64, ratio: Spread, colour: &str) {
    let x = |ratio: f64| UNIT.mul_add(ratio.min(MAX_RATIO), LEFT);
    let width = x(ratio.median) - LEFT;
    let thick = BAR - 1.5;
    let _ = writeln!(
        svg,
        "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{thick}\" \
         fill=\"{colour}\"/>"
    );
    let (from, to, middle) = (x(ratio.min), x(ratio.max), y + thick / 2.0);
    let _ = writeln!(
        svg,
        "<line x1=\"{from:.1}\" y1=\"{middle:.1}\" x2=\"{to:.1}\" y2=\"{middle:.1}\" \
         stroke=\"#333\" stroke-width=\"1\"/>"
    );
    let words = format!("{:.2}", ratio.median);
    text(svg, (to.max(x(ratio.median)) + 4.0, y + BAR - 2.5), "start", "font-size=\"9\"", &words);
}
