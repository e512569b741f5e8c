//! Which tunnel a peer is sent through; as `nebula_mp.shm_peers.PeerView`.
//!
//! Knows rows, generations and local indexes; knows nothing of who a peer is. Flows name a peer, not a tunnel, so
//! that a new handshake moves all flows of the peer with one store, which control makes.

use std::sync::atomic::Ordering;

use crate::error::Result;
use crate::layout::{row_count, PeerRow, ROWS_AT_WORD, ROWS_MAX};
use crate::region::Region;

/// A reader's side.
pub struct PeerView {
    peers: Region,
    rows: usize,
}

impl PeerView {
    /// Read-only.
    pub fn new(peers: Region) -> Result<Self> {
        let rows = row_count(&peers, size_of::<PeerRow>(), ROWS_MAX)?;
        Ok(Self { peers, rows })
    }

    /// Local index of the tunnel this peer (`PeerRef`) is sent through; None without one, or if the peer is gone.
    #[inline]
    pub fn tunnel(&self, peer: u64) -> Option<u32> {
        let row = peer as u32 as usize;
        if row >= self.rows {
            return None;
        }
        // Acquire: the row of the tunnel was written before.
        let word = self.peers.word(ROWS_AT_WORD + row).load(Ordering::Acquire);
        (word >> 32 == peer >> 32 && word as u32 != 0).then_some(word as u32)
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::layout::{PEERS, ROWS_AT};
    use crate::testing::Memory;

    fn table() -> (Memory, PeerView) {
        let memory = Memory::new(&PEERS, ROWS_AT + 8 * 4, &[4]);
        let view = PeerView::new(memory.read_only()).unwrap();
        (memory, view)
    }

    #[test]
    fn a_peer_is_sent_through_the_tunnel_that_was_set_last() {
        let (memory, view) = table();
        let peer = 7 << 32 | 3;

        memory.patch_word(ROWS_AT_WORD + 3, 7 << 32 | 0x0001_0002);
        assert_eq!(view.tunnel(peer), Some(0x0001_0002));

        memory.patch_word(ROWS_AT_WORD + 3, 7 << 32 | 5);
        assert_eq!(view.tunnel(peer), Some(5));
    }

    #[test]
    fn a_peer_without_a_tunnel_has_none() {
        let (memory, view) = table();
        memory.patch_word(ROWS_AT_WORD + 3, 7 << 32);
        assert_eq!(view.tunnel(7 << 32 | 3), None);
    }

    #[test]
    fn the_row_of_another_peer_says_nothing_of_a_former_one() {
        let (memory, view) = table();
        memory.patch_word(ROWS_AT_WORD + 3, 8 << 32 | 5);
        assert_eq!(view.tunnel(7 << 32 | 3), None);
        assert_eq!(view.tunnel(3), None);
    }

    #[test]
    fn a_row_beyond_the_table_is_nobodys() {
        let (_memory, view) = table();
        for row in [4, 65_535, 0xFFFF_FFFF] {
            assert_eq!(view.tunnel(row), None);
        }
    }

    #[test]
    fn a_table_of_another_size_than_it_says_is_refused() {
        for rows in [0, 3, 5, 65_537, u64::MAX] {
            let memory = Memory::new(&PEERS, ROWS_AT + 8 * 4, &[rows]);
            let error = PeerView::new(memory.read_only()).err().unwrap().to_string();
            let expected = format!(
                "shared memory 'peers': number of rows is {rows}, expected what fits 4128 bytes"
            );
            assert_eq!(error, expected);
        }
    }
}
