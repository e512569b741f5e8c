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
