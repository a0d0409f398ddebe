//! Latencies in counters of about 3 % width.
//!
//! Values below 32 ns have a counter each, larger ones 32 counters per power of two.

/// Counters per power of two, as a power of two.
const SUB_BITS: u32 = 5;

/// Counters per power of two.
const SUB: u64 = 1 << SUB_BITS;

/// Number of counters: enough for every 64-bit value.
const COUNTERS: usize = 64 << SUB_BITS;

/// How often which latency was seen.
#[derive(Debug, Clone)]
pub struct Histogram {
    /// The counters.
    counts: Vec<u32>,
}

impl Histogram {
    /// Nothing seen yet.
    pub fn new() -> Self {
        Self { counts: vec![0; COUNTERS] }
    }

    /// Counts a latency in nanoseconds.
    pub fn add(&mut self, nanoseconds: u64) {
        self.counts[index(nanoseconds)] += 1;
    }

    /// Adds what `other` has seen.
    pub fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
    }

    /// The latency in nanoseconds that `permille` of 1000 requests do not exceed; 0 when nothing
    /// was seen.
    pub fn percentile(&self, permille: u64) -> u64 {
        let total: u64 = self.counts.iter().map(|&count| u64::from(count)).sum();
        let wanted = (total * permille).div_ceil(1000);
        let mut seen = 0;
        for (at, &count) in self.counts.iter().enumerate() {
            seen += u64::from(count);
            if seen >= wanted && count > 0 {
                return value(at);
            }
        }
        0
    }
}

/// The counter of a value.
fn index(value: u64) -> usize {
    let small = value | SUB;
    let exponent = 63 - small.leading_zeros();
    let shift = exponent - SUB_BITS;
    let row = u64::from(shift) << SUB_BITS;
    let at = if value < SUB { value } else { row + (value >> shift) };
    usize::try_from(at).unwrap_or(COUNTERS - 1)
}

/// The middle of what a counter stands for.
fn value(at: usize) -> u64 {
    let at = u64::try_from(at).unwrap_or(0);
    if at < 2 * SUB {
        return at;
    }
    let shift = (at >> SUB_BITS) - 1;
    ((SUB + (at & (SUB - 1))) << shift) + ((1 << shift) >> 1)
}
