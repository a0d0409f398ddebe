//! Running futures without a runtime: a pool of tasks for one thread, and `block_on`.
//!
//! A [`TaskPool`] keeps its futures in place and reuses their memory: starting a task allocates
//! nothing once the pool has grown to the number of tasks that run at once. Wakers may be used from
//! any thread (a request may wait for one of another queue); a wake-up sets a bit, and rings a bell
//! only when the owner sleeps.
//!
//! Not here: what the owner does between polls (`vhost_user::queue`), fairness, priorities, timers.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::thread::{self, Thread};

/// Wakes the thread that owns a pool out of its sleep. Called from any thread.
pub type Bell = Box<dyn Fn() + Send + Sync>;

/// Which tasks want to be polled.
struct ReadySet {
    /// One bit per task.
    words: Box<[AtomicU64]>,
    /// Whether the owner sleeps, or is about to, and wants the bell.
    asleep: AtomicBool,
    /// How to wake it.
    bell: Bell,
}

impl ReadySet {
    /// Marks a task ready.
    fn mark(&self, index: usize) {
        // SeqCst pairs with `TaskPool::may_sleep`: either the owner sees this bit, or we see that
        // it is asleep.
        self.words[index / 64].fetch_or(1 << (index % 64), Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            (self.bell)();
        }
    }
}

/// The waker of one task.
struct TaskWaker {
    /// The pool's ready set.
    ready: Arc<ReadySet>,
    /// The task.
    index: usize,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.ready.mark(self.index);
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ready.mark(self.index);
    }
}

/// A place for a task.
struct Slot<F> {
    /// The task, while it runs.
    future: Pin<Box<Option<F>>>,
    /// Its waker.
    waker: Waker,
}

/// Futures of one type, run by one thread.
pub struct TaskPool<F> {
    /// The places; as many as ever ran at once.
    slots: Vec<Slot<F>>,
    /// Free places.
    free: Vec<usize>,
    /// The most places.
    capacity: usize,
    /// Who wants to be polled.
    ready: Arc<ReadySet>,
}

impl<F> std::fmt::Debug for TaskPool<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TaskPool").field("capacity", &self.capacity).finish_non_exhaustive()
    }
}

impl<F: Future> TaskPool<F> {
    /// A pool of at most `capacity` tasks whose owner is woken by `bell`.
    #[must_use]
    pub fn new(capacity: usize, bell: Bell) -> Self {
        let words = (0..capacity.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let ready = Arc::new(ReadySet { words, asleep: AtomicBool::new(false), bell });
        Self { slots: Vec::new(), free: Vec::new(), capacity, ready }
    }

    /// How many tasks run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// How many more tasks can be started now.
    #[must_use]
    pub fn room(&self) -> usize {
        self.capacity - self.running()
    }

    /// Starts a task and polls it once. Returns its output if it is done already.
    ///
    /// # Panics
    /// If there is no room.
    pub fn start(&mut self, future: F) -> Option<F::Output> {
        assert!(self.room() > 0, "task pool is full");
        let index = self.free.pop().unwrap_or_else(|| {
            let index = self.slots.len();
            let waker = Waker::from(Arc::new(TaskWaker { ready: Arc::clone(&self.ready), index }));
            self.slots.push(Slot { future: Box::pin(None), waker });
            index
        });
        self.slots[index].future.set(Some(future));
        self.poll(index)
    }

    /// Polls every task that was woken; `done` gets the outputs. Returns how many were polled.
    pub fn poll_ready(&mut self, mut done: impl FnMut(F::Output)) -> usize {
        let mut polled = 0;
        for word in 0..self.ready.words.len() {
            if self.ready.words[word].load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut bits = self.ready.words[word].swap(0, Ordering::SeqCst);
            while bits != 0 {
                let index = word * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                polled += 1;
                if let Some(output) = self.poll(index) {
                    done(output);
                }
            }
        }
        polled
    }

    /// Whether a task wants to be polled.
    #[must_use]
    pub fn has_ready(&self) -> bool {
        self.ready.words.iter().any(|word| word.load(Ordering::Relaxed) != 0)
    }

    /// Announces sleep. Returns whether the owner may sleep: no task is ready, and any that becomes
    /// ready from now on rings the bell. Call [`TaskPool::awake`] afterwards.
    #[must_use]
    pub fn may_sleep(&self) -> bool {
        self.ready.asleep.store(true, Ordering::SeqCst);
        let idle = self.ready.words.iter().all(|word| word.load(Ordering::SeqCst) == 0);
        if !idle {
            self.awake();
        }
        idle
    }

    /// The owner is awake: no bell needed.
    pub fn awake(&self) {
        self.ready.asleep.store(false, Ordering::SeqCst);
    }

    /// Polls one task; frees its place when it is done.
    fn poll(&mut self, index: usize) -> Option<F::Output> {
        let slot = &mut self.slots[index];
        // A late wake-up of a task that has ended finds its place empty.
        let future = slot.future.as_mut().as_pin_mut()?;
        match future.poll(&mut Context::from_waker(&slot.waker)) {
            Poll::Pending => None,
            Poll::Ready(output) => {
                slot.future.set(None);
                self.free.push(index);
                Some(output)
            }
        }
    }
}

/// Wakes a parked thread.
struct ThreadWaker(Thread);

impl Wake for ThreadWaker {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs `future` to its end on this thread, sleeping while it waits.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(ThreadWaker(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;
    use std::sync::atomic::AtomicUsize;

    /// Ready once `flag` is set; leaves its waker in `waker`.
    async fn wait_for(flag: Rc<RefCell<(bool, Option<Waker>)>>, value: u32) -> u32 {
        std::future::poll_fn(|context| {
            let mut state = flag.borrow_mut();
            state.1 = Some(context.waker().clone());
            if state.0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        value
    }

    #[test]
    fn tasks_finish_when_woken_and_their_places_are_reused() {
        let mut pool = TaskPool::new(2, Box::new(|| {}));
        let flag = Rc::new(RefCell::new((false, None)));
        assert_eq!(pool.start(wait_for(Rc::clone(&flag), 7)), None);
        assert_eq!(pool.poll_ready(|_| panic!("not woken")), 0);
        flag.borrow_mut().0 = true;
        let waker = flag.borrow().1.clone().unwrap();
        waker.wake_by_ref();
        let mut outputs = Vec::new();
        pool.poll_ready(|output| outputs.push(output));
        assert_eq!(outputs, [7]);
        assert_eq!(pool.start(wait_for(Rc::clone(&flag), 8)), Some(8));
        assert_eq!((pool.running(), pool.slots.len()), (0, 1));
        waker.wake();
        assert_eq!(pool.poll_ready(|_| panic!("a late wake-up finds nothing")), 1);
    }

    #[test]
    fn the_bell_rings_only_for_a_sleeper() {
        let rings = Arc::new(AtomicUsize::new(0));
        let bell = Arc::clone(&rings);
        let mut pool = TaskPool::new(
            1,
            Box::new(move || {
                bell.fetch_add(1, Ordering::SeqCst);
            }),
        );
        let flag = Rc::new(RefCell::new((false, None)));
        pool.start(wait_for(Rc::clone(&flag), 1));
        let waker = flag.borrow().1.clone().unwrap();
        waker.wake_by_ref();
        assert_eq!(rings.load(Ordering::SeqCst), 0);
        assert!(!pool.may_sleep(), "a ready task forbids sleep");
        pool.poll_ready(|_| {});
        assert!(pool.may_sleep());
        waker.wake_by_ref();
        waker.wake_by_ref();
        assert_eq!(rings.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn block_on_waits_for_another_thread() {
        let (sender, receiver) = std::sync::mpsc::channel::<Waker>();
        let thread = std::thread::spawn(move || receiver.recv().unwrap().wake());
        let mut first = true;
        block_on(std::future::poll_fn(|context| {
            if std::mem::take(&mut first) {
                sender.send(context.waker().clone()).unwrap();
                Poll::Pending
            } else {
                Poll::Ready(())
            }
        }));
        thread.join().unwrap();
    }
}
