//! The ring of packet areas and its drain lease; layout, states and rules of `nebula_mp.shm_ring`, with atomic
//! instructions: head and tail are stored with Release and loaded with Acquire, the lease is taken by
//! compare-and-swap. A Python producer or consumer may be at the other end.
//!
//! Knows areas, entries and whose bytes are whose; the order of loads and stores is that of `cursors`. An area's bytes are
//! the producer's alone until head has passed it, and nobody writes them from then on until tail has.

use std::borrow::Cow;
use std::fmt::Display;
use std::sync::atomic::Ordering::Relaxed;

use crate::cursors::{Draining, Filling, Part, RingWords, ENTRIES_MAX};
use crate::error::{Fault, Result};
use crate::layout::{HEAD, LEASE, PROGRESS, TAIL};
use crate::region::{Region, PAGE_BYTES};
use crate::words::Word;

/// What released areas are overwritten with in tests.
pub const POISON: u8 = 0xDD;

const AREAS_MAX: u64 = 4096;
const AREA_HEADER_BYTES: usize = 64;
const ENTRY_BYTES: usize = 16;
const COUNT: usize = 0; // word indexes within an area
const NUMBER: usize = 1;
const TABLE: usize = AREA_HEADER_BYTES / 8;

/// Bytes of an area that belong together; `offset` counts from the area's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Entry {
    pub offset: u32,
    pub length: u32,
    pub segment: u32,
    pub row: u32,
}

/// What a successor of the consumer does with the area it finds half drained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// The receiver recognises copies.
    SendAgain,
    /// Nothing is delivered twice; one entry, with all its packets, may be lost.
    GoOnBehind,
}

/// The ring's sizes, as its header states them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Geometry {
    pub areas: usize,
    pub area_bytes: usize,
    pub entries_max: usize,
}

impl Geometry {
    /// Where in an area the data begin.
    pub fn data_offset(&self) -> usize {
        AREA_HEADER_BYTES + ENTRY_BYTES * self.entries_max
    }

    /// Room for data in an area.
    #[inline]
    pub fn data_bytes(&self) -> usize {
        self.area_bytes - self.data_offset()
    }

    /// Size of the data region.
    pub fn region_bytes(&self) -> usize {
        PAGE_BYTES + self.areas * self.area_bytes
    }

    /// Sizes of the ring, if one with them can exist and fills `region_bytes`.
    fn of(areas: u64, area_bytes: u64, entries_max: u64, region_bytes: u64) -> Option<Self> {
        let is_possible = (1..=AREAS_MAX).contains(&areas)
            && (1..=ENTRIES_MAX as u64).contains(&entries_max)
            && area_bytes % 64 == 0
            && area_bytes > AREA_HEADER_BYTES as u64 + ENTRY_BYTES as u64 * entries_max
            && areas
                .checked_mul(area_bytes)
                .and_then(|all| all.checked_add(PAGE_BYTES as u64))
                == Some(region_bytes);
        is_possible.then_some(Self {
            areas: areas as usize,
            area_bytes: area_bytes as usize,
            entries_max: entries_max as usize,
        })
    }
}

/// Both regions, and where things lie in them.
struct End {
    data: Region,
    state: Region,
    geometry: Geometry,
}

impl End {
    fn new(data: Region, state: Region) -> Result<Self> {
        let [areas, area_bytes, entries_max, _] = *data.parameters();
        let size_bytes = data.size() as u64;
        let Some(geometry) = Geometry::of(areas, area_bytes, entries_max, size_bytes) else {
            let found = format!("{:?}", (areas, area_bytes, entries_max));
            let expected = format!("one that fills {size_bytes} bytes");
            return Err(data.contradiction("geometry", found, expected));
        };
        if state.size() != PAGE_BYTES {
            return Err(state.contradiction("size", state.size(), PAGE_BYTES));
        }
        if state.generation() != data.generation() {
            let expected = format!("{} as in the data", data.generation());
            return Err(state.contradiction("generation", state.generation(), expected));
        }
        Ok(Self {
            data,
            state,
            geometry,
        })
    }

    /// Offset of the area at `place`.
    #[inline]
    fn area(&self, place: usize) -> usize {
        PAGE_BYTES + place * self.geometry.area_bytes
    }

    /// Index of the first of the two words of an entry of that area.
    #[inline]
    fn entry(&self, place: usize, number: usize) -> usize {
        self.area(place) / 8 + TABLE + ENTRY_BYTES / 8 * number
    }
}

impl RingWords for End {
    #[inline]
    fn head(&self) -> impl Word {
        self.data.word(HEAD)
    }

    #[inline]
    fn tail(&self) -> impl Word {
        self.state.word(TAIL)
    }

    #[inline]
    fn lease(&self) -> impl Word {
        self.state.word(LEASE)
    }

    #[inline]
    fn progress(&self) -> impl Word {
        self.state.word(PROGRESS)
    }

    #[inline]
    fn count(&self, place: usize) -> impl Word {
        self.data.word(self.area(place) / 8 + COUNT)
    }

    #[inline]
    fn number(&self, place: usize) -> impl Word {
        self.data.word(self.area(place) / 8 + NUMBER)
    }

    fn contradiction(
        &self,
        of: Part,
        field: impl Into<Cow<'static, str>>,
        value: impl Display,
        expected: impl Display,
    ) -> Fault {
        match of {
            Part::Data => self.data.contradiction(field, value, expected),
            Part::State => self.state.contradiction(field, value, expected),
        }
    }
}

/// The filling side; one process at a time. `try_begin`, fill `data`, `try_append`, `publish`.
///
/// Making one is also how a successor attaches: it goes on at head. After a fault it may not be used again.
pub struct Producer {
    end: End,
    cursor: Filling,
    poison: bool,
    /// Entries of the area being filled, if one is.
    count: Option<usize>,
    /// Bytes of data up to the last described one.
    used: usize,
}

impl Producer {
    /// Attach; `data` is writable. `poison`: overwrite released areas with 0xDD, for tests.
    pub fn new(data: Region, state: Region, poison: bool) -> Result<Self> {
        assert!(data.is_writable());
        let end = End::new(data, state)?;
        let cursor = Filling::attach(&end, end.geometry.areas)?;
        let (head, free) = (cursor.head(), end.geometry.areas as u64);
        let mut producer = Self {
            end,
            cursor,
            poison,
            count: None,
            used: 0,
        };
        let free = free - (head - producer.cursor.tail());
        producer.poison_areas(head, free);
        Ok(producer)
    }

    /// Sizes.
    #[inline]
    pub fn geometry(&self) -> Geometry {
        self.end.geometry
    }

    /// Number of the area that is, or would be, filled.
    #[inline]
    pub fn head(&self) -> u64 {
        self.cursor.head()
    }

    /// Start on the next area; false, and nothing changed, when all are taken. Before `publish` it starts the same area
    /// again.
    pub fn try_begin(&mut self) -> Result<bool> {
        self.end.data.check_generation()?;
        let before = self.cursor.tail();
        let is_free = self.cursor.try_begin(&self.end)?;
        self.poison_areas(before, self.cursor.tail() - before);
        if is_free {
            self.count = Some(0);
            self.used = 0;
        }
        Ok(is_free)
    }

    /// The data of the area being filled.
    #[inline]
    pub fn data(&mut self) -> &mut [u8] {
        assert!(self.count.is_some(), "try_begin first");
        let at = self.end.area(self.cursor.place(self.cursor.head()));
        let (first, length) = (
            self.end.geometry.data_offset(),
            self.end.geometry.data_bytes(),
        );
        // SAFETY: the area is ours alone from `try_begin` to `publish`, which needs self again.
        unsafe { self.end.data.slice_mut(at + first, length) }
    }

    /// Describe `length` bytes at `offset` of `data`; false, and nothing changed, with a full table.
    #[inline]
    pub fn try_append(&mut self, offset: usize, length: usize, segment: u32, row: u32) -> bool {
        let room = self.end.geometry.data_bytes();
        assert!(offset < room && 0 < length && length <= room - offset);
        let count = self.count.expect("try_begin first");
        if count == self.end.geometry.entries_max {
            return false;
        }
        let at = self.end.entry(self.cursor.place(self.cursor.head()), count);
        let place = offset as u64 | (length as u64) << 32;
        self.end.data.word(at).store(place, Relaxed);
        let meaning = u64::from(segment) | u64::from(row) << 32;
        self.end.data.word(at + 1).store(meaning, Relaxed);
        self.count = Some(count + 1);
        self.used = self.used.max(offset + length);
        true
    }

    /// Let the entry described last, of `length` bytes at `offset`, have `more`.
    #[inline]
    pub fn extend(&mut self, offset: usize, length: usize, more: usize) {
        let room = self.end.geometry.data_bytes();
        assert!(offset < room && length <= room - offset && more <= room - offset - length);
        let count = self.count.unwrap_or(0);
        assert!(count > 0, "nothing to extend");
        let at = self
            .end
            .entry(self.cursor.place(self.cursor.head()), count - 1);
        let place = offset as u64 | ((length + more) as u64) << 32;
        self.end.data.word(at).store(place, Relaxed);
        self.used = self.used.max(offset + length + more);
    }

    /// Copy `packet` behind what is there; false, and nothing changed, when bytes or table are full.
    pub fn try_add(&mut self, packet: &[u8], segment: u32, row: u32) -> bool {
        let at = self.used;
        let room = self.end.geometry.data_bytes() - at;
        if packet.len() > room || !self.try_append(at, packet.len(), segment, row) {
            return false;
        }
        self.data()[at..at + packet.len()].copy_from_slice(packet);
        true
    }

    /// Hand the area, which has an entry at least, to the consumer. Then drain it or ring.
    #[inline]
    pub fn publish(&mut self) {
        let count = self.count.take().unwrap_or(0);
        assert!(count > 0, "nothing to publish");
        self.cursor.publish(&self.end, count);
    }

    /// Areas published and not yet released; above 0 after a pass without the lease: ring the bell.
    pub fn waiting(&mut self) -> Result<u64> {
        let before = self.cursor.tail();
        let waiting = self.cursor.waiting(&self.end)?;
        self.poison_areas(before, self.cursor.tail() - before);
        Ok(waiting)
    }

    #[inline]
    fn poison_areas(&mut self, first: u64, count: u64) {
        if self.poison {
            for number in first..first.saturating_add(count) {
                let at = self.end.area(self.cursor.place(number));
                let length = self.end.geometry.area_bytes;
                // SAFETY: tail has passed the area, and we do not fill it: it is nobody else's.
                unsafe { self.end.data.slice_mut(at, length) }.fill(POISON);
            }
        }
    }
}

/// The draining side.
///
/// With a lease everything but `try_take` is between it and `drop_lease`. Drain: while `pending()`: `load`, then for each
/// `entry` make the system call, then `release`. Making one is also how a successor attaches: it goes on at tail. After a
/// fault it may not be used again.
pub struct Consumer {
    end: End,
    cursor: Draining,
    segments: bool,
    /// Packets of an entry; none would be missing in the sums of counters.
    least: u32,
    rows: usize,
    /// Of the area in hand, copied and checked.
    entries: Vec<Entry>,
    /// How many of them were given out, or are not to be.
    given: usize,
    resumed: u64,
}

impl Consumer {
    /// Attach; `state` is writable. `holder` is this process's lease word (`shm_ring.holder_word`), or None for a ring
    /// whose consumer never changes. `segments`: an entry's `segment` is a size, at most its length, or with
    /// `GoOnBehind` a number of packets, 1 and up; without, the caller checks what it is. `rows` as in Python.
    pub fn new(
        data: Region,
        state: Region,
        holder: Option<u64>,
        recovery: Recovery,
        segments: bool,
        rows: usize,
    ) -> Result<Self> {
        assert!(state.is_writable());
        assert!(holder != Some(0), "0 is nobody");
        let end = End::new(data, state)?;
        let goes_on = recovery == Recovery::GoOnBehind;
        let cursor = Draining::attach(&end, end.geometry.areas, holder, goes_on)?;
        Ok(Self {
            entries: Vec::with_capacity(end.geometry.entries_max),
            end,
            cursor,
            segments,
            least: u32::from(goes_on),
            rows,
            given: 0,
            resumed: 0,
        })
    }

    /// Sizes.
    #[inline]
    pub fn geometry(&self) -> Geometry {
        self.end.geometry
    }

    /// Become the consumer; false when another process is. Never waits.
    #[inline]
    pub fn try_take(&mut self) -> bool {
        self.entries.clear();
        self.cursor.try_take(&self.end)
    }

    /// Let the other process drain; true when areas are left: then ring the bell.
    #[inline]
    pub fn drop_lease(&mut self) -> Result<bool> {
        self.end.data.check_generation()?;
        self.cursor.drop_lease(&self.end)
    }

    /// Areas that are ready. Only while we are the consumer.
    #[inline]
    pub fn pending(&mut self) -> Result<u64> {
        self.end.data.check_generation()?;
        self.cursor.pending(&self.end)
    }

    /// Copy and check the entries of the oldest ready area into `self`; gives how many of them a predecessor had begun
    /// (0 unless `GoOnBehind`), which are to be passed over, and are counted in `resumed`. `pending()` was above 0.
    pub fn load(&mut self) -> Result<usize> {
        self.entries.clear();
        let count = self
            .cursor
            .entries(&self.end, self.end.geometry.entries_max)?;
        let first = self.end.entry(self.cursor.place(), 0);
        for number in 0..count {
            let at = first + ENTRY_BYTES / 8 * number;
            let place = self.end.data.word(at).load(Relaxed);
            let meaning = self.end.data.word(at + 1).load(Relaxed);
            let entry = Entry {
                offset: place as u32,
                length: (place >> 32) as u32,
                segment: meaning as u32,
                row: (meaning >> 32) as u32,
            };
            if let Err(fault) = self.check(&entry) {
                self.entries.clear();
                return Err(fault);
            }
            self.entries.push(entry);
        }
        let begun = match self.cursor.begun(&self.end, count) {
            Ok(begun) => begun,
            Err(fault) => {
                self.entries.clear();
                return Err(fault);
            }
        };
        if begun > 0 {
            let packets = if self.segments {
                self.entries[begun - 1].segment
            } else {
                1
            };
            self.resumed = self.resumed.wrapping_add(u64::from(packets));
        }
        self.given = begun;
        Ok(begun)
    }

    /// How many entries `load` found.
    #[inline]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Entry `number` and its bytes, which are the kernel's and ours until `release`. With `GoOnBehind` it is noted as
    /// begun before this returns. Ask for the next one when the system call on the last has returned.
    #[inline]
    pub fn entry(&mut self, number: usize) -> (Entry, &[u8]) {
        let entry = self.entries[number];
        self.cursor.begin(&self.end, number);
        self.given = number + 1;
        let data = self.end.area(self.cursor.place()) + self.end.geometry.data_offset();
        let at = data + entry.offset as usize;
        // SAFETY: the producer writes nothing here until `release`, which needs self again; `check` has found it to
        // be within the area.
        let bytes = unsafe { self.end.data.slice(at, entry.length as usize) };
        (entry, bytes)
    }

    /// Give the area back, after the last system call on it has returned.
    #[inline]
    pub fn release(&mut self) -> Result<()> {
        assert!(!self.entries.is_empty(), "load first");
        assert!(
            self.given == self.entries.len(),
            "a system call on this area has not returned"
        );
        self.cursor.release(&self.end)?;
        self.entries.clear();
        Ok(())
    }

    /// Packets in entries that were passed over, since a predecessor had begun them: perhaps lost. Only grows.
    #[inline]
    pub fn resumed(&self) -> u64 {
        self.resumed
    }

    #[inline]
    fn check(&self, entry: &Entry) -> Result<()> {
        let Entry {
            offset,
            length,
            segment,
            row,
        } = *entry;
        let all = self.end.geometry.data_bytes();
        let room = all.saturating_sub(offset as usize);
        let bad =
            |field, value: u32, expected| Err(self.cursor.bad(&self.end, field, value, expected));
        if room == 0 {
            return bad("offset", offset, format!("below {all}"));
        }
        if length == 0 || length as usize > room {
            return bad("length", length, format!("1..{room} at {offset}"));
        }
        if self.segments && !(self.least..=length).contains(&segment) {
            return bad("segment", segment, format!("{}..{length}", self.least));
        }
        if row as usize >= self.rows {
            return bad("row", row, format!("below {}", self.rows));
        }
        Ok(())
    }
}

#[cfg(all(test, not(miri)))]
mod tests;
