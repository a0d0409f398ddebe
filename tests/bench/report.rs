//! The results as Markdown tables.
//!
//! Not here: the plot (`svg`), and the numbers themselves (`record`).

use std::fmt::Write as _;

use super::record::{Place, Record, Results, Spread};

/// The column that the goals are about: the default cluster size.
const OURS: &str = "addcow-4k";

/// The whole page.
pub fn markdown(results: &Results) -> String {
    let mut page = String::new();
    let machine = &results.machine;
    let head = format!(
        "# Results of scripts/bench\n\n\
         {}, {} processors, {} MiB of memory, Linux {}; commit {}; {}.\n\
         Load average before: {}. {} rounds of {} s per run, disks of {} MiB.\n\n    {}\n\n\
         What the rows are and how they are measured: [README.md](README.md).\n",
        machine.processor,
        machine.processors,
        machine.memory_mib,
        machine.kernel,
        machine.commit.as_deref().unwrap_or("unknown"),
        machine.qemu.as_deref().unwrap_or("no qemu-storage-daemon"),
        machine.load,
        results.rounds,
        results.seconds,
        results.size_mib,
        results.command,
    );
    page.push_str(&head);
    for place in &results.places {
        let _ = writeln!(page, "\n## {} ({})", place.name, place.file_system);
        page.push_str(&ratios(results, place));
        page.push_str(&against_raw(results, place));
        page.push_str(&latencies(results, place));
        page.push_str(&goals(results, place));
    }
    page.push_str(&memory(results));
    page.push_str(&extras(results));
    page
}

/// A table; empty without rows.
pub fn table(title: &str, head: &[String], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let mut text = format!("\n### {title}\n\n| {} |\n|---|", head.join(" | "));
    text.push_str(&"---:|".repeat(head.len() - 1));
    text.push('\n');
    for row in rows {
        let _ = writeln!(text, "| {} |", row.join(" | "));
    }
    text
}

/// A number with thousands set apart.
pub fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The workloads that were run at a place.
pub fn rows<'a>(results: &'a Results, place: &'a Place) -> impl Iterator<Item = &'a str> {
    let has = |w: &&str| results.records.iter().any(|r| r.workload == *w && r.place == place.name);
    results.workloads.iter().map(String::as_str).filter(has)
}

/// Whether every run of a cell came to its end, where it has one.
fn is_complete(results: &Results, place: &str, workload: &str, target: &str) -> bool {
    results.cell(place, workload, target).all(|record| record.complete != Some(false))
}

/// The main table.
fn ratios(results: &Results, place: &Place) -> String {
    let mut lines = Vec::new();
    for workload in rows(results, place) {
        let mut line = vec![workload.to_owned()];
        for target in &results.targets {
            let cpu = results.spread(&place.name, workload, target, |r| r.server_cpu_us);
            let cpu = cpu.map_or(0.0, |cpu| cpu.median);
            let mark = if is_complete(results, &place.name, workload, target) { "" } else { "*" };
            line.push(if target == "limit" {
                let iops = results.spread(&place.name, workload, target, |r| r.iops);
                let iops = iops.map_or_else(String::new, |iops| grouped(iops.median));
                format!("{iops} IOPS ({cpu:.1}){mark}")
            } else {
                match results.to_limit(&place.name, workload, target) {
                    Some(Spread { min, median, max }) => {
                        format!("**{median:.2}** {min:.2}-{max:.2} ({cpu:.1}){mark}")
                    }
                    None => "-".into(),
                }
            });
        }
        lines.push(line);
    }
    let mut head = vec!["workload".to_owned()];
    head.extend(results.targets.iter().cloned());
    let title = "Ratio to the limit: **median** min-max (CPU of the server in us per request)";
    table(title, &head, &lines)
}

/// Add-cow disks against our daemon on a raw file.
fn against_raw(results: &Results, place: &Place) -> String {
    let ours: Vec<_> = results.targets.iter().filter(|t| t.starts_with("addcow-")).collect();
    let ours: Vec<_> = ours.into_iter().filter(|t| *t != "addcow-raw").collect();
    let mut lines = Vec::new();
    for workload in rows(results, place) {
        let cells = ours.iter().filter_map(|target| {
            let pair = (target.as_str(), "addcow-raw");
            let Spread { min, median, max } =
                results.ratio(&place.name, workload, pair, |r| r.iops)?;
            Some(format!("**{median:.2}** {min:.2}-{max:.2}"))
        });
        let mut line = vec![workload.to_owned()];
        line.extend(cells);
        if line.len() == ours.len() + 1 && !ours.is_empty() {
            lines.push(line);
        }
    }
    let mut head = vec!["workload".to_owned()];
    head.extend(ours.into_iter().cloned());
    table("Ratio to addcow-raw: **median** min-max", &head, &lines)
}

/// Percentiles.
fn latencies(results: &Results, place: &Place) -> String {
    let mut lines = Vec::new();
    for workload in rows(results, place) {
        let mut line = vec![workload.to_owned()];
        for target in &results.targets {
            let median = |figure: fn(&Record) -> f64| {
                let spread = results.spread(&place.name, workload, target, figure);
                spread.map_or_else(|| "-".into(), |spread| short(spread.median))
            };
            line.push(format!(
                "{} / {} / {}",
                median(|r| r.p50_us),
                median(|r| r.p99_us),
                median(|r| r.p999_us)
            ));
        }
        lines.push(line);
    }
    let mut head = vec!["workload".to_owned()];
    head.extend(results.targets.iter().cloned());
    table("Latency in us: 50 % / 99 % / 99.9 %, medians of the rounds", &head, &lines)
}

/// A number with two or three digits.
fn short(value: f64) -> String {
    if value < 10.0 { format!("{value:.1}") } else { grouped(value) }
}

/// The wanted ratio to the limit of a workload.
fn wanted(workload: &str, on_tmpfs: bool) -> Option<f64> {
    let pair = match workload {
        "randread-qd1" | "randwrite-qd1" => (0.55, 0.95),
        "first-touch-4k" | "first-touch-64k" | "first-touch-seq" => (0.95, 0.95),
        "first-touch-flush" => (0.90, 0.80),
        "backing-read" => (1.1, 0.97),
        "seqread-1m" | "seqwrite-1m" => (0.98, 0.98),
        name if name.starts_with("rand") && !name.ends_with("-2q") => (1.1, 0.97),
        _ => return None,
    };
    Some(if on_tmpfs { pair.0 } else { pair.1 })
}

/// What was aimed at, and what was reached by add-cow disks with 4 KiB clusters.
fn goals(results: &Results, place: &Place) -> String {
    let mut lines = Vec::new();
    let mut add = |goal: String, wanted: f64, reached: f64, at_least: bool| {
        let met = if at_least { reached >= wanted } else { reached <= wanted };
        let sign = if at_least { ">=" } else { "<=" };
        let met = if met { "yes" } else { "**no**" };
        lines.push(vec![goal, format!("{sign} {wanted:.2}"), format!("{reached:.2}"), met.into()]);
    };
    for workload in rows(results, place) {
        if let Some(wanted) = wanted(workload, place.is_tmpfs())
            && let Some(reached) = results.to_limit(&place.name, workload, OURS)
        {
            add(format!("{workload}: to the limit"), wanted, reached.median, true);
        }
        let pair = (OURS, "addcow-raw");
        if let Some(reached) = results.ratio(&place.name, workload, pair, |r| r.iops) {
            add(format!("{workload}: to addcow-raw"), 0.97, reached.median, true);
        }
        let pair = (OURS, "qsd-raw");
        if matches!(workload, "randread-qd32" | "randwrite-qd32" | "randrw-qd32")
            && let Some(reached) = results.ratio(&place.name, workload, pair, |r| r.server_cpu_us)
        {
            add(format!("{workload}: CPU to qsd-raw"), 0.3, reached.median, false);
        }
    }
    let head = ["goal", "wanted", "reached", "met"].map(str::to_owned);
    table("Goals, for addcow-4k", &head, &lines)
}

/// Memory of the servers over all runs.
fn memory(results: &Results) -> String {
    let mut lines = Vec::new();
    for target in &results.targets {
        let of = |figure: fn(&Record) -> Option<u64>| {
            let runs = results.records.iter().filter(|record| record.target == *target);
            Spread::of(runs.filter_map(figure).map(|kib| kib as f64).collect())
        };
        if let (Some(idle), Some(after)) = (of(|r| r.pss_idle_kib), of(|r| r.pss_after_kib)) {
            let cell = |spread: Spread| {
                format!("{} (at most {})", grouped(spread.median), grouped(spread.max))
            };
            lines.push(vec![target.clone(), cell(idle), cell(after)]);
        }
    }
    let head = ["target", "before a client came", "after it had gone"].map(str::to_owned);
    let text = table("PSS in KiB, median of all runs", &head, &lines);
    if text.is_empty() { text } else { format!("\n## Memory\n{text}") }
}

/// Start-up, rest, fleet.
fn extras(results: &Results) -> String {
    let mut text = String::new();
    let lines: Vec<_> = results
        .start_up
        .iter()
        .map(|start| {
            let [min, median, max] = start.ms;
            vec![
                format!("{}, {} GiB", start.target, start.size_gib),
                format!("**{median:.1}** {min:.1}-{max:.1}"),
                grouped(start.metadata_kib as f64),
                grouped(start.pss_kib as f64),
            ]
        })
        .collect();
    let head = ["sparse overlay", "ms", "main file, KiB", "PSS then, KiB"].map(str::to_owned);
    text.push_str(&table("From the start to the first completed request", &head, &lines));
    let lines: Vec<_> = results
        .rest
        .iter()
        .map(|rest| {
            vec![
                rest.target.clone(),
                format!("{:.0}", rest.alone_us),
                format!("{:.0}", rest.connected_us),
                grouped(rest.pss_kib as f64),
            ]
        })
        .collect();
    let head = ["target", "alone, us", "client connected, us", "PSS alone, KiB"];
    let title = "Processor time in 2 s without requests";
    text.push_str(&table(title, &head.map(str::to_owned), &lines));
    if let Some(fleet) = &results.fleet {
        let _ = writeln!(
            text,
            "\n{} daemons over one base, all at rest: {} MiB of PSS together, up in {:.1} s.",
            fleet.daemons,
            grouped(fleet.pss_kib as f64 / 1024.0),
            fleet.seconds
        );
    }
    if text.is_empty() { text } else { format!("\n## Starting and resting\n{text}") }
}
