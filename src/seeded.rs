//! Deliberate bugs in the order of things, to show that the tests of crashes find them.
//!
//! Each place where an order matters asks [`bug`] whether it is to get it wrong. Without the
//! feature `seeded-bugs`, which nothing but `tests/seeded.rs` is built with, the answer is a
//! constant `false` and the compiler drops the question.
//!
//! Not here: what goes wrong, which is one line at the place itself; and who finds it.

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    /// A write sets the bits before the raw image has the data.
    BitBeforeData,
    /// What a write leaves out of its first cluster is not copied.
    HeadNotCopied,
    /// What a write leaves out of its last cluster is not copied.
    TailNotCopied,
    /// Nobody waits for the lock of a cluster.
    LocksIgnored,
    /// Clusters that are to be zeros are taken for holes of the raw image already.
    ZeroTrustsHoles,
    /// A discard clears the bits.
    DiscardClearsBits,
    /// A read past the end of a short backing file leaves the buffer as it was.
    ShortBackingNotZeroed,
    /// What has no backing file is read from the raw image, as if that had a hole there.
    UnbackedIsReadFromRaw,
    /// The set of dirty pages is emptied after the flush and not before it.
    DirtySetSwappedLate,
    /// Bits that could not be written are not written again.
    UnwrittenBitsForgotten,
    /// A flush joins a pass that had begun before it came.
    JoinsRunningPass,
    /// A flush writes the bits before it syncs the raw image.
    BitsBeforeRawSync,
    /// A flush that has bits to write syncs the side file alone.
    RawNotSynced,
    /// A flush does not sync the side file.
    SideNotSynced,
    /// Bits that are set while the raw image is synced are written too.
    BitsOfLateWrites,
    /// A flush without new bits does nothing.
    CleanFlushDoesNothing,
    /// After a failed sync the next flush tries again.
    FailedSyncRetried,
    /// Populating sets the bits before the raw image has the data.
    PopulateMarksFirst,
    /// Populating takes clusters of zeros for holes of the raw image already.
    PopulateTrustsHoles,
    /// Populating does not look again, under the lock, for what a guest has written.
    PopulateOverwrites,
    /// A stream says ALL_ALLOCATED before the bits are durable.
    FlagBeforeBits,
    /// A commit leaves the base without a sync, and the disk is emptied.
    BaseNotSynced,
    /// A reset gives back the raw image's space before the cleared bits are durable.
    ResetBitsNotSynced,
    /// A disk grows before the bits that hide its backing file are there.
    GrowsBeforeBits,
    /// A disk grows before the bits that hide its backing file are durable.
    GrowBitsNotSynced,
    /// The last cluster of a disk that grows gets its bit before its data is durable.
    LastClusterNotSynced,
    /// A disk that shrinks loses bits before it is shorter.
    ShrinkClearsFirst,
    /// A rebase changes the header before what was copied is durable.
    RebaseHeaderFirst,
    /// A header that spans two sectors is written without a sync between them.
    NameNotSynced,
    /// The old name is removed before the new header is durable.
    OldNameRemovedEarly,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 30] = [
        Self::BitBeforeData,
        Self::HeadNotCopied,
        Self::TailNotCopied,
        Self::LocksIgnored,
        Self::ZeroTrustsHoles,
        Self::DiscardClearsBits,
        Self::ShortBackingNotZeroed,
        Self::UnbackedIsReadFromRaw,
        Self::DirtySetSwappedLate,
        Self::UnwrittenBitsForgotten,
        Self::JoinsRunningPass,
        Self::BitsBeforeRawSync,
        Self::RawNotSynced,
        Self::SideNotSynced,
        Self::BitsOfLateWrites,
        Self::CleanFlushDoesNothing,
        Self::FailedSyncRetried,
        Self::PopulateMarksFirst,
        Self::PopulateTrustsHoles,
        Self::PopulateOverwrites,
        Self::FlagBeforeBits,
        Self::BaseNotSynced,
        Self::ResetBitsNotSynced,
        Self::GrowsBeforeBits,
        Self::GrowBitsNotSynced,
        Self::LastClusterNotSynced,
        Self::ShrinkClearsFirst,
        Self::RebaseHeaderFirst,
        Self::NameNotSynced,
        Self::OldNameRemovedEarly,
    ];
}

/// Whether this bug is wanted: never.
#[cfg(not(feature = "seeded-bugs"))]
#[inline(always)]
#[must_use]
pub const fn bug(_name: Bug) -> bool {
    false
}

/// The bug that a test has chosen.
#[cfg(feature = "seeded-bugs")]
mod chosen {
    use std::cell::Cell;

    use super::Bug;

    thread_local! {
        /// The bug that this thread has.
        static CHOSEN: Cell<Option<Bug>> = const { Cell::new(None) };
    }

    /// Whether this thread is to have this bug.
    #[must_use]
    pub fn bug(name: Bug) -> bool {
        CHOSEN.get() == Some(name)
    }

    /// Gives this thread a bug, or takes it away.
    pub fn choose(name: Option<Bug>) {
        CHOSEN.set(name);
    }
}

#[cfg(feature = "seeded-bugs")]
pub use chosen::{bug, choose};

/// Does the wrong thing if this bug is wanted.
#[inline(always)]
pub fn when(name: Bug, wrong: impl FnOnce()) {
    if bug(name) {
        wrong();
    }
}
