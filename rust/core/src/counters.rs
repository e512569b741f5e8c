//! Send counters and traffic of tunnels; as `nebula_mp.shm_counters`, with atomic instructions in place of its
//! record locks. All processes of an instance use the one or the other: see `NativeSendCounters` in Python.
//!
//! **Reserve, without a lock.** Load the counter; check the generation *after* it; look at other workers' spans;
//! publish the own span with a lower bound of what will be taken; compare and swap the counter from what was loaded.
//! If that fails somebody else has taken counters meanwhile: again. What was published stays true, since the counter
//! only grows. Who wins the swap has checked everything published before the value it replaced.

use crate::error::Result;
use crate::region::Region;

/// A batch is not to end further than this above the oldest counter that another worker has not sent.
pub const SPAN_MAX: u64 = 512;

/// Why there is no counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The row holds a later tunnel, or none any more.
    Gone,
    /// The counter has reached its end.
    Exhausted,
    /// Another worker is too far behind.
    Span,
}

/// Counters for whoever seals, each given out once, whatever dies.
pub struct SendCounters {
    /// Batches that were given counters although they end beyond the span; only grows.
    pub beyond_span: u64,
    _todo: (),
}

impl SendCounters {
    /// `send` is writable. `spans` are those of all workers, of which only the own one is writable; `worker` is None
    /// for control. `states` are all seal rings' state regions, read-only: how far each was released. `published`:
    /// areas that this worker has published, so that what a predecessor did not publish is forgotten.
    pub fn new(
        send: Region,
        spans: Vec<Region>,
        worker: Option<usize>,
        states: Vec<Region>,
        published: u64,
    ) -> Result<Self> {
        let _ = (send, spans, worker, states, published);
        todo!()
    }

    /// Take `count` counters for the tunnel in `row`; gives the first. Call this before sealing with any.
    /// `area`: number of the ring area the batch goes into, never lower than in the call before; None when it is
    /// sent at once. `regardless` of the span: after 1 ms of refusals for that reason.
    pub fn reserve(
        &mut self,
        row: usize,
        generation: u64,
        count: u64,
        area: Option<u64>,
        regardless: bool,
    ) -> Result<std::result::Result<u64, Refusal>> {
        todo!("{row} {generation} {count} {area:?} {regardless}")
    }
}

/// One sealer's share of what passes through each tunnel.
pub struct Traffic {
    _todo: (),
}

impl Traffic {
    /// Writable.
    pub fn new(traffic: Region) -> Result<Self> {
        let _ = traffic;
        todo!()
    }

    /// Count packets that were opened; bytes are those of the datagrams.
    pub fn received(&self, row: usize, generation: u64, packets: u64, bytes: u64, now_ms: u64) {
        todo!("{row} {generation} {packets} {bytes} {now_ms}")
    }

    /// Count packets that were sealed.
    pub fn sent(&self, row: usize, generation: u64, packets: u64, bytes: u64, now_ms: u64) {
        todo!("{row} {generation} {packets} {bytes} {now_ms}")
    }
}
