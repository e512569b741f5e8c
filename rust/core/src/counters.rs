//! Send counters and traffic of tunnels; as `nebula_mp.shm_counters`, with atomic instructions in place of its
//! record locks. All processes of an instance use the one or the other: see `NativeSendCounters` in Python.
//!
//! Knows that a row of the tunnel table is used by one tunnel after another, told apart by generation; knows nothing
//! of keys, packets or rings. How counters are taken without a lock is in `ledger`.
//!
//! **Span.** Released peers accept only 1024 counters behind the newest, and a ring can hold more. One worker sends in
//! the order in which it sealed, so only another one's batches matter: a batch is not to end more than `SPAN_MAX` above
//! the oldest counter that another worker has sealed and not yet sent. So each worker publishes, for each tunnel, that
//! counter and the area of its ring with which the last of them goes; they are in flight until the ring's consumer has
//! released that area, which others see without its help. A worker that is the only one publishes nothing.
//!
//! Not allowed, though tempting: to seal first and reserve later, or to give back what was not used (a successor would
//! use a counter twice); to let one process use locks and another one atomic instructions on the same counters.

use std::mem::offset_of;
use std::sync::atomic::Ordering;

use crate::error::{Fault, Result};
use crate::header::COUNTER_LIMIT;
use crate::layout::{
    row_count, SendRow, SpanRow, TrafficRow, ROWS_AT_WORD, ROWS_MAX, TAIL, WORKERS_MAX,
};
use crate::ledger::{Impossible, Ledger, Words};
pub use crate::ledger::{Refusal, SPAN_MAX};
use crate::region::{Region, PAGE_BYTES};
use crate::words::Word;

/// The regions that counters lie in.
struct Regions {
    send: Region,
    spans: Vec<Region>,
    states: Vec<Region>,
}

impl Words for Regions {
    #[inline]
    fn send(&self, index: usize) -> impl Word {
        self.send.word(index)
    }

    #[inline]
    fn span(&self, worker: usize, index: usize) -> impl Word {
        self.spans[worker].word(index)
    }

    #[inline]
    fn released(&self, worker: usize) -> impl Word {
        self.states[worker].word(TAIL)
    }
}

/// Counters for whoever seals, each given out once, whatever dies.
pub struct SendCounters {
    ledger: Ledger<Regions>,
    name: String,
    rows: usize,
    workers: usize,
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
        assert!(send.is_writable());
        let workers = spans.len();
        assert!((1..=WORKERS_MAX).contains(&workers) && states.len() == workers);
        if let Some(worker) = worker {
            assert!(worker < workers && (workers == 1 || spans[worker].is_writable()));
        }
        let rows = row_count(&send, size_of::<SendRow>(), ROWS_MAX)?;
        for span in &spans {
            if row_count(span, size_of::<SpanRow>(), ROWS_MAX)? != rows {
                return Err(span.contradiction("number of rows", span.parameters()[0], rows));
            }
        }
        for state in &states {
            if state.size() != PAGE_BYTES {
                return Err(state.contradiction("size", state.size(), PAGE_BYTES));
            }
        }
        let name = send.name().to_owned();
        let regions = Regions {
            send,
            spans,
            states,
        };
        let ledger = Ledger::new(regions, rows, workers, worker, published)
            .map_err(|it| contradiction(it, &name, rows, workers))?;
        Ok(Self {
            ledger,
            name,
            rows,
            workers,
        })
    }

    /// Take `count` counters, at least one, for the tunnel in `row`; gives the first. Call this before sealing with
    /// any. `area`: number of the ring area the batch goes into, never lower than in the call before; None when it is
    /// sent at once. `regardless` of the span: after 1 ms of refusals for that reason.
    #[inline]
    pub fn reserve(
        &mut self,
        row: usize,
        generation: u64,
        count: u64,
        area: Option<u64>,
        regardless: bool,
    ) -> Result<std::result::Result<u64, Refusal>> {
        self.ledger
            .reserve(row, generation, count, area, regardless)
            .map_err(|it| contradiction(it, &self.name, self.rows, self.workers))
    }

    /// Why `reserve` would refuse a counter whatever others do meanwhile; None if it would not.
    pub fn foresee(&self, row: usize, generation: u64) -> Option<Refusal> {
        match self.ledger.last(row, generation) {
            None => Some(Refusal::Gone),
            Some(last) if last >= COUNTER_LIMIT - 1 => Some(Refusal::Exhausted),
            Some(_) => None,
        }
    }

    /// Batches that were given counters although they end beyond the span; only grows.
    #[inline]
    pub fn beyond_span(&self) -> u64 {
        self.ledger.beyond_span
    }
}

#[cold]
fn contradiction(impossible: Impossible, send: &str, rows: usize, workers: usize) -> Fault {
    match impossible {
        Impossible::Sealer(worker) => {
            Fault::contradiction(send, "sealer", worker, format!("less than {workers}"))
        }
        Impossible::Touched(touched) => {
            Fault::contradiction(send, "rows touched", touched, format!("at most {rows}"))
        }
    }
}

const WORDS: usize = size_of::<TrafficRow>() / 8;
const GENERATION: usize = offset_of!(TrafficRow, generation) / 8;
const PACKETS_IN: usize = offset_of!(TrafficRow, packets_in) / 8;
const PACKETS_OUT: usize = offset_of!(TrafficRow, packets_out) / 8;

// Bytes are behind packets, and the time behind both.
const _: () = assert!(
    offset_of!(TrafficRow, bytes_in) == 8 * (PACKETS_IN + 1)
        && offset_of!(TrafficRow, last_in_ms) == 8 * (PACKETS_IN + 2)
        && offset_of!(TrafficRow, bytes_out) == 8 * (PACKETS_OUT + 1)
        && offset_of!(TrafficRow, last_out_ms) == 8 * (PACKETS_OUT + 2)
);

/// One sealer's share of what passes through each tunnel; nobody else writes it.
pub struct Traffic {
    traffic: Region,
    rows: usize,
}

impl Traffic {
    /// Writable.
    pub fn new(traffic: Region) -> Result<Self> {
        assert!(traffic.is_writable());
        let rows = row_count(&traffic, size_of::<TrafficRow>(), ROWS_MAX)?;
        Ok(Self { traffic, rows })
    }

    /// Count packets that were opened; bytes are those of the datagrams.
    #[inline]
    pub fn received(&self, row: usize, generation: u64, packets: u64, bytes: u64, now_ms: u64) {
        self.add(row, generation, [packets, bytes, now_ms], PACKETS_IN);
    }

    /// Count packets that were sealed.
    #[inline]
    pub fn sent(&self, row: usize, generation: u64, packets: u64, bytes: u64, now_ms: u64) {
        self.add(row, generation, [packets, bytes, now_ms], PACKETS_OUT);
    }

    #[inline]
    fn add(&self, row: usize, generation: u64, [packets, bytes, now_ms]: [u64; 3], first: usize) {
        if row >= self.rows {
            return;
        }
        let cell = ROWS_AT_WORD + row * WORDS;
        let words = &self.traffic.words()[cell..cell + WORDS];
        if words[GENERATION].load(Ordering::Relaxed) != generation {
            // Nobody sums a cell that is half cleared: Release keeps these in order.
            words[GENERATION].store(0, Ordering::Relaxed);
            for word in &words[GENERATION + 1..] {
                word.store(0, Ordering::Release);
            }
            words[GENERATION].store(generation, Ordering::Release);
        }
        // One writer; wrapping, since a predecessor that went mad may have left any value.
        for (word, amount) in words[first..].iter().zip([packets, bytes]) {
            let sum = word.load(Ordering::Relaxed).wrapping_add(amount);
            word.store(sum, Ordering::Relaxed);
        }
        words[first + 2].store(now_ms, Ordering::Relaxed);
    }
}

#[cfg(all(test, not(miri)))]
mod tests;
