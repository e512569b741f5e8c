//! Who takes which counters of a tunnel, without a lock: the protocol of `counters`, on words alone.
//!
//! ```text
//! counters -> [ledger] -> words of the regions `send` and `span`, and of the rings' states
//! ```
//!
//! Knows words alone, wherever they lie: `counters` runs this on mapped regions, a test with a death at each store,
//! and the model in `tests/loom_ledger.rs` on loom's atomics. The words and their writers are those of
//! `nebula_mp.shm_counters`, whose record lock is replaced so:
//!
//! | step of `reserve`                               | why there                                                   |
//! |-------------------------------------------------|-------------------------------------------------------------|
//! | load counter, then sealers, then generation     | control stores them in the other order                      |
//! | look at what others have in flight              | who swaps has seen all that was published before the value  |
//! |                                                 | it replaces                                                 |
//! | publish the own span, from counter + 1 on       | who sees the new counter sees this; a lower bound, so it    |
//! |                                                 | stays true if the swap fails, since the counter only grows  |
//! | compare and swap the counter                    | else somebody has taken counters meanwhile: all of it again |
//! | look at the generation once more                | the row may have been given to another tunnel, whose        |
//! |                                                 | counter was by chance what we had loaded of the former one  |
//! | refused after all: take back what was published | nobody is to wait for packets that there will never be      |
//!
//! Without the second look at the generation two sealers could hold equal counters for a former tunnel's key. With it
//! the later one finds that the row has changed, and what it took of the new tunnel's counters is a gap.

use std::collections::{HashMap, VecDeque};
use std::mem::offset_of;
use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

use crate::header::COUNTER_LIMIT;
use crate::layout::{SendRow, SpanRow, LIVE, ROWS_AT_WORD, TOUCHED};
use crate::words::Word;

/// A batch is not to end further than this above the oldest counter that another worker has not sent.
pub const SPAN_MAX: u64 = 512;
/// Tunnels of which a worker remembers what it has in flight.
const FLIGHTS_MAX: usize = 1024;

const SEND_WORDS: usize = size_of::<SendRow>() / 8;
const COUNTER: usize = offset_of!(SendRow, counter) / 8;
const GENERATION: usize = offset_of!(SendRow, generation) / 8;
const SEALERS: usize = offset_of!(SendRow, sealers) / 8;

const SPAN_WORDS: usize = size_of::<SpanRow>() / 8;
const SPAN_GENERATION: usize = offset_of!(SpanRow, generation) / 8;
const FIRST: usize = offset_of!(SpanRow, first) / 8;
const UNTIL: usize = offset_of!(SpanRow, until) / 8;

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

/// A word says what no process of ours writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Impossible {
    /// A worker of this number has sealed.
    Sealer(u32),
    /// So many rows of a span were touched.
    Touched(u64),
}

/// The words, by their indexes in the regions.
pub trait Words {
    /// Of the region `send`.
    fn send(&self, index: usize) -> impl Word;
    /// Of a worker's region `span`.
    fn span(&self, worker: usize, index: usize) -> impl Word;
    /// How many areas a worker's seal ring has released.
    fn released(&self, worker: usize) -> impl Word;
}

/// What this worker has sealed for one tunnel and perhaps not sent.
struct Flight {
    generation: u64,
    /// (area, its first counter), oldest first.
    batches: VecDeque<(u64, u64)>,
}

/// Counters for whoever seals, each given out once, whatever dies.
pub struct Ledger<M> {
    words: M,
    rows: usize,
    workers: usize,
    /// Whose spans we publish: with one worker nobody wants to know.
    publishes: Option<usize>,
    bit: u64,
    flights: HashMap<usize, Flight>,
    /// Batches that were given counters although they end beyond the span; only grows.
    pub beyond_span: u64,
}

impl<M: Words> Ledger<M> {
    /// Of `rows` rows and so many workers; `worker` is None for control. `published`: areas that this worker has
    /// published. No batch of a predecessor can be in an area that it did not publish: those are forgotten.
    pub fn new(
        words: M,
        rows: usize,
        workers: usize,
        worker: Option<usize>,
        published: u64,
    ) -> Result<Self, Impossible> {
        let ledger = Self {
            words,
            rows,
            workers,
            publishes: worker.filter(|_| workers > 1),
            bit: worker.map_or(0, |worker| 1 << worker),
            flights: HashMap::new(),
            beyond_span: 0,
        };
        ledger.forget_unpublished(published)?;
        Ok(ledger)
    }

    /// As `counters::SendCounters::reserve`.
    ///
    /// # Panics
    ///
    /// If `count` is 0: its counter would be another one's.
    #[inline]
    pub fn reserve(
        &mut self,
        row: usize,
        generation: u64,
        count: u64,
        area: Option<u64>,
        regardless: bool,
    ) -> Result<Result<u64, Refusal>, Impossible> {
        assert!(count > 0, "no counters are no batch");
        if row >= self.rows {
            return Ok(Err(Refusal::Gone));
        }
        let word = ROWS_AT_WORD + row * SEND_WORDS;
        let mut begun = false;
        let refused = loop {
            let last = self.words.send(word + COUNTER).load(Acquire);
            let sealers = self.words.send(word + SEALERS).load(Acquire);
            if self.words.send(word + GENERATION).load(Acquire) != generation {
                break Refusal::Gone;
            }
            let end = match last.checked_add(count) {
                Some(end) if end < COUNTER_LIMIT => end,
                _ => break Refusal::Exhausted,
            };
            let others = sealers & !self.bit;
            let beyond = others != 0 && self.is_beyond(row, generation, end, others)?;
            if beyond && !regardless {
                break Refusal::Span;
            }
            if let (Some(worker), Some(area)) = (self.publishes, area) {
                begun |= self.publish(worker, row, generation, last + 1, area);
                if sealers & self.bit == 0 {
                    self.words.send(word + SEALERS).fetch_or(self.bit, AcqRel);
                }
            }
            // Last: who dies before this has told of counters that others will have, which does no harm.
            let counter = self.words.send(word + COUNTER);
            if counter
                .compare_exchange(last, end, AcqRel, Relaxed)
                .is_err()
            {
                continue;
            }
            if self.words.send(word + GENERATION).load(Acquire) != generation {
                break Refusal::Gone;
            }
            self.beyond_span += u64::from(beyond);
            return Ok(Ok(last + 1));
        };
        if begun {
            self.take_back(row);
        }
        Ok(Err(refused))
    }

    /// The last counter that was given out; None if the row holds another tunnel.
    pub fn last(&self, row: usize, generation: u64) -> Option<u64> {
        if row >= self.rows {
            return None;
        }
        let word = ROWS_AT_WORD + row * SEND_WORDS;
        let last = self.words.send(word + COUNTER).load(Acquire);
        (self.words.send(word + GENERATION).load(Acquire) == generation).then_some(last)
    }

    /// Whether a batch up to counter `end` overtakes what one of the `others` (bits) has not sent.
    fn is_beyond(
        &self,
        row: usize,
        generation: u64,
        end: u64,
        mut others: u64,
    ) -> Result<bool, Impossible> {
        let cell = ROWS_AT_WORD + row * SPAN_WORDS;
        while others != 0 {
            let worker = others.trailing_zeros();
            others &= others - 1;
            if worker as usize >= self.workers {
                return Err(Impossible::Sealer(worker));
            }
            let worker = worker as usize;
            let load = |index: usize| self.words.span(worker, index).load(Acquire);
            if load(cell + SPAN_GENERATION) == generation
                && end > load(cell + FIRST).saturating_add(SPAN_MAX)
                && load(LIVE) != 0
                && load(cell + UNTIL) > self.words.released(worker).load(Acquire)
            {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// State the oldest counter of this tunnel that is in flight once this batch is sealed; gives whether it is the
    /// first one of its area.
    fn publish(
        &mut self,
        worker: usize,
        row: usize,
        generation: u64,
        first: u64,
        area: u64,
    ) -> bool {
        let cell = ROWS_AT_WORD + row * SPAN_WORDS;
        let words = &self.words;
        let load = |index: usize| words.span(worker, index).load(Relaxed);
        // Release: a death must find these stores made in this order.
        let store = |index: usize, value: u64| words.span(worker, index).store(value, Release);
        let released = words.released(worker).load(Acquire);
        let is_ours = load(cell + SPAN_GENERATION) == generation;
        let known = self.flights.get(&row);
        if known.is_none_or(|flight| flight.generation != generation) {
            if known.is_none() && self.flights.len() >= FLIGHTS_MAX {
                self.flights.clear(); // what is published stays, and is adopted as a predecessor's would be
            }
            let flight = self.flights.entry(row).or_insert_with(|| Flight {
                generation,
                batches: VecDeque::new(),
            });
            flight.generation = generation;
            flight.batches.clear();
            let until = load(cell + UNTIL);
            if is_ours && until > released {
                // A predecessor's, of which only the oldest counter and the last area are known.
                flight.batches.push_back((until - 1, load(cell + FIRST)));
            }
        }
        let Some(Flight { batches, .. }) = self.flights.get_mut(&row) else {
            return false; // it was put there above
        };
        while batches.front().is_some_and(|batch| batch.0 < released) {
            batches.pop_front();
        }
        let begins = batches.back().is_none_or(|batch| batch.0 != area);
        if begins {
            batches.push_back((area, first));
        }
        if load(TOUCHED) <= row as u64 {
            store(TOUCHED, row as u64 + 1);
        }
        if !is_ours {
            store(cell + UNTIL, 0);
            store(cell + SPAN_GENERATION, generation);
        }
        store(cell + FIRST, batches.front().map_or(first, |batch| batch.1));
        store(cell + UNTIL, area.saturating_add(1));
        begins
    }

    /// What was published last begins its area, and will not be sealed.
    fn take_back(&mut self, row: usize) {
        if let (Some(worker), Some(flight)) = (self.publishes, self.flights.get_mut(&row)) {
            flight.batches.pop_back();
            let until = flight
                .batches
                .back()
                .map_or(0, |batch| batch.0.saturating_add(1));
            let cell = ROWS_AT_WORD + row * SPAN_WORDS;
            self.words.span(worker, cell + UNTIL).store(until, Release);
        }
    }

    fn forget_unpublished(&self, published: u64) -> Result<(), Impossible> {
        let Some(worker) = self.publishes else {
            return Ok(());
        };
        let touched = self.words.span(worker, TOUCHED).load(Relaxed);
        if touched > self.rows as u64 {
            return Err(Impossible::Touched(touched));
        }
        for row in 0..touched as usize {
            let index = ROWS_AT_WORD + row * SPAN_WORDS + UNTIL;
            let until = self.words.span(worker, index);
            if until.load(Relaxed) > published {
                until.store(published, Release);
            }
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn in_flight(&self, row: usize) -> Vec<(u64, u64)> {
        let flight = self.flights.get(&row);
        flight.map_or(Vec::new(), |it| it.batches.iter().copied().collect())
    }

    #[cfg(test)]
    pub(crate) fn flights(&self) -> usize {
        self.flights.len()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
