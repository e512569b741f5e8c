//! Gives a run its tunnel, its room in an area and its counters, or says why not; as `_try_seal` of
//! `nebula_mp.datapath.sealing`.
//!
//! Room comes first, counters second and sealing last: who dies in between leaves a gap, never a counter that another
//! one would take again.

use crate::counters::{Refusal, SendCounters};
use crate::error::Result;
use crate::filler::Filler;
use crate::peers::PeerView;
use crate::runs::Target;
use crate::sealer::Shared;
use crate::tunnels::TunnelState;

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
            let Some(tunnel) = tunnels.get(index)? else {
                break;
            };
            if tunnel.state != TunnelState::Proven || tunnel.underlay.is_none() {
                break;
            }
            if !self.filler.try_room(need.size_bytes, need.entries, 1)? {
                stats.add(stats.slots.ring_full_seal, packets);
                return Ok(Outcome::Dropped);
            }
            let (row, generation) = (tunnel.row(), tunnel.generation);
            let beyond = self.counters.beyond_span();
            let area = Some(self.filler.area());
            let granted = self
                .counters
                .reserve(row, generation, packets, area, regardless)?;
            if self.counters.beyond_span() != beyond {
                stats.add(
                    stats.slots.counter_span,
                    self.counters.beyond_span() - beyond,
                );
            }
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
}
