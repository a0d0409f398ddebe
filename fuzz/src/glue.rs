//! What the fuzz programs share: finds the target by name, counts what it executes.
//!
//! The counts go to the file that `ADDCOW_FUZZ_COUNTS` names, every now and then and at the end of
//! a clean run: executions, executions that executed something, and what they executed.

#[path = "../../tests/fuzz/mod.rs"]
mod fuzz;

use std::fs::File;
use std::io::Write as _;
use std::sync::{Mutex, Once};
use std::time::{Duration, Instant};

/// How often the counts are written.
const PERIOD: Duration = Duration::from_secs(2);

/// The counts so far.
struct Counts {
    /// Executions.
    runs: u64,
    /// Of those the ones that executed something.
    effective: u64,
    /// What was executed.
    executed: u64,
    /// When the counts were written last.
    written: Option<Instant>,
}

/// The counts of this process.
static COUNTS: Mutex<Counts> =
    Mutex::new(Counts { runs: 0, effective: 0, executed: 0, written: None });

/// Ends the process at a panic, whoever would catch it: but for those of the qcow2 library, which
/// the code under test catches on purpose and turns into errors.
fn abort_on_panic() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map_or("", |location| location.file());
        if !place.contains("/imago-") {
            print(info);
            std::process::abort();
        }
    }));
}

/// Runs the target `name` on one input.
pub fn run(name: &str, data: &[u8]) {
    static HOOK: Once = Once::new();
    HOOK.call_once(abort_on_panic);
    let (_, target) = fuzz::TARGETS.iter().find(|(known, _)| *known == name).expect("a target");
    let outcome = target(data);
    let mut counts = COUNTS.lock().expect("no panic while held");
    counts.runs += 1;
    counts.effective += u64::from(outcome.executed > 0);
    counts.executed += outcome.executed;
    if counts.written.is_none_or(|written| written.elapsed() > PERIOD) {
        counts.written = Some(Instant::now());
        let Some(path) = std::env::var_os("ADDCOW_FUZZ_COUNTS") else { return };
        let text = format!("{} {} {}\n", counts.runs, counts.effective, counts.executed);
        let written = File::create(path).and_then(|mut file| file.write_all(text.as_bytes()));
        written.expect("the counts can be written");
    }
}
