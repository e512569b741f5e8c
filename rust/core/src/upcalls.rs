//! What goes up to control, and to the reader that owns a tunnel; as `nebula_mp.datapath.filling` and the records of
//! `nebula_mp.datapath.api`.

use std::rc::Rc;

use crate::error::Result;
use crate::ring::Producer;
use crate::stats::StatsPage;
use crate::tunnels::UdpAddr;

/// Bytes of a record in front of its packet: `api.RECORD_BYTES`.
pub const RECORD_BYTES: usize = 40;

/// Why control is asked: `api.UpcallReason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum Reason {
    NewFlowOut = 1,
    NoTunnel = 2,
    NewFlowIn = 3,
    Message = 4,
    First = 5,
    Moved = 6,
    Datagram = 7,
    UnknownIndex = 8,
}

/// How a datagram came: `api.Arrival`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Arrival {
    pub source: UdpAddr,
    pub kind: u8,
    pub subtype: u8,
    pub at_ms: u64,
}

/// `api.UpcallLimits`: (a second, at once).
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Limits {
    pub per_tunnel: (u64, u64),
    pub plain: (u64, u64),
    pub datagrams: (u64, u64),
    pub unknown: (u64, u64),
    pub moved: (u64, u64),
}

/// Parse what stands in front of a packet that another reader, or control, hands over: where it came from.
pub fn parse_record(record: &[u8]) -> Result<(Option<UdpAddr>, &[u8])> {
    todo!("{}", record.len())
}

/// What goes up to control. `push` while working, `flush` at the end of a pass.
pub struct Upcalls {
    _todo: (),
}

impl Upcalls {
    /// `bell` is control's eventfd, borrowed.
    pub fn new(producer: Producer, bell: i32, stats: Rc<StatsPage>, limits: Limits) -> Self {
        let _ = (producer, bell, stats, limits);
        todo!()
    }

    /// Hand over a packet of the local stack's, or count why not.
    pub fn plain(&mut self, reason: Reason, packet: &[u8], now_ms: u64) -> Result<()> {
        todo!("{reason:?} {} {now_ms}", packet.len())
    }

    /// Hand over a datagram as it came, or count why not.
    pub fn raw(&mut self, reason: Reason, arrival: &Arrival, datagram: &[u8]) -> Result<()> {
        todo!("{reason:?} {arrival:?} {}", datagram.len())
    }

    /// Hand over the content of an authentic message, or count why not.
    pub fn opened(
        &mut self,
        reason: Reason,
        arrival: &Arrival,
        local_index: u32,
        packet: &[u8],
    ) -> Result<()> {
        todo!("{reason:?} {arrival:?} {local_index} {}", packet.len())
    }

    /// Say that a packet came from elsewhere; only a notice, which may get lost and is not counted.
    pub fn moved(&mut self, arrival: &Arrival, local_index: u32) -> Result<()> {
        todo!("{arrival:?} {local_index}")
    }

    /// Publish, and wake control if anything was.
    pub fn flush(&mut self) {
        todo!()
    }
}

/// Datagrams that another reader has to judge, since it owns their tunnel's window.
pub struct Strangers {
    _todo: (),
}

impl Strangers {
    /// By owner: the ring, and the eventfd that wakes it, borrowed.
    pub fn new(rings: Vec<(u16, Producer, i32)>, stats: Rc<StatsPage>) -> Self {
        let _ = (rings, stats);
        todo!()
    }

    /// Hand a datagram to the reader that owns it, or count why not.
    pub fn push(&mut self, owner: u16, arrival: &Arrival, datagram: &[u8]) -> Result<()> {
        todo!("{owner} {arrival:?} {}", datagram.len())
    }

    /// Publish, and wake the owners.
    pub fn flush(&mut self) {
        todo!()
    }
}
