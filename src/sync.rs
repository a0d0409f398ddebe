//! What threads synchronise with: the standard library's types, or those of a model checker.
//!
//! With the feature `loom` or `shuttle` the code that shares state between threads is built on the
//! types of that checker, which then decides in which order threads take their steps
//! (`tests/models`). It is the product's own code that runs there, not a copy
//! of it. Without these features this module re-exports the standard library and nothing else.
//!
//! Not here: shared state that no model covers (guest memory, the counters of the log, the caches
//! of chains). It goes on using the standard library itself.

#[cfg(all(feature = "loom", feature = "shuttle"))]
compile_error!("the features `loom` and `shuttle` exclude each other: one checker at a time");

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};

#[cfg(feature = "loom")]
pub(crate) use loom::{
    sync::{Condvar, Mutex, MutexGuard},
    thread,
};
#[cfg(feature = "shuttle")]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};

/// `count` zero words; `None` if there is no memory for them. Pages of theirs that are never used
/// take none.
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
pub(crate) fn zero_words(count: u64) -> Option<Box<[atomic::AtomicU64]>> {
    use zerocopy::FromZeros;
    <[atomic::AtomicU64]>::new_box_zeroed_with_elems(usize::try_from(count).ok()?).ok()
}

/// `count` zero words, made one by one: a checker's words are more than their bytes.
#[cfg(any(feature = "loom", feature = "shuttle"))]
pub(crate) fn zero_words(count: u64) -> Option<Box<[atomic::AtomicU64]>> {
    Some((0..count).map(|_| atomic::AtomicU64::new(0)).collect())
}

/// Changes a word that no other thread can see yet.
pub(crate) fn change_word(word: &mut atomic::AtomicU64, change: impl FnOnce(&mut u64)) {
    #[cfg(not(feature = "loom"))]
    change(word.get_mut());
    #[cfg(feature = "loom")]
    word.with_mut(change);
}

/// The size of a table: `real`, or `model` under a checker, which would spend its time on entries
/// that differ in nothing.
pub(crate) const fn table_size(real: usize, model: usize) -> usize {
    if cfg!(any(feature = "loom", feature = "shuttle")) { model } else { real }
}

/// Atomics for loom, which takes sequentially consistent operations for acquire and release ones
/// and knows that order only of fences. So each sequentially consistent load here has a fence
/// before it: of two threads that each store and then load what the other stores, at least one
/// sees the other, as the standard library promises.
#[cfg(feature = "loom")]
pub(crate) mod atomic {
    use std::ops::{Deref, DerefMut};

    use loom::sync::atomic as inner;
    pub(crate) use loom::sync::atomic::Ordering;

    /// The fence before a load in this order, if it needs one.
    fn before_load(order: Ordering) {
        if order == Ordering::SeqCst {
            inner::fence(order);
        }
    }

    /// One type of atomics.
    macro_rules! atomic {
        ($name:ident, $value:ty) => {
            /// As the standard library's.
            #[derive(Debug, Default)]
            pub(crate) struct $name(inner::$name);

            #[allow(dead_code, reason = "not every type is used in every way")]
            impl $name {
                /// A new one.
                #[track_caller]
                pub(crate) fn new(value: $value) -> Self {
                    Self(inner::$name::new(value))
                }

                /// Its value.
                #[track_caller]
                pub(crate) fn load(&self, order: Ordering) -> $value {
                    before_load(order);
                    self.0.load(order)
                }

                /// Replaces its value by what `update` makes of it, if it makes anything.
                #[track_caller]
                pub(crate) fn fetch_update(
                    &self,
                    set: Ordering,
                    fetch: Ordering,
                    update: impl FnMut($value) -> Option<$value>,
                ) -> Result<$value, $value> {
                    before_load(fetch);
                    self.0.fetch_update(set, fetch, update)
                }
            }

            impl Deref for $name {
                type Target = inner::$name;

                fn deref(&self) -> &Self::Target {
                    &self.0
                }
            }

            impl DerefMut for $name {
                fn deref_mut(&mut self) -> &mut Self::Target {
                    &mut self.0
                }
            }
        };
    }

    atomic!(AtomicBool, bool);
    atomic!(AtomicU32, u32);
    atomic!(AtomicU64, u64);
    atomic!(AtomicUsize, usize);
}
