//! Which counters of a tunnel were already received; the state and rules of `nebula_mp.crypto.replay`.
//!
//! Knows numbers only. An unauthenticated counter may be checked, never updated with. Works on memory that outlives
//! its process (see `windows`): the highest counter accepted, 0 before the first, then a ring of `2 * WIDTH` bits, in
//! which counter n is bit n mod 64 of word n div 64, which is bit n mod 8 of byte n div 8, modulo the size of the ring.
//! The ring is twice as large as the window, so moving forward clears whole bytes.
//!
//! One process at a time may update a window. A process that dies inside `update` leaves a window that refuses all it
//! refused before, and perhaps counters that were not yet cleared; it never accepts one again.
//!
//! Source: RFC 6479; docs/wire-format.md, "Replay window".

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters a window accepts behind the highest one.
pub const WIDTH: u64 = 8192;

/// Words of a window's state: the highest counter and the bits.
pub const STATE_WORDS: usize = 1 + BITS_WORDS;

const BITS_WORDS: usize = (2 * WIDTH / 64) as usize;
const BITS_BYTES: u64 = 2 * WIDTH / 8;

/// Why a counter is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Behind the window.
    Old,
    /// It was received before.
    Seen,
}

/// A window over the words of its state, which are borrowed.
#[derive(Clone, Copy)]
pub struct ReplayWindow<'a> {
    current: &'a AtomicU64,
    bits: &'a [AtomicU64; BITS_WORDS],
}

impl<'a> ReplayWindow<'a> {
    /// Go on with the window in `state`, which has `STATE_WORDS`; None if it has not. Call `restart` before the first
    /// use of words that held no window.
    #[inline]
    pub fn over(state: &'a [AtomicU64]) -> Option<Self> {
        let (current, bits) = state.split_first()?;
        let bits = bits.try_into().ok()?;
        Some(Self { current, bits })
    }

    /// Forget everything; become a window in which 0, 1 and 2 are marked, as after a handshake.
    pub fn restart(&self) {
        for word in self.bits {
            word.store(0, Ordering::Relaxed);
        }
        self.bits[0].store(0b111, Ordering::Release);
        self.current.store(2, Ordering::Release);
    }

    /// Whether a counter would be accepted; nothing changes.
    #[inline]
    pub fn check(&self, counter: u64) -> Result<(), Refused> {
        let current = self.current.load(Ordering::Relaxed);
        if counter > current {
            return Ok(());
        }
        if current - counter >= WIDTH {
            return Err(Refused::Old);
        }
        let (word, bit) = place(counter);
        if self.bits[word].load(Ordering::Relaxed) & bit != 0 {
            return Err(Refused::Seen);
        }
        Ok(())
    }

    /// Mark the counter of an authenticated packet. One that `check` refuses changes nothing.
    #[inline]
    pub fn update(&self, counter: u64) -> Result<(), Refused> {
        let current = self.current.load(Ordering::Relaxed);
        if counter > current {
            // Move first, clear after: a jump beyond the width clears bits of the window it leaves, and a process
            // that died between the two must not leave those counters acceptable. The stores to the bits are Release
            // so that they stay behind this one.
            self.current.store(counter, Ordering::Relaxed);
            if counter >> 3 != current >> 3 {
                self.clear((current >> 3) + 1, counter >> 3);
            }
        } else {
            self.check(counter)?;
        }
        let (word, bit) = place(counter);
        let word = &self.bits[word];
        word.store(word.load(Ordering::Relaxed) | bit, Ordering::Release);
        Ok(())
    }

    /// Clear the bytes of the ring from number `first` to `last`, before the ring is wrapped around.
    #[inline]
    fn clear(&self, first: u64, last: u64) {
        if last - first >= BITS_BYTES - 1 {
            for word in self.bits {
                word.store(0, Ordering::Release);
            }
            return;
        }
        let (low, high) = (first >> 3, last >> 3);
        for number in low..=high {
            let mut cleared = u64::MAX;
            if number == low {
                cleared &= u64::MAX << (8 * (first & 7));
            }
            if number == high {
                cleared &= u64::MAX >> (8 * (7 - (last & 7)));
            }
            let word = &self.bits[number as usize % BITS_WORDS];
            word.store(word.load(Ordering::Relaxed) & !cleared, Ordering::Release);
        }
    }
}

/// Which word a counter's bit is in, and the bit.
#[inline]
fn place(counter: u64) -> (usize, u64) {
    ((counter >> 6) as usize % BITS_WORDS, 1 << (counter & 63))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    fn state() -> Vec<AtomicU64> {
        let state: Vec<AtomicU64> = (0..STATE_WORDS).map(|_| AtomicU64::new(u64::MAX)).collect();
        ReplayWindow::over(&state).unwrap().restart();
        state
    }

    fn values(state: &[AtomicU64]) -> Vec<u64> {
        state
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect()
    }

    /// Python's `ReplayWindow`, byte by byte.
    struct Model {
        current: u64,
        bits: Vec<u8>,
    }

    impl Model {
        fn new() -> Self {
            let mut bits = vec![0; BITS_BYTES as usize];
            bits[0] = 0b111;
            Self { current: 2, bits }
        }

        fn update(&mut self, counter: u64) -> Result<(), Refused> {
            let mask = BITS_BYTES - 1;
            let byte = counter >> 3;
            if counter <= self.current {
                if i128::from(counter) <= i128::from(self.current) - i128::from(WIDTH) {
                    return Err(Refused::Old);
                }
                if self.bits[(byte & mask) as usize] >> (counter & 7) & 1 != 0 {
                    return Err(Refused::Seen);
                }
            } else {
                let fresh = (byte - (self.current >> 3)).min(mask + 1);
                for behind in 0..fresh {
                    self.bits[((byte - behind) & mask) as usize] = 0;
                }
                self.current = counter;
            }
            self.bits[(byte & mask) as usize] |= 1 << (counter & 7);
            Ok(())
        }

        fn words(&self) -> Vec<u64> {
            let bits = self.bits.chunks(8);
            let bits = bits.map(|each| u64::from_le_bytes(each.try_into().unwrap()));
            std::iter::once(self.current).chain(bits).collect()
        }
    }

    #[test]
    fn after_a_handshake_its_counters_and_0_are_marked() {
        let state = state();
        let window = ReplayWindow::over(&state).unwrap();
        for counter in 0..3 {
            assert_eq!(window.check(counter), Err(Refused::Seen));
        }
        assert_eq!(window.check(3), Ok(()));
        assert_eq!(values(&state), Model::new().words());
    }

    #[test]
    fn a_counter_is_accepted_once() {
        let state = state();
        let window = ReplayWindow::over(&state).unwrap();
        assert_eq!(window.update(3), Ok(()));
        assert_eq!(window.update(3), Err(Refused::Seen));
        assert_eq!(window.update(10_000), Ok(()));
        assert_eq!(window.update(9_999), Ok(()));
        assert_eq!(window.update(10_000 - WIDTH + 1), Ok(()));
        assert_eq!(window.update(10_000 - WIDTH), Err(Refused::Old));
    }

    #[test]
    fn a_check_changes_nothing_and_neither_does_a_refused_update() {
        let state = state();
        let window = ReplayWindow::over(&state).unwrap();
        window.update(20_000).unwrap();
        let before = values(&state);
        assert_eq!(window.check(20_001), Ok(()));
        assert_eq!(window.check(20_000), Err(Refused::Seen));
        assert_eq!(window.update(20_000), Err(Refused::Seen));
        assert_eq!(window.update(4_000), Err(Refused::Old));
        assert_eq!(values(&state), before);
    }

    #[test]
    fn the_highest_counters_there_are_do_not_wrap() {
        let state = state();
        let window = ReplayWindow::over(&state).unwrap();
        assert_eq!(window.update(u64::MAX), Ok(()));
        assert_eq!(window.update(u64::MAX), Err(Refused::Seen));
        assert_eq!(window.update(u64::MAX - WIDTH + 1), Ok(()));
        assert_eq!(window.check(u64::MAX - WIDTH), Err(Refused::Old));
        assert_eq!(window.check(0), Err(Refused::Old));
    }

    #[test]
    fn a_death_between_moving_and_clearing_leaves_nothing_acceptable_again() {
        let state = state();
        let window = ReplayWindow::over(&state).unwrap();
        for counter in 3..5_000 {
            window.update(counter).unwrap();
        }
        // What is stored first.
        state[0].store(5_000 + 3 * WIDTH, Ordering::Relaxed);
        for counter in 0..5_000 {
            assert!(window.check(counter).is_err());
        }
    }

    #[test]
    fn words_of_another_number_hold_no_window() {
        let state = state();
        assert!(ReplayWindow::over(&state[1..]).is_none());
        assert!(ReplayWindow::over(&[]).is_none());
    }

    fn steps() -> impl Strategy<Value = Vec<u64>> {
        // How far to go forward or back, mostly a little, sometimes around the ring.
        let step = prop_oneof![
            6 => 0_u64..70,
            2 => 0..WIDTH + 2,
            1 => WIDTH - 1..2 * WIDTH + 140,
            1 => any::<u64>(),
        ];
        let signed = (step, any::<bool>());
        proptest::collection::vec(signed, 1..60).prop_map(|steps| {
            let mut at = 2_u64;
            let walk = |(step, back): (u64, bool)| {
                at = if back {
                    at.saturating_sub(step)
                } else {
                    at.saturating_add(step)
                };
                at
            };
            steps.into_iter().map(walk).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig {
            cases: if cfg!(miri) { 3 } else { 400 },
            failure_persistence: None,
            ..ProptestConfig::default()
        })]

        #[test]
        fn verdicts_and_state_are_pythons(counters in steps()) {
            let state = state();
            let window = ReplayWindow::over(&state).unwrap();
            let mut model = Model::new();
            let mut accepted = HashSet::new();
            for counter in counters {
                let checked = window.check(counter);
                let expected = model.update(counter);
                prop_assert_eq!(checked, expected);
                prop_assert_eq!(window.update(counter), expected);
                prop_assert_eq!(values(&state), model.words());
                prop_assert!(expected.is_err() || accepted.insert(counter));
            }
        }
    }
}
