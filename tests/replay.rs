//! The fuzz targets with the stable compiler: over every committed input, and over inputs made of
//! those by chance.
//!
//! `tests/fuzz/corpus/TARGET` holds what the fuzzers found worth keeping, and every input that ever
//! made one fail. A panic of any thread fails the test, with the input's name, or the bytes of one
//! that was made up; so does a target whose inputs no longer get past the first checks.
//! `ADDCOW_SEED=N` makes up others, `ADDCOW_SOAK=N` as many times as many.
//!
//! Not here: the targets (`tests/fuzz`), coverage (`scripts/fuzz`).

#[path = "common/score.rs"]
mod score;

mod fuzz;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use fastrand::Rng;
use fuzz::{Outcome, TARGETS, Target};
use score::score;

/// How many inputs are made up of each committed one.
const MUTANTS: u64 = 3;

/// The longest that one input may take: a thousand times what is usual.
const LIMIT: Duration = Duration::from_secs(10);

/// The places of all panics so far.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Notes panics of all threads, also of those that nobody waits for: but for those of the qcow2
/// library, which the code under test catches on purpose and turns into errors.
fn note_panics() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        if !place.contains("/imago-") {
            print(info);
            PANICS.lock().expect("no panic while held").push(place);
        }
    }));
}

/// Runs one input; `name` says which.
fn run(target: Target, name: &str, bytes: &[u8]) -> Outcome {
    let begin = Instant::now();
    let outcome = catch_unwind(AssertUnwindSafe(|| target(bytes)));
    let panics = std::mem::take(&mut *PANICS.lock().expect("no panic while held"));
    assert!(panics.is_empty(), "{name}: panic at {}", panics.join(", "));
    assert!(begin.elapsed() < LIMIT, "{name} takes {:?}", begin.elapsed());
    outcome.unwrap_or_else(|_| panic!("{name}: panic"))
}

/// The committed inputs of a target: names and bytes, in the order of the names.
fn inputs(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut inputs = Vec::new();
    for entry in fs::read_dir(&folder).expect("the corpus") {
        let path = entry.expect("an entry of the corpus").path();
        let name = path.file_name().expect("a name").to_string_lossy();
        inputs.push((format!("{target}/{name}"), fs::read(&path).expect("an input")));
    }
    inputs.sort_unstable();
    inputs
}

/// Another input, made of `bytes` and sometimes of a part of `other`.
fn mutant(rng: &mut Rng, bytes: &[u8], other: &[u8]) -> Vec<u8> {
    let mut made = bytes.to_vec();
    if rng.u8(..) < 64 && !other.is_empty() {
        made.truncate(rng.usize(..=made.len()));
        made.extend(&other[rng.usize(..other.len())..]);
    }
    for _ in 0..rng.u8(1..=4) {
        let at = rng.usize(..=made.len());
        match rng.u8(..5) {
            0 => made.insert(at, rng.u8(..)),
            1 if at < made.len() => drop(made.remove(at)),
            2 if at < made.len() => made[at] ^= 1 << rng.u8(..8),
            3 if at < made.len() => made[at] = [0, 1, 0x7f, 0x80, 0xff][rng.usize(..5)],
            _ if at < made.len() => made[at] = rng.u8(..),
            _ => made.push(rng.u8(..)),
        }
    }
    made
}

/// A number from the environment.
fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

// One test for all targets: one of them counts the threads and descriptors of this process.
#[test]
fn every_committed_input_and_its_mutants_do_no_harm() {
    note_panics();
    let seed = setting("ADDCOW_SEED").unwrap_or(1);
    let mutants = MUTANTS * setting("ADDCOW_SOAK").unwrap_or(1);
    for (name, target) in TARGETS {
        let (mut effective, mut executed, mut made_up) = (0, 0, 0);
        let inputs = inputs(name);
        for (input, bytes) in &inputs {
            let outcome = run(target, input, bytes);
            effective += u64::from(outcome.executed > 0);
            executed += outcome.executed;
        }
        let count = fuzz::to_u64(inputs.len());
        // Half of the requests; for images the many ways to be refused are as good as to be read.
        let one_in = if name == "requests" { 2 } else { 6 };
        let enough = effective * one_in > count;
        assert!(enough, "{name}: {effective} of {count} inputs execute anything");
        let mut rng = Rng::with_seed(seed);
        for _ in 0..mutants {
            for (input, bytes) in &inputs {
                let other = &inputs[rng.usize(..inputs.len())].1;
                let made = mutant(&mut rng, bytes, other);
                let what = format!("ADDCOW_SEED={seed}, of {input}: {made:02x?}");
                executed += run(target, &what, &made).executed;
                made_up += 1;
            }
        }
        let figures = [
            ("inputs", count),
            ("effective", effective),
            ("made_up", made_up),
            ("executed", executed),
        ];
        score(&format!("replay_{name}"), &figures);
    }
}
