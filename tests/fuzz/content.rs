//! What a disk may show: for each sector every content that would be right.
//!
//! Mostly that is one. A discard leaves two, what was there and zeros; requests that ran at the
//! same time leave what any of them may have left. A sector that was read has decided.
//!
//! Not here: where the bytes come from.

use std::collections::HashMap;
use std::rc::Rc;

/// Bytes in a sector.
const SECTOR: usize = 512;

/// The content of a sector.
pub type Sector = Rc<[u8]>;

/// A change by one request: its sectors with what it leaves there.
#[derive(Debug, Clone)]
pub enum Change {
    /// These bytes from this sector on.
    Write(u64, Vec<u8>),
    /// Zeros in these ranges of sectors, or for a discard perhaps what was there.
    Zero(Vec<(u64, u64)>, bool),
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    /// For each sector what it may show; never empty.
    sectors: Vec<Vec<Sector>>,
}

/// What requests that run at the same time add, by sector: contents, and whether one of them
/// certainly replaces what was there.
pub type Additions = HashMap<usize, (Vec<Sector>, bool)>;

impl Disk {
    /// A disk that shows these bytes, whole sectors.
    pub fn new(bytes: &[u8]) -> Self {
        Self { sectors: bytes.chunks(SECTOR).map(|sector| vec![sector.into()]).collect() }
    }

    /// How many sectors it has.
    pub fn sectors(&self) -> usize {
        self.sectors.len()
    }

    /// What these changes, made at the same time, may leave.
    pub fn additions(changes: &[Change]) -> Additions {
        let mut additions = Additions::new();
        let mut add = |sector: usize, content: Sector, certain: bool| {
            let entry = additions.entry(sector).or_default();
            entry.0.push(content);
            entry.1 |= certain;
        };
        for change in changes {
            match change {
                Change::Write(first, bytes) => {
                    let first = super::to_usize(*first);
                    for (at, sector) in bytes.chunks(SECTOR).enumerate() {
                        add(first + at, sector.into(), true);
                    }
                }
                Change::Zero(ranges, discard) => {
                    for (first, count) in ranges {
                        let first = super::to_usize(*first);
                        for at in first..first + super::to_usize(*count) {
                            add(at, [0; SECTOR].into(), !discard);
                        }
                    }
                }
            }
        }
        additions
    }

    /// Checks what a read at `first` got, while `additions` were made.
    ///
    /// # Panics
    /// If a sector shows what it may not.
    pub fn check(&self, first: u64, got: &[u8], additions: &Additions, what: &str) {
        for (at, sector) in (super::to_usize(first)..).zip(got.chunks(SECTOR)) {
            let more = additions.get(&at).map_or(&[][..], |(contents, _)| contents);
            let mut right = self.sectors[at].iter().chain(more);
            assert!(
                right.any(|content| **content == *sector),
                "{what}: sector {at} shows {:02x?}.., not {:02x?}..",
                &sector[..16],
                &self.sectors[at][0][..16]
            );
        }
    }

    /// A read that had the disk for itself got `got`: it has checked out, and has decided.
    pub fn decide(&mut self, first: u64, got: &[u8]) {
        for (at, sector) in (super::to_usize(first)..).zip(got.chunks(SECTOR)) {
            if self.sectors[at].len() > 1 {
                self.sectors[at] = vec![sector.into()];
            }
        }
    }

    /// The changes were made.
    pub fn apply(&mut self, additions: Additions) {
        for (at, (contents, certain)) in additions {
            if certain {
                self.sectors[at] = contents;
            } else {
                self.sectors[at].extend(contents);
            }
            self.sectors[at].dedup();
        }
    }
}
