//! A reader's side of the table of paths through relays; as `nebula_mp.shm_relays`.
//!
//! Knows which path a relay frame is of, and when to trust a row; knows nothing of frames. A row is read under its
//! sequence number: even, copy, the same number again. While it is being written it is what it was before: it holds
//! no key, and the tunnels that it leads to are looked up anew for each frame.

use std::mem::offset_of;
use std::sync::atomic::{fence, Ordering};

use crate::error::Result;
use crate::layout::{copy_words, row_count, RelayRow, ROWS_AT_WORD, ROWS_MAX};
use crate::region::Region;

const WORDS: usize = size_of::<RelayRow>() / 8;
const FREE: u32 = 0;
const TERMINAL: u32 = 1;
const FORWARDING: u32 = 2;
/// No row that was read has this sequence number, since it is odd.
const UNREAD: u64 = 1;

const _: () = assert!(offset_of!(RelayRow, sequence) == 0);

/// Where the frames of a path go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leads {
    /// What they hold is for us.
    Here,
    /// Through the tunnel with this local index.
    Through(u32),
}

/// A path, as one host on it sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Path {
    /// What frames that come to us are addressed to.
    pub local_index: u32,
    /// Local index of the tunnel through which they come; those that we send on a path which ends here leave there.
    pub carrier: u32,
    /// Where they go.
    pub leads: Leads,
    /// What frames that we send are addressed to.
    pub next_index: u32,
}

/// A row as it was read.
#[derive(Debug, Clone, Copy)]
struct Known {
    sequence: u64,
    path: Option<Path>,
}

/// Paths by their local index.
pub struct RelayView {
    relays: Region,
    rows: usize,
    /// By row, as far as one that was ever written was asked for.
    known: Vec<Known>,
}

impl RelayView {
    /// Read-only.
    pub fn new(relays: Region) -> Result<Self> {
        let rows = row_count(&relays, size_of::<RelayRow>(), ROWS_MAX)?;
        Ok(Self {
            relays,
            rows,
            known: Vec::new(),
        })
    }

    /// The path with this local index, any u32; None if there is none.
    pub fn get(&mut self, index: u32) -> Result<Option<Path>> {
        let row = (index & 0xFFFF) as usize;
        if row >= self.rows {
            return Ok(None);
        }
        let sequence = self
            .relays
            .word(ROWS_AT_WORD + row * WORDS)
            .load(Ordering::Acquire);
        let path = match self.known.get(row) {
            Some(known) if known.sequence == sequence => known.path,
            // Never written: a flood of made-up indexes leaves nothing behind.
            _ if sequence == 0 => None,
            _ => self.read(row, sequence)?,
        };
        Ok(path.filter(|it| it.local_index == index))
    }

    /// Read a row that has changed, if it is whole; gives what is known of it.
    #[cold]
    fn read(&mut self, row: usize, sequence: u64) -> Result<Option<Path>> {
        if self.known.len() <= row {
            let unread = Known {
                sequence: UNREAD,
                path: None,
            };
            self.known.resize(row + 1, unread);
        }
        let word = ROWS_AT_WORD + row * WORDS;
        let copied = RelayRow::from_words(copy_words(&self.relays, word));
        fence(Ordering::Acquire);
        let after = self.relays.word(word).load(Ordering::Relaxed);
        if sequence & 1 == 0 && after == sequence {
            let path = self.path(&copied)?;
            self.known[row] = Known { sequence, path };
        }
        Ok(self.known[row].path)
    }

    fn path(&self, row: &RelayRow) -> Result<Option<Path>> {
        let leads = match row.kind {
            FREE => return Ok(None),
            TERMINAL => Leads::Here,
            FORWARDING => Leads::Through(row.next_tunnel),
            other => {
                return Err(self
                    .relays
                    .contradiction("kind of a path", other, "0, 1 or 2"))
            }
        };
        Ok(Some(Path {
            local_index: row.local_index,
            carrier: row.carrier,
            leads,
            next_index: row.next_index,
        }))
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::layout::{RELAYS, ROWS_AT};
    use crate::testing::Memory;

    const ROWS: usize = 4;
    const INDEX: u32 = 0xAAAA_0002;

    fn memory() -> (Memory, RelayView) {
        let size = ROWS_AT + ROWS * size_of::<RelayRow>();
        let memory = Memory::new(&RELAYS, size, &[ROWS as u64]);
        let view = RelayView::new(memory.read_only()).unwrap();
        (memory, view)
    }

    fn write(memory: &Memory, sequence: u64, fields: [u32; 5]) {
        let at = ROWS_AT + 2 * size_of::<RelayRow>();
        memory.patch(at, &sequence.to_le_bytes());
        for (number, field) in fields.iter().enumerate() {
            memory.patch(at + 8 + 4 * number, &field.to_le_bytes());
        }
    }

    const ENDS: [u32; 5] = [INDEX, 0xBEEF_0001, 1, 0, 7];
    const PASSES: [u32; 5] = [INDEX, 0xBEEF_0001, 2, 0xCAFE_0003, 8];

    fn path(leads: Leads, next_index: u32) -> Option<Path> {
        Some(Path {
            local_index: INDEX,
            carrier: 0xBEEF_0001,
            leads,
            next_index,
        })
    }

    #[test]
    fn a_path_is_found_by_its_whole_index_and_as_it_was_written_last() {
        let (memory, mut view) = memory();
        assert_eq!(view.get(INDEX), Ok(None));
        write(&memory, 2, ENDS);
        assert_eq!(view.get(INDEX), Ok(path(Leads::Here, 7)));
        for other in [INDEX ^ 1, INDEX ^ 0x1_0000, 0, 2, ROWS as u32, u32::MAX] {
            assert_eq!(view.get(other), Ok(None), "{other:x}");
        }
        write(&memory, 4, PASSES);
        assert_eq!(view.get(INDEX), Ok(path(Leads::Through(0xCAFE_0003), 8)));
        write(&memory, 6, [0; 5]);
        assert_eq!(view.get(INDEX), Ok(None));
        assert_eq!(view.get(0), Ok(None));
    }

    #[test]
    fn a_row_that_is_being_written_is_what_it_was_before() {
        let (memory, mut view) = memory();
        write(&memory, 1, PASSES);
        assert_eq!(view.get(INDEX), Ok(None), "nothing");
        write(&memory, 2, ENDS);
        assert_eq!(view.get(INDEX), Ok(path(Leads::Here, 7)));
        write(&memory, 3, PASSES);
        assert_eq!(view.get(INDEX), Ok(path(Leads::Here, 7)));
        write(&memory, 4, PASSES);
        assert_eq!(view.get(INDEX), Ok(path(Leads::Through(0xCAFE_0003), 8)));
    }

    #[test]
    fn a_kind_that_nobody_writes_is_a_contradiction() {
        let (memory, mut view) = memory();
        write(&memory, 2, [INDEX, 0, 3, 0, 0]);
        let said = view.get(INDEX).unwrap_err().to_string();
        assert_eq!(
            said,
            "shared memory 'relays': kind of a path is 3, expected 0, 1 or 2"
        );
    }
}
