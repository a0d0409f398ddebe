//! Exit events for the framework's worker threads.
//!
//! The framework adds the consumer's descriptor to an epoll instance and forgets it, so that every
//! connection would leave one open for each of its threads. Here the numbers are remembered, and
//! closed when the framework and its epoll instances are gone.
#![expect(unsafe_code, reason = "closes file descriptors that the framework has given up")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// The exit events of one connection.
#[derive(Debug, Default)]
pub struct ExitEvents {
    /// Descriptors that the framework has turned into bare numbers.
    given_up: Mutex<Vec<RawFd>>,
}

impl ExitEvents {
    /// A new exit event, for the framework's `exit_event` callback and nothing else: whoever gets
    /// the consumer must turn it into a bare number and never close that.
    pub(super) fn create(&self) -> Option<(EventConsumer, EventNotifier)> {
        let flags = EventFlag::NONBLOCK | EventFlag::CLOEXEC;
        let (consumer, notifier) = new_event_consumer_and_notifier(flags).ok()?;
        self.given_up.lock().expect("no panic while held").push(consumer.as_raw_fd());
        Some((consumer, notifier))
    }

    /// Closes them. To be called when the framework's daemon object has been dropped.
    pub(super) fn close(&self) {
        for fd in self.given_up.lock().expect("no panic while held").drain(..) {
            // SAFETY: `fd` was open when `create` noted it, and its only owner, the consumer, was
            // turned into a bare number by `VringEpollHandler::new`, which nobody closes. `drain`
            // makes sure that this happens once.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
}
