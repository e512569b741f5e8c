//! The replay windows in shared memory; as `nebula_mp.shm_counters.ReceiveWindows`.
//!
//! Knows that a row is used by one tunnel after another, told apart by generation. Its reader stores the state first
//! and the generation after it: one that died between the two leaves a window that is begun again. A window is never
//! given an earlier generation, or all it has seen would be forgotten.

use std::mem::offset_of;
use std::sync::atomic::Ordering;

use crate::error::Result;
use crate::layout::{row_count, WindowRow, ROWS_AT_WORD, ROWS_MAX};
use crate::region::Region;
use crate::replay::{Refused, ReplayWindow, STATE_WORDS};

const WORDS: usize = size_of::<WindowRow>() / 8;
const GENERATION: usize = offset_of!(WindowRow, generation) / 8;
const STATE: usize = offset_of!(WindowRow, current) / 8;

const _: () = assert!(STATE + STATE_WORDS == WORDS);

/// For the reader that owns the tunnels it asks for.
pub struct ReceiveWindows {
    windows: Region,
    rows: usize,
}

/// The window of one tunnel; borrowed for the packet in hand.
pub struct Window<'a> {
    window: ReplayWindow<'a>,
}

impl ReceiveWindows {
    /// Writable.
    pub fn new(windows: Region) -> Result<Self> {
        assert!(windows.is_writable());
        let rows = row_count(&windows, size_of::<WindowRow>(), ROWS_MAX)?;
        Ok(Self { windows, rows })
    }

    /// The window of this tunnel, begun on first use; None when the row holds a later tunnel, or there is no such row.
    #[inline]
    pub fn get(&self, row: usize, generation: u64) -> Option<Window<'_>> {
        if row >= self.rows {
            return None;
        }
        let first = ROWS_AT_WORD + row * WORDS;
        let words = &self.windows.words()[first..first + WORDS];
        let window = ReplayWindow::over(&words[STATE..])?;
        let begun = words[GENERATION].load(Ordering::Acquire);
        if begun != generation {
            if begun > generation {
                return None;
            }
            window.restart();
            words[GENERATION].store(generation, Ordering::Release);
        }
        Some(Window { window })
    }
}

impl Window<'_> {
    /// Whether a counter would be accepted; nothing changes.
    #[inline]
    pub fn check(&self, counter: u64) -> std::result::Result<(), Refused> {
        self.window.check(counter)
    }

    /// Mark the counter of an authenticated packet that `check` accepted; one that it refuses changes nothing.
    #[inline]
    pub fn update(&self, counter: u64) {
        let _ = self.window.update(counter);
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::layout::{ROWS_AT, WINDOWS};
    use crate::testing::Memory;

    fn memory() -> Memory {
        Memory::new(&WINDOWS, ROWS_AT + 3 * size_of::<WindowRow>(), &[3])
    }

    #[test]
    fn a_window_is_begun_on_first_use_behind_the_handshake() {
        let memory = memory();
        let windows = ReceiveWindows::new(memory.writable()).unwrap();
        let window = windows.get(1, 4).unwrap();
        assert_eq!(window.check(2), Err(Refused::Seen));
        assert_eq!(window.check(3), Ok(()));
        assert_eq!(memory.word(ROWS_AT_WORD + WORDS + GENERATION), 4);
        assert_eq!(memory.word(ROWS_AT_WORD + WORDS + STATE), 2);
        assert_eq!(memory.word(ROWS_AT_WORD + WORDS + STATE + 1), 7);
    }

    #[test]
    fn a_successor_goes_on_with_the_window() {
        let memory = memory();
        let windows = ReceiveWindows::new(memory.writable()).unwrap();
        windows.get(1, 4).unwrap().update(9_000);
        drop(windows);

        let successor = ReceiveWindows::new(memory.writable()).unwrap();
        let window = successor.get(1, 4).unwrap();

        assert_eq!(window.check(9_000), Err(Refused::Seen));
        assert_eq!(window.check(9_000 - 8192), Err(Refused::Old));
        assert_eq!(window.check(8_999), Ok(()));
    }

    #[test]
    fn the_rows_next_tunnel_begins_anew_and_its_former_one_has_no_window_any_more() {
        let memory = memory();
        let windows = ReceiveWindows::new(memory.writable()).unwrap();
        windows.get(1, 4).unwrap().update(9_000);

        assert_eq!(windows.get(1, 5).unwrap().check(3), Ok(()));

        assert!(windows.get(1, 4).is_none());
        assert_eq!(windows.get(1, 5).unwrap().check(9_000), Ok(()));
    }

    #[test]
    fn one_tunnels_counters_say_nothing_of_its_neighbours() {
        let memory = memory();
        let windows = ReceiveWindows::new(memory.writable()).unwrap();
        for counter in [3, 8_000, 16_383, 16_384, 40_000] {
            windows.get(1, 4).unwrap().update(counter);
        }
        for row in [0, 2] {
            let at = ROWS_AT + row * size_of::<WindowRow>();
            assert!(memory
                .bytes(at, size_of::<WindowRow>())
                .iter()
                .all(|&byte| byte == 0));
        }
    }

    #[test]
    fn a_death_before_the_generation_begins_the_window_again() {
        let memory = memory();
        let windows = ReceiveWindows::new(memory.writable()).unwrap();
        windows.get(1, 4).unwrap().update(100);
        memory.patch_word(ROWS_AT_WORD + WORDS + GENERATION, 3);
        assert_eq!(windows.get(1, 4).unwrap().check(100), Ok(()));
    }

    #[test]
    fn there_is_no_window_beyond_the_table() {
        let memory = memory();
        let windows = ReceiveWindows::new(memory.writable()).unwrap();
        assert!(windows.get(3, 1).is_none());
    }

    #[test]
    fn whatever_the_state_is_it_is_a_window() {
        let memory = memory();
        let windows = ReceiveWindows::new(memory.writable()).unwrap();
        windows.get(1, 4).unwrap();
        for word in 0..STATE_WORDS {
            memory.patch_word(ROWS_AT_WORD + WORDS + STATE + word, u64::MAX);
        }
        let window = windows.get(1, 4).unwrap();
        assert_eq!(window.check(u64::MAX), Err(Refused::Seen));
        window.update(u64::MAX);
        assert_eq!(window.check(5), Err(Refused::Old));
    }
}
