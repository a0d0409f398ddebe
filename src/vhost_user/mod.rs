//! The transport: vhost-user sockets, rings, kicks and calls.
//!
//! Built on the `vhost-user-backend` crate, which parses messages, maps guest memory and keeps the
//! state of the rings. What is our own:
//!
//! ```text
//!   front end <--socket--> interposer <--socket--> framework (one thread: messages)
//!                                                     | our Vring: every change of a ring
//!                                                     v   pauses its worker first
//!                          framework's worker thread: QueueWorker (one per queue)
//! ```
//!
//! * [`vring`]: a ring that pauses and drains its worker around every change, so that no request is
//!   in flight while the control thread touches it.
//! * [`queue`]: the worker's loop, which keeps the framework's thread for as long as its ring runs.
//! * [`bell`]: how a worker calls the driver.
//! * [`interposer`]: passes messages between the real socket and the framework's own, because the
//!   framework takes no socket that is connected already, and knows nothing of inflight regions.
//! * [`recovery`]: what outlives this process: requests in flight and new bits.
//! * [`export`]: one listener for ever, a new connection state each time.
//!
//! Messages answered: all of the framework's with these protocol features: MQ, CONFIG, REPLY_ACK,
//! CONFIGURE_MEM_SLOTS, RESET_DEVICE, BACKEND_REQ; and by ourselves INFLIGHT_SHMFD. Not yet:
//! LOG_SHMFD.

pub mod backend;
pub mod bell;
pub mod exit_event;
pub mod export;
pub mod interposer;
pub mod polling;
pub mod queue;
pub mod recovery;
pub mod vring;

use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory as the framework shares it. No dirty bitmap yet: LOG_SHMFD is not offered.
pub type SharedMemory = GuestMemoryAtomic<GuestMemoryMmap<()>>;
