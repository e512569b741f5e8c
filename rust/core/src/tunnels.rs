//! A reader's and a writer's side of the tunnel table; as `nebula_mp.shm_tunnels`.

use crate::aead::Key;
use crate::error::Result;
use crate::region::Region;

/// Where a peer is reached: what `newtypes.UdpAddr` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UdpAddr {
    /// IPv4 in the first 4 bytes and zeros, or IPv6.
    pub ip: [u8; 16],
    /// 4 or 6.
    pub family: u8,
    /// In the machine's byte order.
    pub port: u16,
    /// Of a link-local IPv6 address; else 0.
    pub scope: u32,
}

/// What a row is for; the values are the table's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum TunnelState {
    Candidate = 1,
    Proven = 2,
}

/// Up to three inner addresses that a peer may send from.
#[derive(Debug, Clone, Copy)]
pub struct Sources {
    /// How many; 255: ask control, so anything may come from the flow table alone.
    pub count: u8,
    /// Bit n: source n is IPv6.
    pub families: u8,
    /// IPv4 padded with zeros.
    pub addresses: [[u8; 16]; 3],
}

impl Sources {
    /// Whether a peer may send from this address; true where control has to be asked.
    pub fn allow(&self, address: &[u8; 16], is_ipv6: bool) -> bool {
        todo!("{address:?} {is_ipv6}")
    }
}

/// A row as it was at `sequence`, with the keys expanded.
pub struct Tunnel {
    /// Ours.
    pub local_index: u32,
    /// The peer's.
    pub remote_index: u32,
    /// Whether it may carry data.
    pub state: TunnelState,
    /// The reader that has the replay window.
    pub owner: u16,
    /// `PeerRef`.
    pub peer: u64,
    /// Where the peer is reached; None if that is not known.
    pub underlay: Option<UdpAddr>,
    /// What it may send from.
    pub sources: Sources,
    /// Of the row.
    pub generation: u64,
    /// Of the row's sequence lock.
    pub sequence: u64,
    /// Seals what we send.
    pub send: Key,
    /// Opens what we receive.
    pub receive: Key,
}

impl Tunnel {
    /// Number of the row.
    pub fn row(&self) -> usize {
        (self.local_index & 0xFFFF) as usize
    }
}

/// Rows by local index: read once, then recognised by their sequence number. Keys are wiped from the copies when the
/// row changes generation, at the latest by `sweep`.
pub struct TunnelView {
    _todo: (),
}

impl TunnelView {
    /// Both regions are read-only. Both are kept out of core dumps and forks (`shm.Mapping.protect` for the keys).
    pub fn new(tunnels: Region, keys: Region) -> Result<Self> {
        let _ = (tunnels, keys);
        todo!()
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        todo!()
    }

    /// The tunnel with this local index, any u32; None if there is none. While a row is being written it tries
    /// again for 1 ms, then goes on with what it had.
    pub fn get(&mut self, index: u32) -> Result<Option<&Tunnel>> {
        todo!("{index}")
    }

    /// Drop what was made of rows that have changed; gives how many. About once a second.
    pub fn sweep(&mut self) -> usize {
        todo!()
    }
}

/// A writer's side: where to send a batch; it holds no key.
pub struct UnderlayView {
    _todo: (),
}

impl UnderlayView {
    /// Read-only.
    pub fn new(tunnels: Region) -> Result<Self> {
        let _ = tunnels;
        todo!()
    }

    /// How many rows there are.
    pub fn rows(&self) -> usize {
        todo!()
    }

    /// Underlay address of the tunnel in `row`; None if it has none. As `shm_tunnels.UnderlayView.get`.
    pub fn get(&mut self, row: u32) -> Result<Option<UdpAddr>> {
        todo!("{row}")
    }
}
