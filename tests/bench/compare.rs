//! Measures our daemon, qemu-storage-daemon and the limit side by side: `scripts/bench`.
//!
//! Method, fairness and how to read the results: `docs/benchmarks/README.md`. For each workload,
//! in each round, every target has one run, each round beginning with another target. Results
//! are ratios to the limit within a round.
//!
//! Not a test: nothing here fails because something is slow. It does fail when data is wrong.

mod content;
mod disks;
mod drive;
mod extras;
mod histogram;
mod lane;
mod machine;
mod memory;
mod record;
mod report;
mod server;
mod svg;
mod targets;
mod workload;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use regex_lite::Regex;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use disks::{Disks, Figures, Pinning};
use drive::{Seen, Times};
use machine::Machine;
use record::{Place, Record, Results};
use targets::{Programs, Target};
use workload::Workload;

/// The targets of a quick run, besides the limit.
const QUICK_TARGETS: [&str; 2] = ["addcow-raw", "addcow-4k"];

/// The workloads of a quick run.
const QUICK_WORKLOADS: [&str; 6] = [
    "randread-qd1",
    "randread-qd32",
    "randwrite-qd32",
    "randrw-qd128",
    "backing-read",
    "first-touch-4k",
];

/// The most processor time that the hypervisor may take during a run, as a share of its duration:
/// that of one processor of two, so 1 % of what there is.
const MAX_STOLEN: f64 = 0.02;

/// How often a run is made at most.
const MAX_TRIES: u32 = 3;

/// Compares disks and servers.
#[derive(Debug, Parser)]
#[command(name = "scripts/bench", about)]
struct Arguments {
    /// quick: few targets and workloads, tmpfs only, 3 rounds of 1 s, no files written
    #[arg(value_parser = ["full", "quick"], default_value = "full")]
    mode: String,
    /// Workloads whose name matches
    #[arg(long, value_name = "REGEX")]
    only: Option<Regex>,
    /// Targets whose name matches; the limit is always measured
    #[arg(long, value_name = "REGEX")]
    targets: Option<Regex>,
    /// Rounds [default: 5; quick: 3]
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Seconds that a run is measured [default: 0.35; quick: 1]
    #[arg(long, value_name = "S")]
    seconds: Option<f64>,
    /// Folder for the images; more than one may be given [default: /dev/shm and target/bench]
    #[arg(long, value_name = "FOLDER")]
    dir: Vec<PathBuf>,
    /// Size of the disks in MiB, at least 128
    #[arg(long, value_name = "MIB", default_value_t = 1024,
          value_parser = clap::value_parser!(u64).range(128..=1 << 20))]
    size: u64,
    /// Give the client and the servers different processors
    #[arg(long)]
    pin: bool,
    /// Leave out start-up times, servers at rest and the 200 daemons
    #[arg(long)]
    no_extras: bool,
    /// Folder for latest.json, latest.md and the plots [default: docs/benchmarks for a full run
    /// with all workloads and targets, else no files]
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Print every run
    #[arg(long, short)]
    verbose: bool,
    /// Another addcowd to measure
    #[arg(long, value_name = "PROGRAM")]
    addcowd: Option<PathBuf>,
    /// One more argument for addcowd; may be repeated
    #[arg(long, value_name = "ARGUMENT", allow_hyphen_values = true)]
    addcowd_arg: Vec<OsString>,
    /// qemu-storage-daemon
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-storage-daemon")]
    qsd: PathBuf,
    /// qemu-img
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-img")]
    qemu_img: PathBuf,
    /// Given by cargo bench
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if !arguments.bench {
        println!("This is a benchmark; scripts/bench runs it.");
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What is to be done, after defaults.
struct Session<'a> {
    /// The command line.
    arguments: &'a Arguments,
    /// The programs.
    programs: Programs,
    /// The workloads.
    workloads: Vec<Workload>,
    /// The targets, the limit first.
    targets: Vec<Target>,
    /// The folders.
    folders: Vec<PathBuf>,
    /// Durations of a run.
    times: Times,
    /// Rounds.
    rounds: usize,
    /// Which processors belong to whom, if that matters.
    pinning: Option<Pinning>,
    /// Set when the user wants to stop; looked at between runs, so that the folders are removed.
    stop: Arc<AtomicBool>,
}

/// Runs everything that was asked for.
fn run(arguments: &Arguments) -> io::Result<()> {
    let session = Session::new(arguments)?;
    let mut results = Results {
        command: session.command(),
        machine: Machine::describe(&arguments.qsd)?,
        rounds: session.rounds,
        seconds: session.times.measured.as_secs_f64(),
        size_mib: arguments.size,
        places: Vec::new(),
        workloads: session.workloads.iter().map(|w| w.name.to_owned()).collect(),
        targets: session.targets.iter().map(|t| t.name.to_owned()).collect(),
        start_up: Vec::new(),
        rest: Vec::new(),
        fleet: None,
        records: Vec::new(),
    };
    for folder in &session.folders {
        session.measure_folder(folder, &mut results)?;
    }
    let page = report::markdown(&results);
    println!("\n{page}");
    if let Some(out) = session.out() {
        write_files(&out, &results, &page)?;
        println!("written to {}", out.display());
    }
    Ok(())
}

impl<'a> Session<'a> {
    /// Fills in the defaults.
    fn new(arguments: &'a Arguments) -> io::Result<Self> {
        let quick = arguments.mode == "quick";
        let seconds = arguments.seconds.unwrap_or(if quick { 1.0 } else { 0.35 });
        let measured = Duration::try_from_secs_f64(seconds).map_err(io::Error::other)?;
        let warm_up = (measured / 4).min(Duration::from_millis(200));
        let matches = |name: &str, given: &Option<Regex>, in_quick: &[&str]| match given {
            Some(regex) => regex.is_match(name),
            None => !quick || in_quick.contains(&name),
        };
        let mut targets: Vec<_> = targets::ALL.to_vec();
        targets
            .retain(|t| t.name == "limit" || matches(t.name, &arguments.targets, &QUICK_TARGETS));
        if !can_run(&arguments.qsd) || !can_run(&arguments.qemu_img) {
            let before = targets.len();
            targets.retain(|target| !target.needs_qemu());
            if targets.len() < before {
                eprintln!("bench: WARNING: qemu-storage-daemon or qemu-img does not run here;");
                eprintln!("bench: WARNING: all columns that need them are LEFT OUT");
            }
        }
        let mut workloads = Workload::all();
        workloads.retain(|w| matches(w.name, &arguments.only, &QUICK_WORKLOADS));
        let mut folders = arguments.dir.clone();
        if folders.is_empty() {
            folders.push("/dev/shm".into());
            if !quick {
                folders.push("target/bench".into());
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
        Ok(Self {
            arguments,
            programs: Programs {
                addcowd: arguments.addcowd.clone().unwrap_or(env!("CARGO_BIN_EXE_addcowd").into()),
                addcowd_args: arguments.addcowd_arg.clone(),
                addcow: env!("CARGO_BIN_EXE_addcow").into(),
                qsd: arguments.qsd.clone(),
                qemu_img: arguments.qemu_img.clone(),
            },
            workloads,
            targets,
            folders,
            times: Times { warm_up, measured },
            rounds: arguments.rounds.unwrap_or(if quick { 3 } else { 5 }).max(1),
            pinning: arguments.pin.then(Pinning::of_this_machine).transpose()?,
            stop,
        })
    }

    /// The command line, as it may be typed again.
    fn command(&self) -> String {
        let given = std::env::args().skip(1).filter(|argument| argument != "--bench");
        let words: Vec<_> = std::iter::once("scripts/bench".to_owned()).chain(given).collect();
        words.join(" ")
    }

    /// The folder for the files: `docs/benchmarks` for a full run, none for others, unless told.
    fn out(&self) -> Option<PathBuf> {
        let arguments = self.arguments;
        let is_full = arguments.mode == "full"
            && arguments.only.is_none()
            && arguments.targets.is_none()
            && arguments.addcowd.is_none()
            && arguments.addcowd_arg.is_empty();
        arguments.out.clone().or_else(|| is_full.then(|| "docs/benchmarks".into()))
    }

    /// All runs in one folder.
    fn measure_folder(&self, folder: &Path, results: &mut Results) -> io::Result<()> {
        std::fs::create_dir_all(folder)?;
        self.check_room(folder)?;
        let file_system = machine::file_system(folder)?;
        let kind = if file_system.starts_with("tmpfs ") { "tmpfs" } else { "disk" };
        let others = results.places.iter().filter(|place| place.name.starts_with(kind)).count();
        let name = if others == 0 { kind.to_owned() } else { format!("{kind}{}", others + 1) };
        let place = Place { name, folder: folder.display().to_string(), file_system };
        println!("\n{} ({}): preparing", place.folder, place.file_system);
        let size = self.arguments.size << 20;
        let mut disks = Disks::new(folder, self.programs.clone(), size)?;
        if let Some(pinning) = self.pinning {
            disks.pin(pinning)?;
        }
        let is_first = results.places.is_empty();
        results.places.push(place.clone());
        for workload in &self.workloads {
            if workload.disk_only && place.is_tmpfs() {
                continue;
            }
            self.measure_workload(&mut disks, &place, workload, results)?;
        }
        if is_first && !self.arguments.no_extras && self.arguments.mode == "full" {
            self.measure_extras(&mut disks, results)?;
        }
        Ok(())
    }

    /// All rounds of one workload, and a line that says how it went.
    fn measure_workload(
        &self,
        disks: &mut Disks,
        place: &Place,
        workload: &Workload,
        results: &mut Results,
    ) -> io::Result<()> {
        for target in &self.targets {
            // Making the disks is not part of the first round.
            disks.prepare(target, workload.state)?;
        }
        for round in 0..self.rounds {
            for at in 0..self.targets.len() {
                let target = &self.targets[(at + round) % self.targets.len()];
                self.check_stop()?;
                let figures = self.run_undisturbed(disks, place, target, workload)?;
                let record = Record::new(place, workload, target.name, round, &figures);
                if self.arguments.verbose {
                    println!(
                        "{:18} {:16} round {round}: {:9.0} IOPS, {:5.2} us CPU, p99 {:.0} us",
                        workload.name,
                        target.name,
                        record.iops,
                        record.server_cpu_us,
                        record.p99_us
                    );
                }
                results.records.push(record);
            }
        }
        print!("{:18}", workload.name);
        for target in &self.targets {
            let cell = |figure: fn(&Record) -> f64| {
                let spread = results.spread(&place.name, workload.name, target.name, figure);
                spread.map_or(0.0, |spread| spread.median)
            };
            let cpu = cell(|record| record.server_cpu_us);
            if target.name == "limit" {
                print!("  limit {} ({cpu:.1})", report::grouped(cell(|record| record.iops)));
            } else {
                let ratio = results.to_limit(&place.name, workload.name, target.name);
                let ratio = ratio.map_or(0.0, |ratio| ratio.median);
                print!("  {} {ratio:.2} ({cpu:.1})", target.name);
            }
        }
        println!();
        Ok(())
    }

    /// One run, made again while the hypervisor takes the processors away: client and server poll
    /// for each other, so that one of them standing still stops both. Where the rate is that of the
    /// median slice, a few such moments do not show.
    fn run_undisturbed(
        &self,
        disks: &mut Disks,
        place: &Place,
        target: &Target,
        workload: &Workload,
    ) -> io::Result<Figures> {
        let mut tries = 0;
        loop {
            let (start, stolen) = (Instant::now(), machine::stolen_seconds()?);
            let figures = disks.run(target, workload, self.times)?;
            let stolen = machine::stolen_seconds()? - stolen;
            tries += 1;
            let is_disturbed = if place.is_steady(workload) {
                figures.seen.iter().any(Seen::is_uneven)
            } else {
                stolen > MAX_STOLEN * start.elapsed().as_secs_f64()
            };
            if !is_disturbed {
                return Ok(figures);
            }
            if tries == MAX_TRIES {
                eprintln!("bench: WARNING: {} on {} was disturbed", workload.name, target.name);
                return Ok(figures);
            }
            self.check_stop()?;
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// Starting, resting, many daemons.
    fn measure_extras(&self, disks: &mut Disks, results: &mut Results) -> io::Result<()> {
        println!("starting and resting");
        let of = |name: &str| self.targets.iter().find(|target| target.name == name);
        for (target, gib) in [
            (of("addcow-4k"), 100),
            (of("addcow-4k").map(|_| &targets::DEFAULT), 16 << 10),
            (of("qsd-qcow2"), 100),
        ] {
            self.check_stop()?;
            let Some(target) = target else { continue };
            match extras::start_up(disks, target, gib) {
                Ok(start) => results.start_up.push(start),
                Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                    eprintln!("bench: WARNING: no file of {gib} GiB fits here; not measured");
                }
                Err(error) => return Err(error),
            }
        }
        for target in self.targets.iter().filter(|target| target.is_overlay()) {
            self.check_stop()?;
            results.rest.push(extras::rest(disks, target)?);
        }
        if let Some(target) = of("addcow-4k") {
            results.fleet = Some(extras::fleet(disks, target)?);
        }
        Ok(())
    }

    /// Refuses to begin what would fill the file system.
    fn check_room(&self, folder: &Path) -> io::Result<()> {
        // The base, the raw disk, a fresh disk, and an allocated disk for each overlay target.
        let overlays = self.targets.iter().filter(|target| target.is_overlay()).count();
        let wanted = u64::try_from(overlays + 3).unwrap_or(u64::MAX) * self.arguments.size;
        let stat = rustix::fs::statvfs(folder)?;
        let free = (stat.f_bavail * stat.f_frsize) >> 20;
        if free < wanted {
            let folder = folder.display();
            let text = format!("{folder}: {free} MiB are free, {wanted} are needed (see --size)");
            return Err(io::Error::other(text));
        }
        Ok(())
    }

    /// Ends the session when the user wants it.
    fn check_stop(&self) -> io::Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("interrupted"));
        }
        Ok(())
    }
}

/// Whether a program can be started.
fn can_run(program: &Path) -> bool {
    let mut command = Command::new(program);
    command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Writes `latest.json`, `latest.md` and a plot for each place.
fn write_files(out: &Path, results: &Results, page: &str) -> io::Result<()> {
    std::fs::create_dir_all(out)?;
    let mut page = page.to_owned();
    for place in &results.places {
        let name = format!("latest-{}.svg", place.name);
        std::fs::write(out.join(&name), svg::chart(results, place))?;
        let heading = format!("\n## {} ({})\n", place.name, place.file_system);
        page = page.replace(&heading, &format!("{heading}\n![{}]({name})\n", place.name));
    }
    std::fs::write(out.join("latest.md"), page)?;
    let mut json = serde_json::to_string(results)?;
    // A line for each cell, so that two versions of the file can be compared.
    json = json.replace("{\"place\"", "\n{\"place\"");
    std::fs::write(out.join("latest.json"), json + "\n")
}
