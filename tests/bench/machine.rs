//! The machine, as far as results depend on it.

use std::io;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// Description of the machine and the programs.
#[derive(Debug, Clone, Serialize)]
pub struct Machine {
    /// Model of the processor.
    pub processor: String,
    /// Processors that are online.
    pub processors: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// Kernel release.
    pub kernel: String,
    /// Version of qemu-storage-daemon.
    pub qemu: Option<String>,
    /// The commit that was measured, with a `+` when files had been changed.
    pub commit: Option<String>,
    /// Load average of the last minute before the measurement.
    pub load: String,
    /// When it began, in seconds since 1970.
    pub time: u64,
}

impl Machine {
    /// This machine, with qemu-storage-daemon `qsd`.
    pub fn describe(qsd: &Path) -> io::Result<Self> {
        let read = std::fs::read_to_string;
        let cpu = read("/proc/cpuinfo")?;
        let model = cpu.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = read("/proc/meminfo")?;
        let total = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let kib = total.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_err(io::Error::other)?;
        let load = read("/proc/loadavg")?;
        Ok(Self {
            processor: model.map_or("unknown", |(_, model)| model).into(),
            processors: std::thread::available_parallelism()?.get(),
            memory_mib: kib.unwrap_or(0) / 1024,
            kernel: read("/proc/sys/kernel/osrelease")?.trim().into(),
            qemu: first_line(Command::new(qsd).arg("--version")),
            commit: first_line(Command::new("git").args([
                "describe",
                "--always",
                "--dirty=+",
                "--abbrev=10",
            ])),
            load: load.split(' ').next().unwrap_or_default().into(),
            time: now.as_secs(),
        })
    }
}

/// The first line that a command prints, if it succeeds.
fn first_line(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).lines().next()?.to_owned())
}

/// Type and device of the file system that holds `folder`, from the mount table.
pub fn file_system(folder: &Path) -> io::Result<String> {
    let folder = std::path::absolute(folder)?;
    let table = std::fs::read_to_string("/proc/self/mounts")?;
    // The deepest mount point above the folder; of several on the same one, the last.
    let mut best = (0, String::from("unknown"));
    for line in table.lines() {
        let mut words = line.split(' ');
        let (Some(device), Some(point), Some(kind)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if folder.starts_with(point) && point.len() >= best.0 {
            best = (point.len(), format!("{kind} on {device}"));
        }
    }
    Ok(best.1)
}

/// Processor time that the hypervisor has given to somebody else while this machine wanted it,
/// since it started, in seconds of one processor (proc(5), `steal`).
pub fn stolen_seconds() -> io::Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let mut words = stat.lines().next().unwrap_or_default().split_whitespace();
    let ticks = words.nth(8).and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0);
    Ok(ticks / rustix::param::clock_ticks_per_second() as f64)
}
