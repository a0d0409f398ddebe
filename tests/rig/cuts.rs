//! Power cuts: which states of a disk one can leave behind, and what was counted.
//!
//! Not here: what is done to the disk, and what it may show then.

use fastrand::Rng;

use super::scaled;

/// What was counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// Things done to a disk from beginning to end: requests, jobs.
    pub workloads: u64,
    /// Power cuts: moments of a workload.
    pub cuts: u64,
    /// States of the disk that these cuts can leave. Each was held against what it may show.
    pub states: u64,
    /// States that were opened and read; any other had the very bytes of one of these.
    pub opened: u64,
}

impl Count {
    /// The figures, for the scorecard: of a suite that has come to its end, with no illegal state.
    pub fn figures(&self) -> [(&'static str, u64); 5] {
        [
            ("workloads", self.workloads),
            ("cuts", self.cuts),
            ("states", self.states),
            ("opened", self.opened),
            ("illegal", 0),
        ]
    }

    /// Fails unless there were so many states; without optimisation less is tried, and enough.
    pub fn expect_states(&self, optimised: u64, otherwise: u64) {
        let least = if cfg!(debug_assertions) { otherwise } else { optimised };
        assert!(self.states >= least, "{least} states expected: {self:?}");
    }
}

/// Which subsets of the unsynced sectors are tried.
#[derive(Debug, Clone, Copy)]
pub struct Depth {
    /// All, if they are no more than this.
    pub all: usize,
    /// Else none and all sectors, and of so many sectors each alone and each missing;
    pub singles: usize,
    /// and so many at random.
    pub random: usize,
}

impl Depth {
    /// Of few sectors all subsets: of ten that were written once each.
    pub const WHOLE: Self = Self { all: 1024, singles: 64, random: 256 };
    /// The most important ones.
    pub const FEW: Self = Self { all: 64, singles: 12, random: 12 };
}

/// Calls `check` with ways in which a power cut may treat the unsynced sectors and lengths, of
/// which `versions` tells how many versions each has: what `SimDisk::power_cut_choosing` is to
/// choose for each.
pub fn each_way(versions: &[usize], depth: Depth, rng: &mut Rng, mut check: impl FnMut(&[usize])) {
    let product = versions.iter().try_fold(1_usize, |product, n| product.checked_mul(n + 1));
    if let Some(ways) = product.filter(|ways| *ways <= depth.all) {
        let mut way = vec![0; versions.len()];
        for number in 0..ways {
            let mut rest = number;
            for (choice, n) in way.iter_mut().zip(versions) {
                (*choice, rest) = (rest % (n + 1), rest / (n + 1));
            }
            check(&way);
        }
        return;
    }
    let none = versions.to_vec();
    let all: Vec<usize> = versions.iter().map(|n| n - 1).collect();
    check(&none);
    check(&all);
    for number in 0..versions.len().min(depth.singles) {
        // Of more sectors than that any.
        let is_each = versions.len() <= depth.singles;
        let index = if is_each { number } else { rng.usize(0..versions.len()) };
        for (rest, one) in [(&none, &all), (&all, &none)] {
            let mut way = rest.clone();
            way[index] = one[index];
            check(&way);
        }
    }
    for _ in 0..depth.random {
        check(&versions.iter().map(|n| rng.usize(0..=*n)).collect::<Vec<_>>());
    }
}

/// What a power cut chooses that treats the sectors in this way.
pub fn chooser(way: &[usize]) -> impl FnMut(usize) -> usize {
    let mut choices = way.iter();
    move |_| *choices.next().expect("one for each")
}

/// The seeds of a random test: `count` of them from `base` on, see [`super::base_seed`].
pub fn seeds(base: u64, count: u64) -> std::ops::Range<u64> {
    let base = super::base_seed(base);
    base..base + scaled(count)
}
