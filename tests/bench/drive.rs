//! The loop that keeps requests in flight and measures them.
//!
//! One thread per queue, polling: it takes all completions that are there, refills their slots and
//! submits once. Time is read once per turn of the loop, so requests that complete together have
//! the same end. A workload with an end is measured from its first request to its last; the others
//! for a while after a warm-up, counting what completes in that time.
//!
//! Of what is read, everything in the warm-up is compared with what must be there, then one
//! request in 64. Of what is written, the last 64 blocks are read back at the end.

use std::collections::VecDeque;
use std::io;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::content::{check, randomise, stamp};
use super::histogram::Histogram;
use super::lane::{Lane, Op};
use super::memory::Memory;
use super::workload::{Plan, Workload};

/// How long the loop waits for a completion before it gives up.
const STALL: Duration = Duration::from_secs(30);

/// How many empty turns of the loop pass between looks at the clock.
const TURNS: u32 = 4096;

/// How many empty turns pass before the thread gives way, where it has to.
const CROWDED_TURNS: u32 = 64;

/// After warm-up, one of this many reads is checked.
const CHECK_EVERY: u64 = 64;

/// How many written blocks are read back.
const READ_BACK: usize = 64;

/// The measured time is cut into slices of so many milliseconds.
const SLICE_MS: u128 = 10;

/// How long to measure.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Before the measurement; not used when the workload has an end.
    pub warm_up: Duration,
    /// The measurement, or what a workload with an end may take.
    pub measured: Duration,
}

/// What one thread has seen.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Requests that completed in the measured time.
    pub requests: u64,
    /// The measured time in seconds.
    pub seconds: f64,
    /// How many requests completed in each whole slice of the measured time.
    slices: Vec<u64>,
    /// Latencies.
    pub latencies: Histogram,
    /// Whether a workload with an end came to it.
    pub complete: bool,
    /// What the probe of the first thread said over the measured time.
    pub probed: u64,
}

impl Seen {
    /// Requests per second over the measured time.
    pub fn mean_rate(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    /// Requests per second in the median slice: what a moment in which the hypervisor had taken a
    /// processor away does not change.
    pub fn median_rate(&self) -> f64 {
        self.slice_rate(500)
    }

    /// Whether so many slices were disturbed that the median may be one of them.
    pub fn is_uneven(&self) -> bool {
        self.slice_rate(500) < 0.8 * self.slice_rate(900)
    }

    /// Requests per second in the slice that `permille` of the slices do not exceed.
    fn slice_rate(&self, permille: usize) -> f64 {
        let mut slices = self.slices.clone();
        slices.sort_unstable();
        let slice = slices.get(slices.len() * permille / 1000).copied().unwrap_or_default();
        slice as f64 * 1e3 / SLICE_MS as f64
    }
}

/// What all threads of a run share.
pub struct Run<'a> {
    /// The workload.
    pub workload: &'a Workload,
    /// Durations.
    pub times: Times,
    /// The number that this run's writes leave in their blocks; at least 1.
    pub generation: u64,
    /// A growing number, read when the measured time begins and ends: processor time.
    pub probe: &'a (dyn Fn() -> io::Result<u64> + Sync),
    /// Whether there are fewer processors than polling threads, so that they must give way.
    pub crowded: bool,
}

impl Run<'_> {
    /// Sends the plans' requests through the lanes, one thread each. Lane `i` uses `memories[i]`.
    pub fn go<L: Lane>(
        &self,
        lanes: &mut [L],
        memories: &[Memory],
        plans: Vec<Plan>,
    ) -> io::Result<Vec<Seen>> {
        let start = Barrier::new(lanes.len());
        std::thread::scope(|scope| {
            let all = lanes.iter_mut().zip(memories).zip(plans).enumerate();
            let threads: Vec<_> = all
                .map(|(number, ((lane, memory), plan))| {
                    let start = &start;
                    scope.spawn(move || {
                        randomise(memory, self.generation);
                        let mut driver = Driver::new(self, lane, memory, plan, number == 0);
                        start.wait();
                        driver.run()
                    })
                })
                .collect();
            threads
                .into_iter()
                .map(|thread| {
                    thread.join().unwrap_or_else(|_| Err(io::Error::other("a client panicked")))
                })
                .collect()
        })
    }
}

/// Where the loop is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Before the measured time.
    WarmUp,
    /// In it.
    Measured,
    /// After it: no new requests.
    Draining,
}

/// How many whole slices `time` has.
fn slices_in(time: Duration) -> usize {
    usize::try_from(time.as_millis() / SLICE_MS).unwrap_or(usize::MAX)
}

/// The loop of one thread.
struct Driver<'r, L> {
    /// What is run.
    run: &'r Run<'r>,
    /// Where to.
    lane: &'r mut L,
    /// The buffers.
    memory: &'r Memory,
    /// What to send.
    plan: Plan,
    /// What each slot is busy with, and since when.
    slots: Vec<Option<(Op, Instant)>>,
    /// How many slots are busy.
    in_flight: usize,
    /// Which part of the run this is.
    phase: Phase,
    /// When the phase began.
    since: Instant,
    /// The last written blocks, oldest first.
    written: VecDeque<u64>,
    /// The result so far.
    seen: Seen,
    /// Whether this thread asks the probe.
    probes: bool,
}

impl<'r, L: Lane> Driver<'r, L> {
    /// A loop that has not begun.
    fn new(run: &'r Run<'r>, lane: &'r mut L, memory: &'r Memory, plan: Plan, p: bool) -> Self {
        Self {
            run,
            lane,
            memory,
            plan,
            slots: vec![None; run.workload.depth],
            in_flight: 0,
            phase: Phase::WarmUp,
            since: Instant::now(),
            written: VecDeque::with_capacity(READ_BACK + 1),
            seen: Seen {
                requests: 0,
                seconds: 0.0,
                slices: Vec::with_capacity(slices_in(run.times.measured) + 1),
                latencies: Histogram::new(),
                complete: true,
                probed: 0,
            },
            probes: p,
        }
    }

    /// Everything from the first request to the checks at the end.
    fn run(&mut self) -> io::Result<Seen> {
        self.lane.begin()?;
        if self.run.workload.is_finite() {
            self.begin_measuring()?;
        }
        self.since = Instant::now();
        for slot in 0..self.slots.len() {
            self.refill(slot, self.since)?;
        }
        self.lane.submit()?;
        let mut done = Vec::with_capacity(self.slots.len());
        while self.in_flight > 0 {
            let now = self.wait(&mut done)?;
            self.advance(now)?;
            let before = self.in_flight;
            for &(slot, result) in &done {
                self.complete(slot, result, now)?;
            }
            if self.in_flight + done.len() > before {
                self.lane.submit()?;
            }
        }
        if self.phase == Phase::Measured {
            self.end_measuring(Instant::now())?;
        }
        self.seen.complete = self.plan.is_complete();
        self.read_back()?;
        Ok(self.seen.clone())
    }

    /// Polls until something has completed.
    fn wait(&mut self, done: &mut Vec<(usize, i32)>) -> io::Result<Instant> {
        done.clear();
        let mut turns = 0;
        let mut begin = None;
        loop {
            self.lane.reap(done)?;
            if !done.is_empty() {
                return Ok(Instant::now());
            }
            std::hint::spin_loop();
            turns += 1;
            if self.run.crowded && turns % CROWDED_TURNS == 0 {
                std::thread::yield_now();
            }
            if turns % TURNS == 0 && begin.get_or_insert_with(Instant::now).elapsed() > STALL {
                let left = self.in_flight;
                return Err(io::Error::other(format!("{left} requests do not complete")));
            }
        }
    }

    /// Goes to the next phase when it is time.
    fn advance(&mut self, now: Instant) -> io::Result<()> {
        let elapsed = now - self.since;
        if self.run.workload.is_finite() {
            return Ok(());
        }
        if self.phase == Phase::WarmUp && elapsed >= self.run.times.warm_up {
            self.begin_measuring()?;
        } else if self.phase == Phase::Measured && elapsed >= self.run.times.measured {
            self.end_measuring(now)?;
        }
        Ok(())
    }

    /// From here on requests count.
    fn begin_measuring(&mut self) -> io::Result<()> {
        self.phase = Phase::Measured;
        if self.probes {
            self.seen.probed = (self.run.probe)()?;
        }
        self.since = Instant::now();
        Ok(())
    }

    /// Nothing counts any more.
    fn end_measuring(&mut self, now: Instant) -> io::Result<()> {
        self.phase = Phase::Draining;
        let measured = now - self.since;
        self.seen.seconds = measured.as_secs_f64();
        self.seen.slices.resize(slices_in(measured), 0);
        if self.probes {
            self.seen.probed = (self.run.probe)()?.saturating_sub(self.seen.probed);
        }
        Ok(())
    }

    /// Takes the result of a request and gives its slot the next one.
    fn complete(&mut self, slot: usize, result: i32, now: Instant) -> io::Result<()> {
        let Some((op, begin)) = self.slots.get_mut(slot).and_then(Option::take) else {
            return Err(io::Error::other(format!("slot {slot} completed without a request")));
        };
        self.in_flight -= 1;
        if result != 0 {
            let error = io::Error::from_raw_os_error(-result);
            return Err(io::Error::other(format!("{op:?}: {error}")));
        }
        if self.phase == Phase::Measured {
            self.seen.requests += 1;
            let slice = slices_in(now.saturating_duration_since(self.since));
            if slice >= self.seen.slices.len() {
                self.seen.slices.resize(slice + 1, 0);
            }
            self.seen.slices[slice] += 1;
            let taken = now.saturating_duration_since(begin).as_nanos();
            self.seen.latencies.add(u64::try_from(taken).unwrap_or(u64::MAX));
        }
        match op {
            Op::Read(offset) => {
                let warm_up = self.phase == Phase::WarmUp;
                if warm_up || self.seen.requests.is_multiple_of(CHECK_EVERY) {
                    let block = self.run.workload.block;
                    check(self.memory, slot * block, block, offset, warm_up, None)?;
                }
            }
            Op::Write(offset) => {
                self.written.push_back(offset);
                if self.written.len() > READ_BACK {
                    self.written.pop_front();
                }
            }
            Op::Flush => {}
        }
        self.refill(slot, now)
    }

    /// Queues the next request in `slot`, if there is one.
    fn refill(&mut self, slot: usize, now: Instant) -> io::Result<()> {
        let over = match self.phase {
            Phase::WarmUp => false,
            Phase::Measured => now - self.since >= self.run.times.measured,
            Phase::Draining => true,
        };
        let Some(op) = self.plan.next(over) else { return Ok(()) };
        if let Op::Write(offset) = op {
            let block = self.run.workload.block;
            stamp(self.memory, slot * block, block, offset, self.run.generation);
        }
        self.slots[slot] = Some((op, now));
        self.in_flight += 1;
        self.lane.push(op, slot)
    }

    /// Reads the last written blocks and compares them.
    fn read_back(&mut self) -> io::Result<()> {
        let block = self.run.workload.block;
        let mut done = Vec::new();
        while let Some(offset) = self.written.pop_front() {
            self.in_flight = 1;
            // Whatever was in the buffer must not pass for the answer.
            for at in (0..block).step_by(8) {
                self.memory.set_word(at, 0);
            }
            self.lane.push(Op::Read(offset), 0)?;
            self.lane.submit()?;
            self.wait(&mut done)?;
            if done[..] != [(0, 0)] {
                return Err(io::Error::other(format!("read back {offset:#x}: {done:?}")));
            }
            check(self.memory, 0, block, offset, false, Some(self.run.generation))?;
        }
        Ok(())
    }
}
