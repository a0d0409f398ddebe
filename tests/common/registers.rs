//! Is a history of overlapping reads and writes one that a register could have?
//!
//! A sector is a register. Every operation on it takes effect at one instant between its start and
//! its end; a history is legal if there are instants at which all reads saw the value before them.
//! [`check`] sorts starts and ends and keeps every state that the register may be in: its value,
//! and which of the operations that have not ended have taken effect. It is exact: values may
//! repeat (all zeros are alike), and a discard may have an effect or none.
//!
//! Uses nothing else of `common`. Not here: how histories are made, and what bytes a value stands
//! for; a torn sector is no value at all and has no place here.

/// What an operation does to one register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Reads this value.
    Read(u64),
    /// Writes this value.
    Write(u64),
    /// Writes this value, or does nothing: a discard.
    Perhaps(u64),
}

/// One operation on one register. Times are of any clock that all operations share: what ended
/// before something else started has the smaller time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// What it does.
    pub action: Action,
    /// A time when it had not begun yet.
    pub start: u64,
    /// A time when it was over.
    pub end: u64,
}

/// A state in which the register may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct State {
    /// The value.
    value: u64,
    /// The operations under way that have taken effect, as bits of their slots.
    done: u64,
}

/// The operations that have started and not ended.
#[derive(Debug, Default)]
struct UnderWay {
    /// The operation in each slot.
    slots: Vec<Option<(usize, Action)>>,
}

impl UnderWay {
    /// Adds an operation.
    fn add(&mut self, index: usize, action: Action) {
        let free = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        assert!(free < 64, "more than 64 operations at once");
        self.slots[free] = Some((index, action));
    }

    /// Removes an operation: its slot and what it does.
    fn remove(&mut self, index: usize) -> (usize, Action) {
        let is_it = |slot: &Option<(usize, Action)>| slot.is_some_and(|(at, _)| at == index);
        let slot = self.slots.iter().position(is_it).expect("it has started");
        (slot, self.slots[slot].take().expect("just found").1)
    }

    /// The state after the operation in `slot` took effect in `state`, if it can.
    fn apply(state: State, slot: usize, action: Action) -> Option<State> {
        let done = state.done | 1 << slot;
        match action {
            Action::Read(value) => (value == state.value).then_some(State { done, ..state }),
            Action::Write(value) | Action::Perhaps(value) => Some(State { value, done }),
        }
    }
}

/// Takes every state to those in which the operation `action` of `slot` has taken effect (or had
/// its chance), with any others that are under way before it.
fn finish(states: &mut Vec<State>, under_way: &UnderWay, slot: usize, action: Action) {
    let bit = 1 << slot;
    let mut finished = Vec::new();
    let mut front = std::mem::take(states);
    while !front.is_empty() {
        let mut next = Vec::new();
        for state in front {
            if state.done & bit != 0 {
                finished.push(State { done: state.done & !bit, ..state });
                continue;
            }
            if matches!(action, Action::Perhaps(_)) {
                finished.push(state);
            }
            next.extend(UnderWay::apply(state, slot, action));
            for (other, entry) in under_way.slots.iter().enumerate() {
                let Some((_, action)) = entry else { continue };
                if state.done >> other & 1 == 0 {
                    next.extend(UnderWay::apply(state, other, *action));
                }
            }
        }
        next.sort_unstable();
        next.dedup();
        front = next;
    }
    finished.sort_unstable();
    finished.dedup();
    *states = finished;
}

/// Checks the history of one register that held `initial` before.
///
/// # Errors
/// The index of the first operation at whose end no state is left: it, or one that overlaps it or
/// came before, did what no register does.
pub fn check(initial: u64, events: &[Event]) -> Result<(), usize> {
    // Of two equal times the start comes first: they overlap then, which forbids less.
    let mut times: Vec<(u64, bool, usize)> = Vec::with_capacity(2 * events.len());
    for (index, event) in events.iter().enumerate() {
        assert!(event.start <= event.end, "{event:?} ends before it starts");
        times.push((event.start, false, index));
        times.push((event.end, true, index));
    }
    times.sort_unstable();
    let mut under_way = UnderWay::default();
    let mut states = vec![State { value: initial, done: 0 }];
    for (_, ends, index) in times {
        if !ends {
            under_way.add(index, events[index].action);
            continue;
        }
        let (slot, action) = under_way.remove(index);
        finish(&mut states, &under_way, slot, action);
        if states.is_empty() {
            return Err(index);
        }
    }
    Ok(())
}

/// Histories by hand: what must be accepted, and what must not.
#[cfg(test)]
mod tests {
    use super::Action::{Perhaps, Read, Write};
    use super::*;

    /// The history of these operations on a register that holds 0.
    fn verdict(events: &[(Action, u64, u64)]) -> Result<(), usize> {
        let event = |&(action, start, end): &(Action, u64, u64)| Event { action, start, end };
        check(0, &events.iter().map(event).collect::<Vec<_>>())
    }

    #[test]
    fn a_read_sees_the_last_write_or_one_that_overlaps() {
        assert_eq!(verdict(&[(Read(0), 0, 1)]), Ok(()));
        assert_eq!(verdict(&[(Write(1), 0, 1), (Read(1), 2, 3)]), Ok(()));
        for value in [0, 1, 2] {
            let history = [(Write(1), 0, 5), (Write(2), 2, 6), (Read(value), 1, 4)];
            assert_eq!(verdict(&history), Ok(()), "{value}");
        }
        let both = [(Write(1), 0, 9), (Write(2), 0, 9), (Read(2), 1, 2), (Read(1), 3, 4)];
        assert_eq!(verdict(&both), Ok(()));
    }

    #[test]
    fn a_stale_read_is_refused() {
        assert_eq!(verdict(&[(Write(1), 0, 1), (Read(0), 2, 3)]), Err(1));
        // Once a reader has seen the new value nobody sees the old one, the write still under way.
        assert_eq!(verdict(&[(Write(1), 0, 9), (Read(1), 1, 2), (Read(0), 3, 4)]), Err(2));
        // Overwritten between.
        let history = [(Write(1), 0, 1), (Write(2), 2, 3), (Read(1), 4, 5)];
        assert_eq!(verdict(&history), Err(2));
    }

    #[test]
    fn a_lost_write_is_refused() {
        // The second write is gone again once it was seen, and nobody wrote the first again.
        let history = [(Write(1), 0, 4), (Write(2), 1, 5), (Read(2), 6, 7), (Read(1), 8, 9)];
        assert_eq!(verdict(&history), Err(3));
        assert_eq!(verdict(&[(Write(1), 0, 1), (Write(0), 2, 3), (Read(1), 4, 5)]), Err(2));
    }

    #[test]
    fn a_value_that_nobody_wrote_or_not_yet_is_refused() {
        assert_eq!(verdict(&[(Write(1), 0, 1), (Read(7), 0, 3)]), Err(1));
        assert_eq!(verdict(&[(Read(1), 0, 1), (Write(1), 2, 3)]), Err(0));
    }

    #[test]
    fn two_readers_must_agree_on_the_order_of_two_writes() {
        let writes = [(Write(1), 0, 9), (Write(2), 0, 9)];
        let reads = [(Read(1), 1, 2), (Read(2), 3, 4), (Read(1), 5, 6)];
        assert_eq!(verdict(&[&writes[..], &reads].concat()), Err(4));
        assert_eq!(verdict(&[&writes[..], &reads[..2]].concat()), Ok(()));
    }

    #[test]
    fn equal_values_may_come_from_any_of_their_writers() {
        let zeroed_twice = [
            (Write(1), 0, 1),
            (Write(0), 2, 9),
            (Read(0), 3, 4),
            (Write(2), 5, 6),
            (Read(0), 7, 8),
        ];
        // One zeroing cannot come both before and after the write of 2.
        assert_eq!(verdict(&zeroed_twice), Err(4));
        let two = [&zeroed_twice[..], &[(Write(0), 2, 9)]].concat();
        assert_eq!(verdict(&two), Ok(()));
    }

    #[test]
    fn a_discard_leaves_the_value_or_zeros_and_stays_with_it() {
        let discarded = [(Write(1), 0, 1), (Perhaps(0), 2, 3)];
        for reads in [[0, 0], [1, 1]] {
            let reads = [(Read(reads[0]), 4, 5), (Read(reads[1]), 6, 7)];
            assert_eq!(verdict(&[&discarded[..], &reads].concat()), Ok(()));
        }
        for reads in [[0, 1], [1, 0]] {
            let reads = [(Read(reads[0]), 4, 5), (Read(reads[1]), 6, 7)];
            assert_eq!(verdict(&[&discarded[..], &reads].concat()), Err(3));
        }
    }
}
