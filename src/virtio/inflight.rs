//! The requests that a queue has taken and not completed, in memory that outlives us.
//!
//! A process that takes a queue over learns from it which chains to take once more, and in which
//! order (vhost-user, "Inflight I/O tracking"). The layout is our own: a front end keeps the memory
//! and does not look at it.
//!
//! One word for each head: 0, or the number of the request, with `DONE` once its used entry is
//! filled. One word for the used index as it was last published. Completing a batch goes: entries
//! get DONE; the used index is published in the ring; the entries become 0; our copy of the used
//! index follows. So after a death at any point: if ring and copy agree, what is DONE was not
//! published, and is taken once more; if they differ, it was, and is over.
//!
//! Whatever the memory holds, what comes out is a list of heads inside the queue, each once (I8).
//! Not here: mapping it (`storage::shared_memory`), and finding the queue's part (`vhost_user`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::storage::shared_memory::SharedMemory;

/// Set in an entry whose used entry is filled.
const DONE: u64 = 1 << 63;

/// The requests in flight of one queue.
#[derive(Debug)]
pub struct InflightQueue {
    /// Where the words are.
    memory: Arc<SharedMemory>,
    /// The first of them: the used index. The entries follow.
    first: usize,
    /// Number of entries: the size of the queue.
    size: u16,
    /// The number of the request that was taken last.
    last: u64,
    /// Heads that are DONE.
    done: Vec<u16>,
}

impl InflightQueue {
    /// How many words a queue of `size` entries takes.
    #[must_use]
    pub fn words(size: u16) -> usize {
        usize::from(size).saturating_add(1)
    }

    /// The queue whose words begin with `first`.
    #[must_use]
    pub fn new(memory: Arc<SharedMemory>, first: usize, size: u16) -> Self {
        Self { memory, first, size, last: 0, done: Vec::with_capacity(usize::from(size)) }
    }

    /// The word of our copy of the used index.
    fn used_index(&self) -> Option<&AtomicU64> {
        self.memory.word(self.first)
    }

    /// The entry of `head`; `None` if there is no such descriptor.
    fn entry(&self, head: u16) -> Option<&AtomicU64> {
        let index = self.first.checked_add(usize::from(head))?.checked_add(1)?;
        self.memory.word(index).filter(|_| head < self.size)
    }

    /// The heads that were in flight when the process died whose ring published `used_index` last,
    /// in the order in which they were taken. From now on these are in flight here.
    pub fn recover(&mut self, used_index: u16) -> Vec<u16> {
        let published = self
            .used_index()
            .is_some_and(|copy| copy.load(Ordering::SeqCst) != u64::from(used_index));
        let mut pending = Vec::new();
        for head in 0..self.size {
            let Some(entry) = self.entry(head) else { break };
            let value = entry.load(Ordering::SeqCst);
            if value == 0 {
                continue;
            }
            if published && value & DONE != 0 {
                entry.store(0, Ordering::SeqCst);
            } else {
                pending.push((value & !DONE, head));
            }
        }
        // Only now: until every entry of the batch is 0, the difference tells that it is over.
        if let Some(copy) = self.used_index() {
            copy.store(u64::from(used_index), Ordering::SeqCst);
        }
        pending.sort_unstable();
        let heads: Vec<u16> = pending.into_iter().map(|(_, head)| head).collect();
        // Numbered anew, so that the numbers never come to their end, whatever was in the memory.
        self.last = 0;
        for &head in &heads {
            self.take(head);
        }
        heads
    }

    /// Notes that the chain `head` was taken.
    pub fn take(&mut self, head: u16) {
        self.last = self.last.wrapping_add(1) & !DONE;
        let number = self.last;
        if let Some(entry) = self.entry(head) {
            entry.store(number, Ordering::Release);
        }
    }

    /// Notes that the used entry of the chain `head` is filled.
    pub fn complete(&mut self, head: u16) {
        let Some(entry) = self.entry(head) else { return };
        entry.store(entry.load(Ordering::Relaxed) | DONE, Ordering::Release);
        self.done.push(head);
    }

    /// Notes that the ring has published `used_index`, which covers all that was completed.
    pub fn published(&mut self, used_index: u16) {
        let mut done = std::mem::take(&mut self.done);
        for head in done.drain(..) {
            if let Some(entry) = self.entry(head) {
                entry.store(0, Ordering::Release);
            }
        }
        self.done = done;
        if let Some(copy) = self.used_index() {
            copy.store(u64::from(used_index), Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory for a queue of 8 entries, behind two words of something else.
    fn memory() -> Arc<SharedMemory> {
        Arc::new(SharedMemory::create("test", 2 + InflightQueue::words(8)).unwrap())
    }

    /// The queue in that memory, as a new process sees it.
    fn queue(memory: &Arc<SharedMemory>) -> InflightQueue {
        InflightQueue::new(Arc::clone(memory), 2, 8)
    }

    #[test]
    fn what_was_taken_comes_back_in_order() {
        let memory = memory();
        let mut first = queue(&memory);
        assert_eq!(first.recover(0), [0_u16; 0]);
        for head in [5, 0, 7, 3] {
            first.take(head);
        }
        first.complete(0);
        first.published(1);
        first.take(0);
        assert_eq!(queue(&memory).recover(1), [5, 7, 3, 0]);
        assert_eq!(queue(&memory).recover(1), [5, 7, 3, 0], "and again");
    }

    #[test]
    fn a_death_at_any_point_of_a_batch_completes_each_request_once() {
        // The steps of completing heads 1 and 2 while 4 goes on, and the ring's used index.
        for steps in 0..=6 {
            let memory = memory();
            let mut queue = queue(&memory);
            queue.recover(10);
            for head in [1, 2, 4] {
                queue.take(head);
            }
            let mut ring = 10;
            let store =
                |word: usize, value| memory.word(word).unwrap().store(value, Ordering::SeqCst);
            for step in 0..steps {
                match step {
                    0 => queue.complete(1),
                    1 => queue.complete(2),
                    2 => ring = 12,
                    // The three stores of `published`.
                    3 => store(2 + 1 + 1, 0),
                    4 => store(2 + 1 + 2, 0),
                    _ => store(2, 12),
                }
            }
            let expected: &[u16] = if ring == 10 { &[1, 2, 4] } else { &[4] };
            assert_eq!(self::queue(&memory).recover(ring), expected, "after {steps} steps");
        }
    }

    #[test]
    fn whatever_the_memory_holds_each_head_comes_once() {
        let memory = memory();
        for word in 0..memory.words() {
            memory.word(word).unwrap().store(u64::MAX - 7, Ordering::Relaxed);
        }
        // Every entry claims to be done, and the used indices differ.
        assert_eq!(queue(&memory).recover(0), [0_u16; 0]);
        for word in 0..memory.words() {
            memory.word(word).unwrap().store(7, Ordering::Relaxed);
        }
        let mut heads = queue(&memory).recover(7);
        heads.sort_unstable();
        assert_eq!(heads, [0, 1, 2, 3, 4, 5, 6, 7]);
        let mut queue = queue(&memory);
        queue.take(8);
        queue.complete(u16::MAX);
        queue.published(9);
        assert_eq!(memory.word(0).unwrap().load(Ordering::Relaxed), 7, "what lies in front");
    }
}
