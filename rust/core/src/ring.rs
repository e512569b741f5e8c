//! The ring of packet areas and its drain lease; layout, states and rules of `nebula_mp.shm_ring`, with atomic
//! instructions: head and tail are stored with Release and loaded with Acquire, the lease is taken by
//! compare-and-swap. A Python producer or consumer may be at the other end.

use crate::error::Result;
use crate::region::Region;

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
    /// Nothing is delivered twice.
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
    /// Room for data in an area.
    pub fn data_bytes(&self) -> usize {
        todo!()
    }
}

/// The filling side; one process at a time. `try_begin`, fill `data`, `try_append`, `publish`.
pub struct Producer {
    _todo: (),
}

impl Producer {
    /// Attach, also as a successor, which goes on at head. `poison`: overwrite released areas with 0xDD, for tests.
    pub fn new(data: Region, state: Region, poison: bool) -> Result<Self> {
        let _ = (data, state, poison);
        todo!()
    }

    /// Sizes.
    pub fn geometry(&self) -> Geometry {
        todo!()
    }

    /// Number of the area that is, or would be, filled.
    pub fn head(&self) -> u64 {
        todo!()
    }

    /// Start on the next area; false, and nothing changed, when all are taken.
    pub fn try_begin(&mut self) -> Result<bool> {
        todo!()
    }

    /// The data of the area being filled.
    pub fn data(&mut self) -> &mut [u8] {
        todo!()
    }

    /// Describe `length` bytes at `offset` of `data`; false, and nothing changed, with a full table.
    pub fn try_append(&mut self, offset: usize, length: usize, segment: u32, row: u32) -> bool {
        todo!("{offset} {length} {segment} {row}")
    }

    /// Hand the area, which has an entry at least, to the consumer.
    pub fn publish(&mut self) {
        todo!()
    }

    /// Areas published and not yet released.
    pub fn waiting(&mut self) -> Result<u64> {
        todo!()
    }
}

/// The draining side.
pub struct Consumer {
    _todo: (),
}

impl Consumer {
    /// `holder` is this process's lease word (`shm_ring.holder_word`), or None for a ring whose consumer never changes.
    /// `segments`, `rows`: as in Python.
    pub fn new(
        data: Region,
        state: Region,
        holder: Option<u64>,
        recovery: Recovery,
        segments: bool,
        rows: usize,
    ) -> Result<Self> {
        let _ = (data, state, holder, recovery, segments, rows);
        todo!()
    }

    /// Sizes.
    pub fn geometry(&self) -> Geometry {
        todo!()
    }

    /// Become the consumer; false when another process is. Never waits.
    pub fn try_take(&mut self) -> bool {
        todo!()
    }

    /// Let the other process drain; true when areas are left: then ring the bell.
    pub fn drop_lease(&mut self) -> Result<bool> {
        todo!()
    }

    /// Areas that are ready. Only while we are the consumer.
    pub fn pending(&mut self) -> Result<u64> {
        todo!()
    }

    /// Copy and check the entries of the oldest ready area into `self`; gives how many of them a predecessor had begun
    /// (0 unless `GoOnBehind`), which are to be passed over, and are counted in `resumed`.
    pub fn load(&mut self) -> Result<usize> {
        todo!()
    }

    /// How many entries `load` found.
    pub fn len(&self) -> usize {
        todo!()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Entry `number` and its bytes, which are the kernel's and ours until `release`. With `GoOnBehind` it is noted as
    /// begun before this returns.
    pub fn entry(&mut self, number: usize) -> (Entry, &[u8]) {
        todo!("{number}")
    }

    /// Give the area back, after the last system call on it has returned.
    pub fn release(&mut self) -> Result<()> {
        todo!()
    }

    /// Packets in entries that were passed over; only grows.
    pub fn resumed(&self) -> u64 {
        todo!()
    }
}
