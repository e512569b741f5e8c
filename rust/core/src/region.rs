//! A region of shared memory as one process maps it; as `nebula_mp.shm.Mapping`, whose checks it makes.

use crate::error::Result;

/// Bytes of the header that every region begins with.
pub const HEADER_BYTES: usize = 64;
/// Regions' tables begin behind their first page.
pub const PAGE_BYTES: usize = 4096;

/// What a region contains: `shm.Layout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// For messages.
    pub name: &'static str,
    /// First 8 bytes.
    pub magic: &'static [u8; 8],
    /// Any change of offsets or meanings has a new one.
    pub version: u32,
}

/// One process's view of a region whose header was found right. Unmapped when it is dropped.
pub struct Region {
    _todo: (),
}

impl Region {
    /// Attach to the region behind `descriptor`, which is borrowed. The rights are those of the descriptor; where
    /// `writable` is asked for and not given (or the reverse), and for every contradiction of the header, this
    /// is a `Contradiction`. `name` tells regions of one layout apart.
    pub fn attach(descriptor: i32, layout: &Layout, writable: bool, name: &str) -> Result<Self> {
        todo!("{descriptor} {layout:?} {writable} {name}")
    }
}
