//! A reader's side of the flow tables; as `nebula_mp.shm_flows.FlowView`.
//!
//! Knows keys, verdicts and how long they hold; knows nothing of rules, of packets, or of who the peer is. There is a
//! table of each reader, which it writes alone, and one of control's. Nothing is remembered here of rows that were
//! found.
//!
//! ALLOW is refreshed by packets of both directions, REFUSE is not, and is asked for only where no table allows. For an
//! inbound packet the row's peer must be the tunnel's. What no row of the flow says may be said by control's row of the
//! pair of addresses: then the reader admits the flow itself, to its own table.

use std::rc::Rc;

use crate::admission;
use crate::error::Result;
pub use crate::flow_rows::flow_hash;
use crate::flow_rows::{Direction, FlowRows, Place, Row, Verdict, ALLOW, REFUSE};
use crate::ip::FlowKey;
use crate::layout::{SEED_COUNT, WORKERS_MAX};
use crate::peers::PeerView;
use crate::region::Region;
use crate::stats::StatsPage;

/// The peer of a row that stands for packets which nobody would take.
const NOBODY: u64 = 0;
/// Among the tables in the order in which they are asked.
const OWN: usize = 0;
const CONTROLS: usize = 1;

/// What the tables say of a packet from the local stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outbound {
    /// It goes to this peer (`PeerRef`).
    To(u64),
    /// Drop it.
    Refused,
    /// Only control knows.
    Unknown,
}

/// What the tables say of a packet that came through a tunnel.
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
    /// The own one, control's, then the others by number.
    tables: Vec<FlowRows>,
    seeds: [u64; SEED_COUNT],
    peers: PeerView,
    stats: Rc<StatsPage>,
}

impl FlowView {
    /// `flows` and `seen` are those of all workers, and control's behind them. `flows[own]` is writable, and so are all
    /// of `seen`.
    pub fn new(
        flows: Vec<Region>,
        seen: Vec<Region>,
        own: usize,
        peers: PeerView,
        stats: Rc<StatsPage>,
    ) -> Result<Self> {
        let workers = flows.len().saturating_sub(1);
        assert!((1..=WORKERS_MAX).contains(&workers) && seen.len() == flows.len());
        assert!(own < workers && flows[own].is_writable());
        let tables = flows.into_iter().zip(seen);
        let mut tables = tables
            .map(|(flows, seen)| FlowRows::new(flows, seen))
            .collect::<Result<Vec<_>>>()?;
        tables[..=own].rotate_right(1);
        tables[OWN + 1..].rotate_right(1);
        for table in &tables {
            table.check_fits(&tables[CONTROLS])?;
        }
        Ok(Self {
            seeds: tables[CONTROLS].seeds(),
            tables,
            peers,
            stats,
        })
    }

    /// Whom a packet from the local stack goes to.
    #[inline]
    pub fn outbound(&mut self, key: &FlowKey, now_ms: u64) -> Outbound {
        let place = self.place(key);
        let rules_generation = self.rules_generation();
        let (mut is_refused, mut stale) = (false, None);
        for table in &self.tables {
            let Some(row) = find(table, place, key, rules_generation, now_ms) else {
                continue;
            };
            let peer = row.verdict.peer;
            match row.verdict.of(Direction::Outbound) {
                ALLOW => {
                    table.note(place.bucket, &row, now_ms);
                    if peer == NOBODY {
                        return Outbound::Refused;
                    }
                    if self.peers.tunnel(peer).is_some() {
                        return Outbound::To(peer);
                    }
                    stale = stale.or(Some(peer));
                }
                REFUSE => is_refused = true,
                _ => {}
            }
        }
        if is_refused {
            return Outbound::Refused;
        }
        self.try_begin_outbound(key, place, rules_generation, now_ms)
            .or(stale)
            .map_or(Outbound::Unknown, Outbound::To)
    }

    /// Whether a packet that came through a tunnel of `peer` may pass.
    #[inline]
    pub fn inbound(&mut self, key: &FlowKey, peer: u64, now_ms: u64) -> Inbound {
        let place = self.place(key);
        let rules_generation = self.rules_generation();
        let mut is_refused = false;
        for (number, table) in self.tables.iter().enumerate() {
            let found = find(table, place, key, rules_generation, now_ms);
            let Some(row) = found.filter(|row| row.verdict.peer == peer) else {
                continue;
            };
            match row.verdict.of(Direction::Inbound) {
                ALLOW => {
                    table.note(place.bucket, &row, now_ms);
                    if number != OWN {
                        self.settle_whose(key, place, &row, now_ms);
                    }
                    return Inbound::Allowed;
                }
                REFUSE => is_refused = true,
                _ => {}
            }
        }
        if is_refused {
            return Inbound::Refused;
        }
        self.try_begin_inbound(key, place, peer, rules_generation, now_ms)
    }

    #[inline]
    fn place(&self, key: &FlowKey) -> Place {
        self.tables[OWN].place(&self.seeds, key)
    }

    #[inline]
    fn rules_generation(&self) -> u64 {
        self.tables[CONTROLS].rules_generation()
    }

    /// Admit a flow that control leaves to readers; gives whom it is with.
    #[cold]
    fn try_begin_outbound(
        &self,
        key: &FlowKey,
        place: Place,
        rules_generation: u64,
        now_ms: u64,
    ) -> Option<u64> {
        let pair = self.pair(key, rules_generation, now_ms)?;
        let may_begin = pair.of(Direction::Outbound) == ALLOW;
        if !may_begin || self.peers.tunnel(pair.peer).is_none() {
            return None;
        }
        self.begin(key, place, &pair, Direction::Outbound, now_ms);
        Some(pair.peer)
    }

    /// Admit a flow that control leaves to readers.
    #[cold]
    fn try_begin_inbound(
        &self,
        key: &FlowKey,
        place: Place,
        peer: u64,
        rules_generation: u64,
        now_ms: u64,
    ) -> Inbound {
        match self.pair(key, rules_generation, now_ms) {
            Some(pair) if pair.peer == peer && pair.of(Direction::Inbound) == ALLOW => {
                self.begin(key, place, &pair, Direction::Inbound, now_ms);
                Inbound::Allowed
            }
            _ => Inbound::Unknown,
        }
    }

    /// What control says of all flows between these two addresses, if it holds.
    fn pair(&self, key: &FlowKey, rules_generation: u64, now_ms: u64) -> Option<Verdict> {
        let pair = key.pair();
        let place = self.place(&pair);
        let row = find(
            &self.tables[CONTROLS],
            place,
            &pair,
            rules_generation,
            now_ms,
        )?;
        Some(row.verdict)
    }

    fn begin(
        &self,
        key: &FlowKey,
        place: Place,
        pair: &Verdict,
        direction: Direction,
        now_ms: u64,
    ) {
        let origin = admission::origin(&self.tables, place, key, pair, direction, now_ms);
        self.admit(key, place, pair, origin, now_ms);
    }

    /// Another table has this flow with the packet's peer. If the own one has it with another one, who no longer has
    /// the address, answers would go to that one.
    fn settle_whose(&self, key: &FlowKey, place: Place, found: &Row, now_ms: u64) {
        let own = self.tables[OWN].find(place, key);
        if own.is_some_and(|row| row.verdict.peer != found.verdict.peer) {
            let origin = found.verdict.origin().unwrap_or(Direction::Inbound);
            self.admit(key, place, &found.verdict, origin, now_ms);
        }
    }

    /// Allow a flow both ways in the own table, with the peer and of the rules that `by` is of.
    fn admit(&self, key: &FlowKey, place: Place, by: &Verdict, origin: Direction, now_ms: u64) {
        let timeout_ms = self.tables[CONTROLS].timeout_ms(key.protocol());
        let verdict = Verdict::allow(by.rules_generation, by.peer, timeout_ms, origin);
        let evicts = admission::store(&self.tables[OWN], place, key, verdict, now_ms);
        self.stats.add(self.stats.slots.flows_admitted, 1);
        if evicts {
            self.stats.add(self.stats.slots.flows_evicted, 1);
        }
    }
}

/// The row of a flow, if it holds.
#[inline]
fn find(
    table: &FlowRows,
    place: Place,
    key: &FlowKey,
    rules_generation: u64,
    now_ms: u64,
) -> Option<Row> {
    table
        .find(place, key)
        .filter(|row| row.holds(rules_generation, now_ms))
}

#[cfg(all(test, not(miri)))]
mod tests;
