//! A thread that does what others ask it to, and futures that wait for it.
//!
//! For work that must not run where it is asked for: because it blocks, and a queue has other
//! requests (`image/chain/qcow2.rs`), or because this thread may do what others have given up
//! (`sandbox`). It does one thing after the other, in the order in which it was asked.
//!
//! Promises: every future gets its answer, also when the work panics; a future may be dropped
//! while it waits. The thread ends when nobody can ask it any more.
//!
//! Work is handed over with a lock and a condition and not by a channel: on the kernel's side that
//! is futex(2) and nothing else, which keeps tables of system calls short.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::task::{Poll, Waker};

use crate::executor::block_on;

/// Something to do.
type Work = Box<dyn FnOnce() + Send>;

/// The thread, as those see it who ask it.
#[derive(Debug)]
pub struct Helper {
    /// Where it finds its work.
    desk: Arc<Desk>,
}

/// Where work is left for the thread.
#[derive(Default)]
struct Desk {
    /// What is left.
    orders: Mutex<Orders>,
    /// Told of work, and of the end.
    changed: Condvar,
}

/// What is left to do.
#[derive(Default)]
struct Orders {
    /// In the order in which it was asked for. Who asks waits for the answer, so that there is
    /// never more of it than requests in flight.
    work: VecDeque<Work>,
    /// Nobody can ask any more.
    closed: bool,
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").finish_non_exhaustive()
    }
}

impl Desk {
    /// What is left to do. Work runs without this lock, so that no panic comes out of it.
    fn orders(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().expect("no panic while held")
    }

    /// Leaves a piece of work. Being told is a system call, and the thread waits only if nothing is
    /// left: whoever left the first piece has told it.
    fn leave(&self, work: Work) {
        let mut orders = self.orders();
        let was_empty = orders.work.is_empty();
        orders.work.push_back(work);
        drop(orders);
        if was_empty {
            self.changed.notify_one();
        }
    }

    /// Waits for the next piece of work; `None` at the end.
    fn next(&self) -> Option<Work> {
        let is_idle = |orders: &mut Orders| orders.work.is_empty() && !orders.closed;
        let orders = self.changed.wait_while(self.orders(), is_idle);
        orders.expect("no panic while held").work.pop_front()
    }
}

/// Where an answer is put.
#[derive(Debug)]
struct Slot<T> {
    /// The answer, once there is one.
    answer: Option<io::Result<T>>,
    /// Whom to wake then.
    waker: Option<Waker>,
}

/// Puts an answer into its slot.
fn give<T>(slot: &Mutex<Slot<T>>, answer: io::Result<T>) {
    let mut slot = slot.lock().expect("no panic while held");
    slot.answer = Some(answer);
    let waker = slot.waker.take();
    drop(slot);
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// Runs `work`, and makes an error of a panic: a library that trips over a damaged file must not
/// take the disk with it.
///
/// # Errors
/// That `work` has panicked.
pub fn guarded<T>(work: impl FnOnce() -> T) -> io::Result<T> {
    // What the panic leaves behind is only looked at again through the library's own locks.
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|_| io::Error::other("the library for this has failed an assertion"))
}

impl Helper {
    /// Starts the thread. `name`: at most 15 bytes.
    ///
    /// # Errors
    /// That the host has no thread for us.
    pub fn start(name: &str) -> io::Result<Self> {
        let desk = Arc::new(Desk::default());
        let theirs = Arc::clone(&desk);
        let work = move || {
            while let Some(work) = theirs.next() {
                work();
            }
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(work)?;
        Ok(Self { desk })
    }

    /// Lets the thread do `work`, and waits for what comes out.
    ///
    /// # Errors
    /// That `work` has panicked.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let slot = Arc::new(Mutex::new(Slot { answer: None, waker: None }));
        let theirs = Arc::clone(&slot);
        self.desk.leave(Box::new(move || give(&theirs, guarded(work))));
        std::future::poll_fn(|context| {
            let mut slot = slot.lock().expect("no panic while held");
            if let Some(answer) = slot.answer.take() {
                return Poll::Ready(answer);
            }
            slot.waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// The same for a thread that has nothing else to do meanwhile.
    ///
    /// # Errors
    /// That `work` has panicked.
    pub fn run_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        block_on(self.run(work))
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        self.desk.orders().closed = true;
        self.desk.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::future::Future;
    use std::sync::mpsc::{Sender, channel};
    use std::task::Context;

    #[test]
    fn every_future_gets_its_answer() {
        let helper = Helper::start("test").unwrap();
        assert_eq!(block_on(helper.run(|| 7)).unwrap(), 7);
        let error = block_on(helper.run(|| -> u64 { panic!("as a test") })).unwrap_err();
        assert!(error.to_string().contains("assertion"), "{error}");
        assert_eq!(helper.run_blocking(|| 8).unwrap(), 8, "the thread lives on");
    }

    #[test]
    fn who_waits_for_the_thread_does_not_block_its_own() {
        let helper = Helper::start("test").unwrap();
        let (release, released) = channel::<()>();
        let mut waiting = Box::pin(helper.run(move || released.recv().is_ok()));
        let mut context = Context::from_waker(Waker::noop());
        assert!(waiting.as_mut().poll(&mut context).is_pending(), "the work has not ended");
        // Its own thread goes on and asks for more; a request that is given up leaves the others
        // alone.
        let mut asked: Vec<_> = (0..3).map(|number| Box::pin(helper.run(move || number))).collect();
        asked.iter_mut().for_each(|next| assert!(next.as_mut().poll(&mut context).is_pending()));
        drop(asked.remove(1));
        release.send(()).unwrap();
        assert!(block_on(waiting).unwrap());
        let answers: Vec<i32> = asked.into_iter().map(|next| block_on(next).unwrap()).collect();
        assert_eq!(answers, [0, 2]);
    }

    #[test]
    fn the_thread_ends_with_the_last_who_can_ask() {
        thread_local!(static KEPT: RefCell<Option<Sender<()>>> = const { RefCell::new(None) });
        let helper = Helper::start("test").unwrap();
        let (kept, ended) = channel();
        helper.run_blocking(move || KEPT.set(Some(kept))).unwrap();
        drop(helper);
        assert!(ended.recv().is_err(), "it goes with the thread, and nothing was sent");
    }
}
