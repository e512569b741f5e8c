//! Which tunnel a peer is sent through; as `nebula_mp.shm_peers.PeerView`.

use crate::error::Result;
use crate::region::Region;

/// A reader's side.
pub struct PeerView {
    _todo: (),
}

impl PeerView {
    /// Read-only.
    pub fn new(peers: Region) -> Result<Self> {
        let _ = peers;
        todo!()
    }

    /// Local index of the tunnel this peer (`PeerRef`) is sent through; None without one, or if the peer is gone.
    pub fn tunnel(&self, peer: u64) -> Option<u32> {
        todo!("{peer}")
    }
}
