//! The replay windows in shared memory; as `nebula_mp.shm_counters.ReceiveWindows`.

use crate::error::Result;
use crate::region::Region;
use crate::replay::Refused;

/// For the reader that owns the tunnels it asks for.
pub struct ReceiveWindows {
    _todo: (),
}

/// The window of one tunnel; borrowed for the packet in hand.
pub struct Window<'a> {
    _todo: &'a (),
}

impl ReceiveWindows {
    /// Writable.
    pub fn new(windows: Region) -> Result<Self> {
        let _ = windows;
        todo!()
    }

    /// The window of this tunnel, begun on first use; None when the row holds a later tunnel.
    pub fn get(&self, row: usize, generation: u64) -> Option<Window<'_>> {
        todo!("{row} {generation}")
    }
}

impl Window<'_> {
    /// Whether a counter would be accepted; nothing changes.
    pub fn check(&self, counter: u64) -> std::result::Result<(), Refused> {
        todo!("{counter}")
    }

    /// Mark the counter of an authenticated packet that `check` accepted.
    pub fn update(&self, counter: u64) {
        todo!("{counter}")
    }
}
