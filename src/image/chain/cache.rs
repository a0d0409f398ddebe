//! A cache with a bound: what has not been asked for lately is forgotten.
//!
//! Two generations of entries. New ones and those asked for are in the young one; when that has
//! grown to half the bound it becomes the old one, and what was in the old one goes. So an entry
//! that is used stays, nothing is sorted, and a hit among the young takes only a read lock.
//!
//! Not here: loading what is missing.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::RwLock;

/// Values by key, shared by all threads.
#[derive(Debug)]
pub struct Cache<K, V> {
    /// The entries.
    generations: RwLock<Generations<K, V>>,
    /// The most that one generation may weigh; the whole cache twice that. A single entry may be
    /// heavier.
    half: u64,
}

/// The entries of a cache.
#[derive(Debug)]
struct Generations<K, V> {
    /// Those added or asked for since the generations changed, each with its weight.
    young: HashMap<K, (V, u64)>,
    /// Those before.
    old: HashMap<K, (V, u64)>,
    /// What the young ones weigh.
    weight: u64,
}

impl<K: Copy + Eq + Hash, V> Generations<K, V> {
    /// Adds an entry to the young ones. Returns what is to be forgotten: freeing it may take a
    /// while, and needs no lock.
    #[must_use]
    fn add(&mut self, key: K, value: V, weight: u64, half: u64) -> HashMap<K, (V, u64)> {
        let mut forgotten = HashMap::new();
        if self.weight.saturating_add(weight) > half && !self.young.is_empty() {
            let young = std::mem::take(&mut self.young);
            forgotten = std::mem::replace(&mut self.old, young);
            self.weight = 0;
        }
        let replaced = self.young.insert(key, (value, weight)).map_or(0, |(_, weight)| weight);
        self.weight = self.weight.saturating_add(weight).saturating_sub(replaced);
        forgotten
    }
}

impl<K: Copy + Eq + Hash, V> Cache<K, V> {
    /// An empty cache that holds entries up to `bound`, in whatever unit their weights have.
    #[must_use]
    pub fn new(bound: u64) -> Self {
        let generations = Generations { young: HashMap::new(), old: HashMap::new(), weight: 0 };
        Self { generations: RwLock::new(generations), half: bound / 2 }
    }

    /// What `look` makes of the entry `key`, if there is one. `look` runs under a lock: it must be
    /// short, and not use the cache.
    pub fn get<R>(&self, key: K, look: impl FnOnce(&V) -> R) -> Option<R> {
        let generations = self.generations.read().expect("no panic while held");
        if let Some((value, _)) = generations.young.get(&key) {
            return Some(look(value));
        }
        if !generations.old.contains_key(&key) {
            return None;
        }
        drop(generations);
        let mut generations = self.generations.write().expect("no panic while held");
        let (value, weight) = generations.old.remove(&key)?;
        let result = look(&value);
        let forgotten = generations.add(key, value, weight, self.half);
        drop(generations);
        drop(forgotten);
        Some(result)
    }

    /// Adds an entry of that weight, or replaces it.
    pub fn insert(&self, key: K, value: V, weight: u64) {
        let mut generations = self.generations.write().expect("no panic while held");
        let forgotten = generations.add(key, value, weight, self.half);
        drop(generations);
        drop(forgotten);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_bound_holds() {
        let cache = Cache::new(20);
        for key in 0..1000_u64 {
            cache.insert(key, key, 1);
            assert_eq!(cache.get(0, |value| *value), Some(0), "asked for all the time");
            assert_eq!(cache.get(key, |value| *value), Some(key));
        }
        let generations = cache.generations.read().unwrap();
        assert!(generations.young.len() + generations.old.len() <= 20);
        assert_eq!(generations.weight, generations.young.len() as u64);
    }

    #[test]
    fn an_entry_heavier_than_the_bound_is_kept_until_the_next_ones_come() {
        let cache = Cache::new(8);
        cache.insert(1, "heavy", 100);
        assert_eq!(cache.get(1, |value| *value), Some("heavy"));
        cache.insert(2, "light", 1);
        cache.insert(3, "heavy", 100);
        cache.insert(4, "heavy", 100);
        assert_eq!(cache.get(1, |value| *value), None);
    }
}
