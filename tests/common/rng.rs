//! A small seeded generator, so that a failing random test can be run again.
//!
//! `ADDCOW_SEED=N` in the environment replaces the seed that a test asks for; the seed in use is
//! printed, and the test harness shows it when the test fails.
//!
//! Not here: statistical quality beyond what picking offsets and lengths needs.

use std::ops::Range;

use super::{to_u64, to_usize};

/// One step of the splitmix64 sequence: spreads `value` over all 64 bits.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A seeded generator (splitmix64).
#[derive(Debug)]
pub struct Rng {
    /// Where the sequence stands.
    state: u64,
}

impl Rng {
    /// The sequence of `seed`, or of `ADDCOW_SEED` where that is set.
    pub fn new(seed: u64) -> Self {
        let chosen = std::env::var("ADDCOW_SEED").ok().and_then(|text| text.parse().ok());
        let state = chosen.unwrap_or(seed);
        println!("replay with ADDCOW_SEED={state}");
        Self { state }
    }

    /// The sequence of `seed`, whatever the environment says, and nothing is printed.
    pub fn quiet(seed: u64) -> Self {
        Self { state: seed }
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number in `range`, which is not empty.
    pub fn pick(&mut self, range: Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// An index below `count`.
    pub fn index(&mut self, count: usize) -> usize {
        to_usize(self.pick(0..to_u64(count)))
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.pick(0..n) == 0
    }
}
