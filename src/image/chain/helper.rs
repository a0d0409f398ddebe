//! A thread for work that blocks, and futures that wait for it.
//!
//! What reads tables or inflates clusters through a library that knows only blocking calls runs
//! here, so that the thread of a queue goes on with its other requests. One thread for a chain: it
//! does one thing after the other, in the order in which it was asked.
//!
//! Promises: every future gets its answer, also when the work panics; a future may be dropped
//! while it waits. The thread ends when nobody can ask it any more.
//!
//! Not here: keeping answers, so that nobody asks twice (`cache`).

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Poll, Waker};

/// Something to do.
type Work = Box<dyn FnOnce() + Send>;

/// The thread, as those see it who ask it.
#[derive(Debug)]
pub struct Helper {
    /// Takes work. Requests wait for their answers, so that there is never more of it than
    /// requests in flight.
    sender: Sender<Work>,
}

/// Where an answer is put.
#[derive(Debug)]
struct Slot<T> {
    /// The answer, once there is one.
    answer: Option<io::Result<T>>,
    /// Whom to wake then.
    waker: Option<Waker>,
}

/// The work's side of a slot. Dropped without an answer, it answers with an error.
struct Answer<T>(Arc<Mutex<Slot<T>>>);

impl<T> Answer<T> {
    /// Gives the answer, unless one was given before.
    fn give(&self, answer: io::Result<T>) {
        let mut slot = self.0.lock().expect("no panic while held");
        slot.answer.get_or_insert(answer);
        let waker = slot.waker.take();
        drop(slot);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<T> Drop for Answer<T> {
    fn drop(&mut self) {
        self.give(Err(io::Error::other("the thread that reads its tables is gone")));
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
        .map_err(|_| io::Error::other("the reader of its format has failed an assertion"))
}

impl Helper {
    /// Starts the thread.
    ///
    /// # Errors
    /// That the host has no thread for us.
    pub fn start() -> io::Result<Self> {
        let (sender, receiver) = channel::<Work>();
        let thread = std::thread::Builder::new().name("tables".to_owned());
        thread.spawn(move || receiver.into_iter().for_each(|work| work()))?;
        Ok(Self { sender })
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
        let answer = Answer(Arc::clone(&slot));
        // If the thread is gone, the work comes back, is dropped, and answers so.
        let _ = self.sender.send(Box::new(move || answer.give(guarded(work))));
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::executor::block_on;
    use std::future::Future;
    use std::task::Context;

    #[test]
    fn every_future_gets_its_answer() {
        let helper = Helper::start().unwrap();
        assert_eq!(block_on(helper.run(|| 7)).unwrap(), 7);
        let error = block_on(helper.run(|| -> u64 { panic!("as a test") })).unwrap_err();
        assert!(error.to_string().contains("assertion"), "{error}");
        assert_eq!(block_on(helper.run(|| 8)).unwrap(), 8, "the thread lives on");
    }

    #[test]
    fn who_waits_for_the_thread_does_not_block_its_own() {
        let helper = Helper::start().unwrap();
        let (release, released) = channel::<()>();
        let mut waiting = Box::pin(helper.run(move || released.recv().is_ok()));
        let mut context = Context::from_waker(Waker::noop());
        assert!(waiting.as_mut().poll(&mut context).is_pending(), "the work has not ended");
        // Its own thread goes on; a request that is given up leaves the others alone.
        let given_up = helper.run(|| ());
        drop(given_up);
        release.send(()).unwrap();
        assert!(block_on(waiting).unwrap());
    }

    #[test]
    fn a_thread_that_is_gone_is_an_error() {
        let (sender, receiver) = channel();
        drop(receiver);
        let helper = Helper { sender };
        assert!(block_on(helper.run(|| ())).is_err());
    }
}
