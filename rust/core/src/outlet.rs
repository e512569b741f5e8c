//! Gives a run its tunnel, its room in an area and its counters, or says why not; as `_try_seal` of
//! `nebula_mp.datapath.sealing`.
//!
//! Room comes first, counters second and sealing last: who dies in between leaves a gap, never a counter that another
//! one would take again.
//!
//! Relay frames, as `nebula_mp.datapath.relaying`, are made one by one: a datagram of another host's that goes on, or a
//! packet for a peer behind a relay, sealed for it first.

use crate::counters::{Refusal, SendCounters};
use crate::error::Result;
use crate::filler::Filler;
use crate::header::{
    write_message, HEADER_BYTES, MESSAGE_IP, MESSAGE_RELAY, OVERHEAD_BYTES, TAG_BYTES,
};
use crate::peers::PeerView;
use crate::relays::{Leads, Path};
use crate::runs::Target;
use crate::sealer::Shared;
use crate::stats::StatsPage;
use crate::tunnels::{Tunnel, TunnelState, TunnelView};

/// So long a run is held back for another worker to send.
pub const HOLD_US: u64 = 1000;

/// What has become of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is in the area.
    Sealed,
    /// And counted.
    Dropped,
    /// It is to be held back.
    Held,
    /// Control is to be asked.
    NoTunnel,
    /// The peer is behind a relay: `seal_relayed`, packet by packet.
    Relayed,
}

/// What a run needs.
#[derive(Clone, Copy)]
pub struct Need {
    /// Whom it is for.
    pub peer: u64,
    /// How many, and so how many counters.
    pub packets: usize,
    /// Once they are sealed.
    pub size_bytes: usize,
    /// How many they become at most.
    pub entries: usize,
}

/// Where sealed packets go, and what they are given.
pub struct Outlet {
    /// The seal ring's.
    pub filler: Filler,
    peers: PeerView,
    counters: SendCounters,
    held_since_us: Option<u64>,
}

impl Outlet {
    /// Nothing is held.
    pub fn new(filler: Filler, peers: PeerView, counters: SendCounters) -> Self {
        Self {
            filler,
            peers,
            counters,
            held_since_us: None,
        }
    }

    /// Whether a run is held back.
    #[inline]
    pub fn is_holding(&self) -> bool {
        self.held_since_us.is_some()
    }

    /// Give a run its room and counters and let `work` seal it, or see to it that it goes elsewhere.
    pub fn try_seal(
        &mut self,
        shared: &mut Shared,
        need: Need,
        now_us: u64,
        work: impl FnOnce(&mut Filler, &Target<'_>),
    ) -> Result<Outcome> {
        let outcome = self.find_and_seal(shared, need, now_us, work)?;
        if outcome == Outcome::Held {
            self.held_since_us.get_or_insert(now_us);
        } else {
            self.held_since_us = None;
        }
        Ok(outcome)
    }

    fn find_and_seal(
        &mut self,
        shared: &mut Shared,
        need: Need,
        now_us: u64,
        work: impl FnOnce(&mut Filler, &Target<'_>),
    ) -> Result<Outcome> {
        let Shared {
            tunnels,
            traffic,
            stats,
            ..
        } = shared;
        let packets = need.packets as u64;
        let regardless = self
            .held_since_us
            .is_some_and(|since| now_us.saturating_sub(since) >= HOLD_US);
        // Again when the tunnel ended in between: its successor may be there already.
        for _ in 0..2 {
            let Some(index) = self.peers.tunnel(need.peer) else {
                break;
            };
            let Some(tunnel) = proven(tunnels, index)? else {
                break;
            };
            if tunnel.underlay.is_none() {
                if tunnel.relay == 0 {
                    break;
                }
                return Ok(Outcome::Relayed);
            }
            if !self.filler.try_room(need.size_bytes, need.entries, 1)? {
                stats.add(stats.slots.ring_full_seal, packets);
                return Ok(Outcome::Dropped);
            }
            let (row, generation) = (tunnel.row(), tunnel.generation);
            let granted = self.reserve(tunnel, packets, regardless, stats)?;
            match granted {
                Ok(first) => {
                    let target = Target {
                        key: &tunnel.send,
                        remote_index: tunnel.remote_index,
                        row: row as u32,
                        first,
                    };
                    work(&mut self.filler, &target);
                    let size_bytes = need.size_bytes as u64;
                    traffic.sent(row, generation, packets, size_bytes, now_us / 1000);
                    return Ok(Outcome::Sealed);
                }
                Err(Refusal::Exhausted) => {
                    stats.add(stats.slots.drop_exhausted, packets);
                    return Ok(Outcome::Dropped);
                }
                Err(Refusal::Span) => return Ok(Outcome::Held),
                Err(Refusal::Gone) => {}
            }
        }
        Ok(Outcome::NoTunnel)
    }

    /// Seal a packet for a peer behind a relay: `Sealed`, `Dropped` or `NoTunnel`.
    pub fn seal_relayed(
        &mut self,
        shared: &mut Shared,
        peer: u64,
        packet: &[u8],
        now_ms: u64,
    ) -> Result<Outcome> {
        let Some((index, path)) = self.find_hop(shared, peer)? else {
            return Ok(Outcome::NoTunnel);
        };
        let Shared {
            tunnels,
            traffic,
            stats,
            ..
        } = shared;
        let inner_bytes = packet.len() + OVERHEAD_BYTES;
        let size = inner_bytes + OVERHEAD_BYTES;
        if !self.has_room(size, stats)? {
            return Ok(Outcome::Dropped);
        }
        // Before the peer's counter is taken, which would seem to be in flight if this one was refused.
        let hop = usable(tunnels, path.carrier)?;
        let foreseen = hop.map_or(Some(Refusal::Gone), |it| {
            self.counters.foresee(it.row(), it.generation)
        });
        if let Some(refusal) = foreseen {
            return Ok(refuse(refusal, stats));
        }
        let Some(tunnel) = proven(tunnels, index)? else {
            return Ok(Outcome::NoTunnel);
        };
        let counter = match self.reserve(tunnel, 1, true, stats)? {
            Ok(counter) => counter,
            Err(refusal) => return Ok(refuse(refusal, stats)),
        };
        let at = self.filler.at;
        let inner = &mut self.filler.data()[at + HEADER_BYTES..at + size - TAG_BYTES];
        if let Some((header, rest)) = inner.split_first_chunk_mut() {
            write_message(header, MESSAGE_IP, tunnel.remote_index, counter);
            rest[..packet.len()].copy_from_slice(packet);
            tunnel.send.seal_in_place(counter, header, rest);
        }
        let (row, generation) = (tunnel.row(), tunnel.generation);
        let Some(tunnel) = usable(tunnels, path.carrier)? else {
            return Ok(Outcome::NoTunnel);
        };
        let counter = match self.reserve(tunnel, 1, true, stats)? {
            Ok(counter) => counter,
            Err(refusal) => return Ok(refuse(refusal, stats)),
        };
        self.wrap(tunnel, path.next_index, counter, size);
        traffic.sent(row, generation, 1, inner_bytes as u64, now_ms);
        traffic.sent(tunnel.row(), tunnel.generation, 1, size as u64, now_ms);
        Ok(Outcome::Sealed)
    }

    /// Send the content of a frame of a path on through the tunnel `next`, or count why not; true if it goes.
    pub fn forward(
        &mut self,
        shared: &mut Shared,
        path: &Path,
        next: u32,
        content: &[u8],
        now_ms: u64,
    ) -> Result<bool> {
        let Shared {
            tunnels,
            traffic,
            stats,
            ..
        } = shared;
        let Some(tunnel) = usable(tunnels, next)? else {
            stats.add(stats.slots.drop_relay_index, 1);
            return Ok(false);
        };
        let size = content.len() + OVERHEAD_BYTES;
        if !self.has_room(size, stats)? {
            return Ok(false);
        }
        let counter = match self.reserve(tunnel, 1, true, stats)? {
            Ok(counter) => counter,
            Err(refusal) => {
                if refuse(refusal, stats) == Outcome::NoTunnel {
                    stats.add(stats.slots.drop_relay_index, 1);
                }
                return Ok(false);
            }
        };
        let begin = self.filler.at + HEADER_BYTES;
        self.filler.data()[begin..begin + content.len()].copy_from_slice(content);
        self.wrap(tunnel, path.next_index, counter, size);
        traffic.sent(tunnel.row(), tunnel.generation, 1, size as u64, now_ms);
        stats.add(stats.slots.relay_forwarded, 1);
        Ok(true)
    }

    /// The tunnel of a peer behind a relay, and the path that leads there.
    fn find_hop(&mut self, shared: &mut Shared, peer: u64) -> Result<Option<(u32, Path)>> {
        let Some(index) = self.peers.tunnel(peer) else {
            return Ok(None);
        };
        let Some(tunnel) = proven(&mut shared.tunnels, index)? else {
            return Ok(None);
        };
        let path = shared.relays.get(tunnel.relay)?;
        let Some(path) = path.filter(|it| it.leads == Leads::Here) else {
            return Ok(None);
        };
        let is_usable = usable(&mut shared.tunnels, path.carrier)?.is_some();
        Ok(is_usable.then_some((index, path)))
    }

    /// Have room for a frame, or count why there is none.
    fn has_room(&mut self, size: usize, stats: &StatsPage) -> Result<bool> {
        let slot = if size > self.filler.room_bytes() {
            stats.slots.drop_oversize
        } else if !self.filler.try_room(size, 1, 1)? {
            stats.slots.ring_full_seal
        } else {
            return Ok(true);
        };
        stats.add(slot, 1);
        Ok(false)
    }

    /// Take counters for the area in hand, and count those that are beyond the span.
    #[inline]
    fn reserve(
        &mut self,
        tunnel: &Tunnel,
        packets: u64,
        regardless: bool,
        stats: &StatsPage,
    ) -> Result<std::result::Result<u64, Refusal>> {
        let (row, area) = (tunnel.row(), Some(self.filler.area()));
        let beyond = self.counters.beyond_span();
        let granted = self
            .counters
            .reserve(row, tunnel.generation, packets, area, regardless)?;
        let passed = self.counters.beyond_span() - beyond;
        if passed > 0 {
            stats.add(stats.slots.counter_span, passed);
        }
        Ok(granted)
    }

    /// Make a frame of `size` bytes of the datagram that lies behind room for its header.
    fn wrap(&mut self, tunnel: &Tunnel, path: u32, counter: u64, size: usize) {
        let at = self.filler.at;
        let frame = &mut self.filler.data()[at..at + size];
        if let Some((header, _)) = frame.split_first_chunk_mut() {
            write_message(header, MESSAGE_RELAY, path, counter);
        }
        tunnel.send.seal_frame(counter, frame);
        self.filler
            .describe_train(size, size as u32, tunnel.row() as u32);
    }
}

/// What becomes of a packet without a counter; if its tunnel ended it is not counted.
fn refuse(refusal: Refusal, stats: &StatsPage) -> Outcome {
    if refusal == Refusal::Gone {
        return Outcome::NoTunnel;
    }
    stats.add(stats.slots.drop_exhausted, 1);
    Outcome::Dropped
}

/// The tunnel with this local index, if it may send.
fn proven(tunnels: &mut TunnelView, index: u32) -> Result<Option<&Tunnel>> {
    let tunnel = tunnels.get(index)?;
    Ok(tunnel.filter(|it| it.state == TunnelState::Proven))
}

/// The tunnel to a hop, if it can send: directly, since no path leads through two relays.
fn usable(tunnels: &mut TunnelView, index: u32) -> Result<Option<&Tunnel>> {
    Ok(proven(tunnels, index)?.filter(|it| it.underlay.is_some()))
}
