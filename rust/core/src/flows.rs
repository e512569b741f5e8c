//! A reader's side of the flow table; as `nebula_mp.shm_flows.FlowView`.

use crate::error::Result;
use crate::ip::FlowKey;
use crate::region::Region;

/// What the table says of a packet from the local stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outbound {
    /// It goes to this peer (`PeerRef`).
    To(u64),
    /// Drop it.
    Refused,
    /// Only control knows.
    Unknown,
}

/// What the table says of a packet that came through a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Inbound {
    Allowed,
    Refused,
    /// Only control knows.
    Unknown,
}

/// Verdicts, and the words that say when a flow last had a packet.
pub struct FlowView {
    _todo: (),
}

impl FlowView {
    /// `flows` is read-only, `seen` writable.
    pub fn new(flows: Region, seen: Region) -> Result<Self> {
        let _ = (flows, seen);
        todo!()
    }

    /// Whom a packet from the local stack goes to.
    pub fn outbound(&mut self, key: &FlowKey, now_ms: u64) -> Outbound {
        todo!("{key:?} {now_ms}")
    }

    /// Whether a packet that came through a tunnel of `peer` may pass.
    pub fn inbound(&mut self, key: &FlowKey, peer: u64, now_ms: u64) -> Inbound {
        todo!("{key:?} {peer} {now_ms}")
    }
}

/// The hash of a key with the table's six seeds: `shm_flows.flow_hash`.
pub fn flow_hash(seeds: &[u64; 6], key: &FlowKey) -> u64 {
    todo!("{seeds:?} {key:?}")
}
