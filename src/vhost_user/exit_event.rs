//! Exit events for the framework's worker threads.
//!
//! The framework adds the consumer's descriptor to an epoll instance and forgets it, so that every
//! connection would leave one open for each of its threads. Here the numbers are remembered, and
//! closed with this.
//!
//! All descriptors are had before the framework starts its first thread: a thread without an exit
//! event could never be ended. And we can end the threads ourselves, which the framework does not
//! do for those that were running when it failed to start the next one.
#![expect(unsafe_code, reason = "closes file descriptors that the framework has given up")]

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// The exit events of one connection. All of them are the same eventfd, which nobody reads: once it
/// is rung, every thread ends.
#[derive(Debug)]
pub struct ExitEvents {
    /// Our own handle.
    notifier: EventNotifier,
    /// Those that the framework has not asked for yet.
    prepared: Mutex<Vec<(EventConsumer, EventNotifier)>>,
    /// Descriptors that the framework has turned into bare numbers.
    given_up: Mutex<Vec<RawFd>>,
}

impl ExitEvents {
    /// Exit events for so many threads.
    ///
    /// # Errors
    /// If there are not as many file descriptors left.
    pub(super) fn new(threads: usize) -> io::Result<Self> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let (consumer, notifier) = new_event_consumer_and_notifier(flags)?;
        let pair = |_| Ok((consumer.try_clone()?, notifier.try_clone()?));
        let prepared = (0..threads).map(pair).collect::<io::Result<_>>()?;
        Ok(Self { notifier, prepared: Mutex::new(prepared), given_up: Mutex::default() })
    }

    /// One of them, for the framework's `exit_event` callback and nothing else: whoever gets the
    /// consumer must turn it into a bare number and never close that.
    ///
    /// # Panics
    /// If it is asked for more often than there are threads. Without an event the framework would
    /// start a thread all the same, and wait for its end for ever.
    pub(super) fn hand_out(&self) -> (EventConsumer, EventNotifier) {
        let event = self.prepared.lock().expect("no panic while held").pop();
        let (consumer, notifier) = event.expect("the framework asks once for each of its threads");
        self.given_up.lock().expect("no panic while held").push(consumer.as_raw_fd());
        (consumer, notifier)
    }

    /// Ends every thread that has one of them.
    pub(super) fn ring(&self) {
        if let Err(error) = self.notifier.notify() {
            log::error!("cannot end the threads of a connection: {error}");
        }
    }
}

impl Drop for ExitEvents {
    fn drop(&mut self) {
        for fd in self.given_up.get_mut().expect("no panic while held").drain(..) {
            // SAFETY: `fd` was open when `hand_out` noted it, and its only owner, the consumer, was
            // turned into a bare number by `VringEpollHandler::new`, which nobody closes. `drain`
            // makes sure that this happens once.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
