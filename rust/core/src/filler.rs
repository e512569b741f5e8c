//! A producer that begins an area when there is something for it, and publishes it when it is full; as
//! `nebula_mp.datapath.filling.Filler`.

use crate::error::Result;
use crate::ring::Producer;

/// `try_room`, then fill `data` from `at` on, then `describe`; `flush` at the end of a pass.
pub struct Filler {
    /// Where the next bytes of the area belong.
    pub at: usize,
    producer: Producer,
}

impl Filler {
    /// Takes the producer over.
    pub fn new(producer: Producer) -> Self {
        Self { at: 0, producer }
    }

    /// What an empty area takes.
    pub fn room_bytes(&self) -> usize {
        self.producer.geometry().data_bytes()
    }

    /// What an empty area takes.
    pub fn entries_max(&self) -> usize {
        self.producer.geometry().entries_max
    }

    /// Number of the area that is, or would be, filled.
    pub fn area(&self) -> u64 {
        self.producer.head()
    }

    /// Whether so much fits the area being filled, beside what is described there.
    pub fn fits(&self, bytes: usize, entries: usize) -> bool {
        todo!("{bytes} {entries}")
    }

    /// Have room for so much, if need be in the next area; false, and nothing is begun, with a full ring. It must fit
    /// an empty area. `at` is then a multiple of `align`.
    pub fn try_room(&mut self, bytes: usize, entries: usize, align: usize) -> Result<bool> {
        todo!("{bytes} {entries} {align}")
    }

    /// The data of the area being filled.
    pub fn data(&mut self) -> &mut [u8] {
        self.producer.data()
    }

    /// Make an entry of `length` bytes from `at` on, for which `try_room` made room.
    pub fn describe(&mut self, length: usize, segment: u32, row: u32) {
        todo!("{length} {segment} {row}")
    }

    /// Publish the area if it has an entry; true if it had.
    pub fn flush(&mut self) -> bool {
        todo!()
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
