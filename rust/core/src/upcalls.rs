//! What goes up to control, and to the reader that owns a tunnel; as `nebula_mp.datapath.filling` and the records of
//! `nebula_mp.datapath.api`.
//!
//! ```text
//! sealer | opener -> [Upcalls] -> upcall ring -> control
//! opener -> [Strangers] -> stranger ring -> the reader that owns the tunnel
//! ```
//!
//! Knows how much of control's time a tunnel may take; knows nothing of keys and of what a packet means. Never waits:
//! what finds no room is counted.

use std::rc::Rc;

use crate::error::{Contradiction, Fault, Result};
use crate::filler::Filler;
use crate::layout::ROWS_MAX;
use crate::relays::Path;
use crate::ring::Producer;
use crate::stats::StatsPage;
use crate::sys;
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
    Relayed = 9,
}

/// How a datagram came: `api.Arrival`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Arrival {
    pub source: Option<UdpAddr>,
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
    pub relayed: (u64, u64),
    pub moved: (u64, u64),
}

const ROW_MASK: u32 = ROWS_MAX as u32 - 1;

/// What stands in front of a packet: time, tunnel, and how it came; all zeros but for the time without an arrival.
fn record(at_ms: u64, arrival: Option<&Arrival>, local_index: u32) -> [u8; RECORD_BYTES] {
    let mut record = [0; RECORD_BYTES];
    record[..8].copy_from_slice(&at_ms.to_le_bytes());
    record[8..12].copy_from_slice(&local_index.to_le_bytes());
    if let Some(it) = arrival {
        record[16] = it.kind;
        record[17] = it.subtype;
        if let Some(source) = it.source {
            record[12..14].copy_from_slice(&source.port.to_le_bytes());
            record[14] = source.family;
            record[20..24].copy_from_slice(&source.scope.to_le_bytes());
            record[24..].copy_from_slice(&source.ip);
        }
    }
    record
}

/// Parse what stands in front of a packet that another reader, or control, hands over: the path in whose frame it
/// came, or 0, and where it came from.
pub fn parse_record(record: &[u8]) -> Result<(u32, Option<UdpAddr>, &[u8])> {
    let Some((head, packet)) = record.split_first_chunk::<RECORD_BYTES>() else {
        let expected = format!("{RECORD_BYTES} or more");
        return Err(impossible("length of a record", record.len(), expected));
    };
    let path = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    let mut ip = [0; 16];
    let (length, family) = match head[14] {
        0 => return Ok((path, None, packet)),
        4 => (4, 4),
        6 => (16, 6),
        found => return Err(impossible("address family", found, "0, 4 or 6")),
    };
    ip[..length].copy_from_slice(&head[24..24 + length]);
    let scope = u32::from_le_bytes([head[20], head[21], head[22], head[23]]);
    let source = UdpAddr {
        ip,
        family,
        port: u16::from_le_bytes([head[12], head[13]]),
        scope: if family == 6 { scope } else { 0 },
    };
    Ok((path, Some(source), packet))
}

/// What no reader writes.
fn impossible(field: &'static str, value: impl ToString, expected: impl Into<String>) -> Fault {
    Fault::Contradiction(Contradiction {
        memory: "upcall ring".into(),
        field: field.into(),
        value: value.to_string(),
        expected: expected.into(),
    })
}

/// Token buckets by number: `rate` a second, `burst` at once.
struct Buckets {
    rate: f64,
    burst: f64,
    /// Tokens, and one millisecond more than when they were counted. All zeros, which costs no memory, for one that
    /// was never used and so is full.
    buckets: Vec<(f64, u64)>,
}

impl Buckets {
    fn new(limit: (u64, u64), count: usize) -> Self {
        Self {
            rate: limit.0 as f64,
            burst: limit.1 as f64,
            buckets: vec![(0.0, 0); count],
        }
    }

    fn try_take(&mut self, number: usize, now_ms: u64) -> bool {
        let (tokens, counted) = &mut self.buckets[number];
        let mut left = self.burst;
        if *counted > 0 {
            let elapsed_ms = now_ms.wrapping_sub(*counted - 1) as i64;
            left = left.min(*tokens + elapsed_ms as f64 * self.rate / 1000.0);
        }
        let is_allowed = left >= 1.0;
        *tokens = if is_allowed { left - 1.0 } else { left };
        *counted = now_ms.wrapping_add(1);
        is_allowed
    }
}

/// What goes up to control. `plain`, `raw`, `opened`, `moved` while working, `flush` at the end of a pass.
pub struct Upcalls {
    outlet: Outlet,
    stats: Rc<StatsPage>,
    per_tunnel: Buckets,
    moved: Buckets,
    new_flow_out: Buckets,
    no_tunnel: Buckets,
    datagrams: Buckets,
    unknown: Buckets,
    relayed: Buckets,
}

impl Upcalls {
    /// `bell` is control's eventfd, borrowed.
    pub fn new(producer: Producer, bell: i32, stats: Rc<StatsPage>, limits: Limits) -> Self {
        Self {
            outlet: Outlet::new(producer, bell),
            stats,
            per_tunnel: Buckets::new(limits.per_tunnel, ROWS_MAX),
            moved: Buckets::new(limits.moved, ROWS_MAX),
            new_flow_out: Buckets::new(limits.plain, 1),
            no_tunnel: Buckets::new(limits.plain, 1),
            datagrams: Buckets::new(limits.datagrams, 1),
            unknown: Buckets::new(limits.unknown, 1),
            relayed: Buckets::new(limits.relayed, ROWS_MAX),
        }
    }

    /// Hand over a packet of the local stack's, `NewFlowOut` or `NoTunnel`, or count why not.
    pub fn plain(&mut self, reason: Reason, packet: &[u8], now_ms: u64) -> Result<()> {
        let bucket = match reason {
            Reason::NewFlowOut => &mut self.new_flow_out,
            _ => &mut self.no_tunnel,
        };
        if !bucket.try_take(0, now_ms) {
            self.stats.add(self.stats.slots.upcalls_limited, 1);
            return Ok(());
        }
        self.push(reason, 0, &record(now_ms, None, 0), packet)
    }

    /// Hand over a datagram as it came, `Datagram` or `UnknownIndex`, or count why not.
    pub fn raw(&mut self, reason: Reason, arrival: &Arrival, datagram: &[u8]) -> Result<()> {
        let slots = &self.stats.slots;
        let (bucket, refused) = match reason {
            Reason::UnknownIndex => (&mut self.unknown, slots.drop_unknown_index),
            _ => (&mut self.datagrams, slots.upcalls_limited),
        };
        if !bucket.try_take(0, arrival.at_ms) {
            self.stats.add(refused, 1);
            return Ok(());
        }
        let record = record(arrival.at_ms, Some(arrival), 0);
        self.push(reason, 0, &record, datagram)
    }

    /// Hand over a datagram that came in a frame of this path, or count why not.
    pub fn relayed(&mut self, arrival: &Arrival, path: &Path, datagram: &[u8]) -> Result<()> {
        let row = (path.carrier & ROW_MASK) as usize;
        if !self.relayed.try_take(row, arrival.at_ms) {
            self.stats.add(self.stats.slots.upcalls_limited, 1);
            return Ok(());
        }
        let record = record(arrival.at_ms, Some(arrival), path.local_index);
        self.push(Reason::Relayed, 0, &record, datagram)
    }

    /// Hand over the content of an authentic message, or count why not.
    pub fn opened(
        &mut self,
        reason: Reason,
        arrival: &Arrival,
        local_index: u32,
        packet: &[u8],
    ) -> Result<()> {
        let row = local_index & ROW_MASK;
        if !self.per_tunnel.try_take(row as usize, arrival.at_ms) {
            self.stats.add(self.stats.slots.upcalls_limited, 1);
            return Ok(());
        }
        let record = record(arrival.at_ms, Some(arrival), local_index);
        self.push(reason, row, &record, packet)
    }

    /// Say that a packet came from elsewhere; only a notice, which may get lost and is not counted.
    pub fn moved(&mut self, arrival: &Arrival, local_index: u32) -> Result<()> {
        let row = local_index & ROW_MASK;
        if self.moved.try_take(row as usize, arrival.at_ms)
            && self.outlet.filler.try_room(RECORD_BYTES, 1, 1)?
        {
            let record = record(arrival.at_ms, Some(arrival), local_index);
            self.outlet.put(&record, &[], Reason::Moved as u32, row);
        }
        Ok(())
    }

    /// Publish, and wake control if anything was.
    pub fn flush(&mut self) {
        self.outlet.flush();
    }

    fn push(&mut self, reason: Reason, row: u32, record: &[u8], packet: &[u8]) -> Result<()> {
        let slots = &self.stats.slots;
        let size_bytes = record.len() + packet.len();
        let slot = if size_bytes > self.outlet.filler.room_bytes() {
            slots.drop_oversize
        } else if !self.outlet.filler.try_room(size_bytes, 1, 1)? {
            slots.ring_full_upcall
        } else {
            self.outlet.put(record, packet, reason as u32, row);
            slots.upcalls
        };
        self.stats.add(slot, 1);
        Ok(())
    }
}

/// Datagrams that another reader has to judge, since it owns their tunnel's window.
pub struct Strangers {
    outlets: Vec<(u16, Outlet)>,
    stats: Rc<StatsPage>,
}

impl Strangers {
    /// By owner: the ring, and the eventfd that wakes it, borrowed.
    pub fn new(rings: Vec<(u16, Producer, i32)>, stats: Rc<StatsPage>) -> Self {
        let outlet = |(owner, producer, bell)| (owner, Outlet::new(producer, bell));
        Self {
            outlets: rings.into_iter().map(outlet).collect(),
            stats,
        }
    }

    /// Hand a datagram, perhaps out of a frame of `path`, to its tunnel's reader, or count why not.
    pub fn push(
        &mut self,
        owner: u16,
        arrival: &Arrival,
        datagram: &[u8],
        path: u32,
    ) -> Result<()> {
        let size_bytes = RECORD_BYTES + datagram.len();
        let outlet = self.outlets.iter_mut().find(|(each, _)| *each == owner);
        if let Some((_, outlet)) = outlet {
            if size_bytes <= outlet.filler.room_bytes()
                && outlet.filler.try_room(size_bytes, 1, 1)?
            {
                let record = record(arrival.at_ms, Some(arrival), path);
                outlet.put(&record, datagram, 0, 0);
                self.stats.add(self.stats.slots.strangers, 1);
                return Ok(());
            }
        }
        self.stats.add(self.stats.slots.ring_full_stranger, 1);
        Ok(())
    }

    /// Publish, and wake the owners.
    pub fn flush(&mut self) {
        for (_, outlet) in &mut self.outlets {
            outlet.flush();
        }
    }
}

/// A ring and the bell of who drains it.
struct Outlet {
    filler: Filler,
    bell: i32,
    /// Since the last `flush`. Should `try_room` publish an area in the middle of a pass, its consumer is still woken at
    /// the end.
    put_any: bool,
}

impl Outlet {
    fn new(producer: Producer, bell: i32) -> Self {
        Self {
            filler: Filler::new(producer),
            bell,
            put_any: false,
        }
    }

    /// Behind a `try_room` for both.
    fn put(&mut self, record: &[u8], packet: &[u8], segment: u32, row: u32) {
        let at = self.filler.at;
        let (middle, end) = (at + record.len(), at + record.len() + packet.len());
        let data = self.filler.data();
        data[at..middle].copy_from_slice(record);
        data[middle..end].copy_from_slice(packet);
        self.filler.describe(end - at, segment, row);
        self.put_any = true;
    }

    fn flush(&mut self) {
        if self.put_any {
            self.put_any = false;
            self.filler.flush();
            sys::ring_bell(self.bell);
        }
    }
}

#[cfg(all(test, not(miri)))]
mod tests;
