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
mod histogram;
mod lane;
mod memory;
mod server;
mod targets;
mod workload;

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use regex_lite::Regex;

use disks::{Disks, Figures};
use drive::Times;
use targets::{Programs, Target};
use workload::Workload;

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
    /// Seconds that a run is measured [default: 0.5; quick: 1]
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

/// Runs everything that was asked for.
fn run(arguments: &Arguments) -> io::Result<()> {
    let quick = arguments.mode == "quick";
    let seconds = arguments.seconds.unwrap_or(if quick { 1.0 } else { 0.5 });
    let measured = Duration::try_from_secs_f64(seconds).map_err(io::Error::other)?;
    let times = Times { warm_up: (measured / 4).min(Duration::from_millis(200)), measured };
    let rounds = arguments.rounds.unwrap_or(if quick { 3 } else { 5 });
    let programs = Programs {
        addcowd: arguments.addcowd.clone().unwrap_or(env!("CARGO_BIN_EXE_addcowd").into()),
        addcowd_args: arguments.addcowd_arg.clone(),
        addcow: env!("CARGO_BIN_EXE_addcow").into(),
        qsd: arguments.qsd.clone(),
        qemu_img: arguments.qemu_img.clone(),
    };
    let only = |w: &Workload| arguments.only.as_ref().is_none_or(|r| r.is_match(w.name));
    let workloads: Vec<_> = Workload::all().into_iter().filter(only).collect();
    let wanted = |t: &Target| {
        t.name == "limit" || arguments.targets.as_ref().is_none_or(|r| r.is_match(t.name))
    };
    let targets: Vec<_> = targets::ALL.into_iter().filter(wanted).collect();
    let mut disks = Disks::new(Path::new("/dev/shm"), programs, arguments.size << 20)?;
    for workload in &workloads {
        for round in 0..rounds {
            for at in 0..targets.len() {
                let target = &targets[(at + round) % targets.len()];
                let figures = disks.run(target, workload, times)?;
                print(workload, target, &figures);
            }
        }
    }
    Ok(())
}

/// One line for a run.
fn print(workload: &Workload, target: &Target, figures: &Figures) {
    let iops: f64 = figures.seen.iter().map(|s| s.requests as f64 / s.seconds).sum();
    let requests: u64 = figures.seen.iter().map(|s| s.requests).sum();
    let cpu = figures.server_ns as f64 / requests as f64 / 1000.0;
    println!(
        "{:20} {:16} {iops:10.0} IOPS {cpu:7.2} us  {:?} {:?}",
        workload.name, target.name, figures.pss_kib, figures.client_ns
    );
}
