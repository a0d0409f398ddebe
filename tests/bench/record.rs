//! What was measured, as it goes into the JSON file, and medians of it.
//!
//! Ratios are made within a round, and only then summarised, so that a slow moment of the machine
//! meets both sides of a ratio.

use serde::{Serialize, Serializer};

use super::disks::Figures;
use super::drive::Seen;
use super::extras::{Fleet, Rest, StartUp};
use super::histogram::Histogram;
use super::machine::Machine;
use super::workload::Workload;

/// One run.
#[derive(Debug, Clone)]
pub struct Record {
    /// Name of the place, as in [`Place`].
    pub place: String,
    /// Name of the workload.
    pub workload: String,
    /// Name of the target.
    pub target: String,
    /// Number of the round, from 0.
    pub round: usize,
    /// Requests per second, flushes included.
    pub iops: f64,
    /// MiB per second.
    pub mib_per_s: f64,
    /// Median latency in microseconds.
    pub p50_us: f64,
    /// Latency in microseconds that 99 % of the requests do not exceed.
    pub p99_us: f64,
    /// The same for 99.9 %.
    pub p999_us: f64,
    /// Processor time of the server per request in microseconds; of the client for the limit.
    pub server_cpu_us: f64,
    /// Requests in the measured time.
    pub requests: u64,
    /// The measured time in seconds.
    pub seconds: f64,
    /// Processor time of the client over the whole run, warm-up and checks included, in seconds.
    pub client_cpu_s: f64,
    /// PSS of the server in KiB, before the client connected.
    pub pss_idle_kib: Option<u64>,
    /// PSS of the server in KiB, after the client had gone.
    pub pss_after_kib: Option<u64>,
    /// Whether all blocks were written, where the workload writes each one once.
    pub complete: Option<bool>,
}

impl Record {
    /// The record of a run.
    pub fn new(
        place: &Place,
        workload: &Workload,
        target: &str,
        round: usize,
        figures: &Figures,
    ) -> Self {
        let seen = &figures.seen;
        let requests: u64 = seen.iter().map(|seen| seen.requests).sum();
        let rate = if place.is_steady(workload) { Seen::median_rate } else { Seen::mean_rate };
        let iops: f64 = seen.iter().map(rate).sum();
        let transfers = match workload.flush_every {
            0 => 1.0,
            every => 1.0 - 1.0 / every as f64,
        };
        let mut latencies = Histogram::new();
        seen.iter().for_each(|seen| latencies.merge(&seen.latencies));
        let microseconds = |permille| latencies.percentile(permille) as f64 / 1e3;
        Self {
            place: place.name.clone(),
            workload: workload.name.into(),
            target: target.into(),
            round,
            iops,
            mib_per_s: iops * transfers * workload.block as f64 / f64::from(1 << 20),
            p50_us: microseconds(500),
            p99_us: microseconds(990),
            p999_us: microseconds(999),
            server_cpu_us: figures.server_ns as f64 / 1e3 / requests.max(1) as f64,
            requests,
            seconds: seen.iter().map(|seen| seen.seconds).fold(0.0, f64::max),
            client_cpu_s: figures.client_ns as f64 / 1e9,
            pss_idle_kib: figures.pss_kib.map(|(idle, _)| idle),
            pss_after_kib: figures.pss_kib.map(|(_, after)| after),
            complete: workload.is_finite().then(|| seen.iter().all(|seen| seen.complete)),
        }
    }
}

/// Where images lay.
#[derive(Debug, Clone, Serialize)]
pub struct Place {
    /// `tmpfs` or `disk`, with a number when there are several.
    pub name: String,
    /// The folder.
    pub folder: String,
    /// File system and device, from the mount table.
    pub file_system: String,
}

impl Place {
    /// Whether the files are memory.
    pub fn is_tmpfs(&self) -> bool {
        self.name.starts_with("tmpfs")
    }

    /// Whether each moment of the workload is like any other here, since no device sets the pace.
    pub fn is_steady(&self, workload: &Workload) -> bool {
        self.is_tmpfs() && workload.is_steady()
    }
}

/// Everything.
#[derive(Debug, Serialize)]
pub struct Results {
    /// The command line.
    pub command: String,
    /// The machine.
    pub machine: Machine,
    /// Rounds.
    pub rounds: usize,
    /// Seconds measured per run.
    pub seconds: f64,
    /// Size of the disks in MiB.
    pub size_mib: u64,
    /// The places.
    pub places: Vec<Place>,
    /// Names of the workloads, in order.
    pub workloads: Vec<String>,
    /// Names of the targets, in order.
    pub targets: Vec<String>,
    /// Starting times.
    pub start_up: Vec<StartUp>,
    /// Servers with nothing to do.
    pub rest: Vec<Rest>,
    /// Many daemons at once.
    pub fleet: Option<Fleet>,
    /// The runs.
    #[serde(serialize_with = "by_cell")]
    pub records: Vec<Record>,
}

/// The runs of one target and workload at one place, a value for each round.
#[derive(Debug, Default, Serialize)]
struct Cell<'a> {
    /// As in [`Record`].
    place: &'a str,
    /// As in [`Record`].
    workload: &'a str,
    /// As in [`Record`].
    target: &'a str,
    /// As in [`Record`], and so on.
    iops: Vec<f64>,
    /// MiB per second.
    mib_per_s: Vec<f64>,
    /// Median latency.
    p50_us: Vec<f64>,
    /// 99 %.
    p99_us: Vec<f64>,
    /// 99.9 %.
    p999_us: Vec<f64>,
    /// Processor time of the server per request.
    server_cpu_us: Vec<f64>,
    /// Processor time of the client per run.
    client_cpu_s: Vec<f64>,
    /// Requests.
    requests: Vec<u64>,
    /// Measured time.
    seconds: Vec<f64>,
    /// Memory before.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pss_idle_kib: Vec<u64>,
    /// Memory after.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pss_after_kib: Vec<u64>,
    /// Whether all blocks were written.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    complete: Vec<bool>,
}

/// Writes runs cell by cell, which takes a quarter of the space.
fn by_cell<S: Serializer>(records: &[Record], serializer: S) -> Result<S::Ok, S::Error> {
    let mut cells: Vec<Cell<'_>> = Vec::new();
    let round = |value: f64| (value * 100.0).round() / 100.0;
    for record in records {
        let (place, workload, target) = (&*record.place, &*record.workload, &*record.target);
        let is_it = |c: &Cell<'_>| c.place == place && c.workload == workload && c.target == target;
        let at = cells.iter().position(is_it).unwrap_or_else(|| {
            cells.push(Cell { place, workload, target, ..Cell::default() });
            cells.len() - 1
        });
        let cell = &mut cells[at];
        cell.iops.push(record.iops.round());
        cell.mib_per_s.push(round(record.mib_per_s));
        cell.p50_us.push(round(record.p50_us));
        cell.p99_us.push(round(record.p99_us));
        cell.p999_us.push(round(record.p999_us));
        cell.server_cpu_us.push(round(record.server_cpu_us));
        cell.client_cpu_s.push(round(record.client_cpu_s));
        cell.requests.push(record.requests);
        cell.seconds.push(round(record.seconds));
        cell.pss_idle_kib.extend(record.pss_idle_kib);
        cell.pss_after_kib.extend(record.pss_after_kib);
        cell.complete.extend(record.complete);
    }
    serializer.collect_seq(cells)
}

/// A median with the smallest and the largest value.
#[derive(Debug, Clone, Copy)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Median.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// The spread of `values`; `None` if there are none.
    pub fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (min, max) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = if values.len() % 2 == 1 {
            values[middle]
        } else {
            f64::midpoint(values[middle - 1], values[middle])
        };
        Some(Self { min, median, max })
    }
}

impl Results {
    /// The runs of one cell of the table.
    pub fn cell<'a>(
        &'a self,
        place: &'a str,
        workload: &'a str,
        target: &'a str,
    ) -> impl Iterator<Item = &'a Record> {
        self.records
            .iter()
            .filter(move |r| r.place == place && r.workload == workload && r.target == target)
    }

    /// The spread of one figure of the runs of a cell.
    pub fn spread(
        &self,
        place: &str,
        workload: &str,
        target: &str,
        figure: impl Fn(&Record) -> f64,
    ) -> Option<Spread> {
        Spread::of(self.cell(place, workload, target).map(figure).collect())
    }

    /// The spread over the rounds of the ratio of a figure to that of another target.
    pub fn ratio(
        &self,
        place: &str,
        workload: &str,
        (target, other): (&str, &str),
        figure: impl Fn(&Record) -> f64,
    ) -> Option<Spread> {
        let ratios = self.cell(place, workload, target).filter_map(|record| {
            let mut others = self.cell(place, workload, other);
            let other = others.find(|other| other.round == record.round)?;
            // A run that stood still all the time is no measure for another.
            Some(figure(other)).filter(|other| *other > 0.0).map(|other| figure(record) / other)
        });
        Spread::of(ratios.collect())
    }

    /// The spread of the ratio of throughput to that of the limit.
    pub fn to_limit(&self, place: &str, workload: &str, target: &str) -> Option<Spread> {
        self.ratio(place, workload, (target, "limit"), |record| record.iops)
    }
}
