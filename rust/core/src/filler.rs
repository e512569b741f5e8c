//! A producer that begins an area when there is something for it, and publishes it when it is full; as
//! `nebula_mp.datapath.filling.Filler`.
//!
//! Knows where in an area there is room; knows nothing of what the bytes mean. Never waits: without room it says so.

use crate::error::Result;
use crate::ring::Producer;

/// `try_room`, then fill `data` from `at` on, then `describe`; `flush` at the end of a pass.
pub struct Filler {
    /// Where the next bytes of the area belong.
    pub at: usize,
    producer: Producer,
    room_bytes: usize,
    entries_max: usize,
    /// Described in the area being filled, if one is.
    entries: Option<usize>,
    /// What was described last in this area.
    last: Last,
}

/// An entry; of 0 bytes if there is none.
#[derive(Clone, Copy, Default)]
struct Last {
    offset: usize,
    length: usize,
    segment: u32,
    row: u32,
}

impl Filler {
    /// Takes the producer over.
    pub fn new(producer: Producer) -> Self {
        let geometry = producer.geometry();
        Self {
            at: 0,
            producer,
            room_bytes: geometry.data_bytes(),
            entries_max: geometry.entries_max,
            entries: None,
            last: Last::default(),
        }
    }

    /// What an empty area takes.
    #[inline]
    pub fn room_bytes(&self) -> usize {
        self.room_bytes
    }

    /// What an empty area takes.
    #[inline]
    pub fn entries_max(&self) -> usize {
        self.entries_max
    }

    /// Number of the area that is, or would be, filled.
    #[inline]
    pub fn area(&self) -> u64 {
        self.producer.head()
    }

    /// Whether so much fits the area being filled, beside what is described there.
    #[inline]
    pub fn fits(&self, bytes: usize, entries: usize) -> bool {
        self.entries.is_some_and(|described| {
            self.at + bytes <= self.room_bytes && described + entries <= self.entries_max
        })
    }

    /// Have room for so much, if need be in the next area; false, and nothing is begun, with a full ring. It must fit
    /// an empty area. `at` is then a multiple of `align`.
    #[inline]
    pub fn try_room(&mut self, bytes: usize, entries: usize, align: usize) -> Result<bool> {
        assert!(bytes <= self.room_bytes && entries <= self.entries_max);
        if self.entries.is_some() {
            let gap = self.at.next_multiple_of(align) - self.at;
            if self.fits(gap + bytes, entries) {
                self.at += gap;
                return Ok(true);
            }
            self.flush();
        }
        if self.entries.is_none() {
            if !self.producer.try_begin()? {
                return Ok(false);
            }
            self.entries = Some(0);
            self.last = Last::default();
            self.at = 0;
        }
        Ok(true)
    }

    /// The data of the area being filled.
    #[inline]
    pub fn data(&mut self) -> &mut [u8] {
        self.producer.data()
    }

    /// Make an entry of `length` bytes from `at` on, for which `try_room` made room.
    #[inline]
    pub fn describe(&mut self, length: usize, segment: u32, row: u32) {
        let appended = self.producer.try_append(self.at, length, segment, row);
        assert!(appended, "try_room first");
        self.entries = self.entries.map(|described| described + 1);
        self.last = Last {
            offset: self.at,
            length,
            segment,
            row,
        };
        self.at += length;
    }

    /// As `describe`, for datagrams of `segment` bytes each, of which the last may have less: as a part of the entry
    /// before, where that ends with a whole one and is for the same row.
    #[inline]
    pub fn describe_train(&mut self, length: usize, segment: u32, row: u32) {
        let last = &mut self.last;
        let step = last.segment as usize;
        let joins = last.length > 0
            && last.offset + last.length == self.at
            && last.row == row
            && (last.segment == segment || length <= step.min(segment as usize))
            && step > 0
            && last.length % step == 0;
        if joins {
            self.producer.extend(last.offset, last.length, length);
            last.length += length;
            self.at += length;
        } else {
            self.describe(length, segment, row);
        }
    }

    /// Publish the area if it has an entry; true if it had.
    #[inline]
    pub fn flush(&mut self) -> bool {
        let has_any = self.entries.is_some_and(|described| described > 0);
        if has_any {
            self.producer.publish();
            self.entries = None;
        }
        has_any
    }

    /// Whether there is a further area behind the one that is, or would be, filled.
    pub fn has_spare(&mut self) -> Result<bool> {
        let areas = self.producer.geometry().areas as u64;
        Ok(self.producer.waiting()? + 1 < areas)
    }

    /// Areas that were published and not released.
    pub fn waiting(&mut self) -> Result<u64> {
        self.producer.waiting()
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::ring::{Consumer, Entry, Recovery};
    use crate::testing::{RingMemory, SMALL};

    fn filler() -> (RingMemory, Filler, Consumer) {
        let memory = RingMemory::new(SMALL);
        let filler = Filler::new(memory.producer(true));
        let consumer = memory.consumer(Recovery::SendAgain, None);
        (memory, filler, consumer)
    }

    /// Put a packet where there is room; false with a full ring.
    fn put(filler: &mut Filler, packet: &[u8], align: usize) -> bool {
        if !filler.try_room(packet.len(), 1, align).unwrap() {
            return false;
        }
        let at = filler.at;
        filler.data()[at..at + packet.len()].copy_from_slice(packet);
        filler.describe(packet.len(), 0, 3);
        true
    }

    fn drain(consumer: &mut Consumer) -> Vec<Vec<(usize, Vec<u8>)>> {
        let mut areas = Vec::new();
        while consumer.pending().unwrap() > 0 {
            consumer.load().unwrap();
            let entries = 0..consumer.len();
            areas.push(
                entries
                    .map(|number| {
                        let (Entry { offset, .. }, data) = consumer.entry(number);
                        (offset as usize, data.to_vec())
                    })
                    .collect(),
            );
            consumer.release().unwrap();
        }
        areas
    }

    #[test]
    fn an_area_takes_what_the_geometry_says_and_nothing_is_begun_before_it_is_needed() {
        let (memory, filler, _) = filler();
        assert_eq!((filler.room_bytes(), filler.entries_max()), (320, 8));
        assert_eq!((filler.area(), filler.fits(0, 0)), (0, false));
        assert_eq!(memory.data.word(8), 0);
    }

    #[test]
    fn what_does_not_fit_goes_into_the_next_area_and_the_last_one_is_published() {
        let (_memory, mut filler, mut consumer) = filler();
        assert!(put(&mut filler, &[1; 200], 1));
        assert!(filler.fits(120, 1) && !filler.fits(121, 1));
        assert_eq!(consumer.pending(), Ok(0));

        assert!(put(&mut filler, &[2; 121], 1));

        assert_eq!((filler.area(), consumer.pending()), (1, Ok(1)));
        assert!(filler.flush());
        assert_eq!(
            drain(&mut consumer),
            [[(0, vec![1; 200])], [(0, vec![2; 121])]]
        );
    }

    #[test]
    fn a_full_table_ends_an_area_too() {
        let (_memory, mut filler, mut consumer) = filler();
        for number in 0..9 {
            assert_eq!(filler.fits(1, 1), (1..8).contains(&number));
            assert!(put(&mut filler, &[number], 1));
        }
        assert!(!filler.fits(1, 8) && filler.fits(1, 7));
        filler.flush();
        let areas = drain(&mut consumer);
        assert_eq!(areas.iter().map(Vec::len).collect::<Vec<_>>(), [8, 1]);
    }

    #[test]
    fn room_begins_where_it_was_asked_to() {
        let (_memory, mut filler, mut consumer) = filler();
        put(&mut filler, &[1; 5], 16);
        put(&mut filler, &[2; 6], 16);
        put(&mut filler, &[3; 16], 16);
        // 48 are used, and 272 are left.
        assert!(put(&mut filler, &[4; 273], 16));
        filler.flush();

        let offsets: Vec<Vec<usize>> = drain(&mut consumer)
            .iter()
            .map(|area| area.iter().map(|(offset, _)| *offset).collect())
            .collect();
        assert_eq!(offsets, [vec![0, 16, 32], vec![0]]);
    }

    #[test]
    fn a_gap_that_leaves_no_room_ends_the_area() {
        let (_memory, mut filler, mut consumer) = filler();
        put(&mut filler, &[1; 1], 1);
        put(&mut filler, &[2; 305], 16);
        assert_eq!(consumer.pending(), Ok(1));
    }

    #[test]
    fn with_a_full_ring_there_is_no_room_and_what_was_described_is_published_all_the_same() {
        let (memory, mut filler, mut consumer) = filler();
        for number in 0..4 {
            assert!(put(&mut filler, &[number; 300], 1));
        }
        assert!(!put(&mut filler, &[9; 300], 1));
        assert!(!put(&mut filler, &[9; 10], 1));
        assert!(!filler.flush());
        assert_eq!((filler.waiting(), filler.has_spare()), (Ok(4), Ok(false)));

        assert_eq!(drain(&mut consumer).len(), 4);

        assert_eq!((filler.waiting(), filler.has_spare()), (Ok(0), Ok(true)));
        assert!(put(&mut filler, &[9; 300], 1));
        assert_eq!(memory.data.word(8), 4);
    }

    #[test]
    fn an_area_without_an_entry_is_kept_for_what_comes() {
        let (_memory, mut filler, mut consumer) = filler();
        assert!(filler.try_room(10, 1, 1).unwrap());
        assert!(!filler.flush());
        assert!(put(&mut filler, b"kept", 1));
        assert!(filler.flush());
        assert!(!filler.flush());
        assert_eq!(drain(&mut consumer), [[(0, b"kept".to_vec())]]);
    }

    #[test]
    #[should_panic]
    fn what_fits_no_area_is_a_mistake_of_our_own() {
        let _ = filler().1.try_room(321, 1, 1);
    }
}
