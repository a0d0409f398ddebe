//! A bound for memory that requests need beside the guest's: who finds it used up waits for others
//! to give theirs back.
//!
//! Promises: whoever waits is served in the order of arrival, on whatever thread it waits, and
//! nobody gets more than there is. Who holds a lease must not wait for another one of the same
//! budget, or two such requests would wait for each other; see the users.

use tokio::sync::{Semaphore, SemaphorePermit};

/// So many bytes that requests share.
#[derive(Debug)]
pub struct MemoryBudget {
    /// One permit for each byte.
    bytes: Semaphore,
    /// All bytes.
    total: u32,
}

impl MemoryBudget {
    /// A budget of `total` bytes.
    #[must_use]
    pub fn new(total: u32) -> Self {
        Self { bytes: Semaphore::new(total as usize), total }
    }

    /// Waits until `bytes` are there, and takes them for as long as the lease lives. Who wants more
    /// than the whole gets the whole.
    pub async fn lease(&self, bytes: usize) -> SemaphorePermit<'_> {
        let bytes = u32::try_from(bytes).unwrap_or(self.total).min(self.total);
        self.bytes.acquire_many(bytes).await.expect("never closed")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    #[test]
    fn who_comes_later_waits_its_turn_and_the_greatest_wish_is_met() {
        let budget = MemoryBudget::new(100);
        let mut context = Context::from_waker(Waker::noop());
        let Poll::Ready(first) = pin!(budget.lease(60)).poll(&mut context) else { panic!() };
        let mut all = pin!(budget.lease(usize::MAX));
        assert!(all.as_mut().poll(&mut context).is_pending());
        let mut small = pin!(budget.lease(1));
        assert!(small.as_mut().poll(&mut context).is_pending(), "overtook who came before");
        drop(first);
        let Poll::Ready(lease) = all.as_mut().poll(&mut context) else { panic!("not the whole") };
        assert!(small.as_mut().poll(&mut context).is_pending());
        drop(lease);
        assert!(small.as_mut().poll(&mut context).is_ready());
    }
}
