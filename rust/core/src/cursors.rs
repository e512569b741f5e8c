//! The ring's protocol: which of its words are loaded and stored, in which order, and what they may say.
//!
//! ```text
//! Producer -> Filling  -> head, count, number        Consumer -> Draining -> tail, lease, progress
//! ```
//!
//! Knows words alone, wherever they lie: `ring` runs this on a mapped region, and the model in `tests/loom_ring.rs`
//! on loom's atomics, with a death at each step. The states of an area, and why each step is as it is, are in
//! `nebula_mp.shm_ring`. Orders that matter, each of which the model finds to be needed:
//!
//! - head: Release, Acquire. Who sees it sees the area's entries and bytes.
//! - tail: Release, Acquire. Who sees it overwrites the area; all reading of it came before.
//! - lease: Acquire when taken, Release when dropped. The next holder sees the last one's tail.
//!
//! Two words are of no order: `progress` is read by a successor alone, after the supervisor has waited for the death of
//! who stored it; `count` and `number` belong to the area, and so to head.
//!
//! Wake-ups need no order here: who has filled without the lease rings the bell whenever areas wait, and to ring
//! or to sleep is a system call. All the same the lease is dropped by a compare-and-swap that is a full barrier, so that
//! whatever its last holder looks at next, it looks at it when others can see that the lease is free. It costs as much as
//! the check that the lease is ours and a fence.

use std::borrow::Cow;
use std::fmt::Display;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use crate::error::{Fault, Result};
use crate::words::Word;

/// Low bits of `progress`, which count entries; the rest is the area's number.
const PROGRESS_BITS: u32 = 12;
const PROGRESS_MASK: u64 = (1 << PROGRESS_BITS) - 1;

/// Most entries of an area: what `progress` can count.
pub const ENTRIES_MAX: usize = PROGRESS_MASK as usize;

/// Which of a ring's two regions contradicts us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Part {
    Data,
    State,
}

/// Where a ring's words are.
pub trait RingWords {
    /// Areas published; the producer's.
    fn head(&self) -> impl Word;
    /// Areas released; the consumer's.
    fn tail(&self) -> impl Word;
    /// Who drains, or 0.
    fn lease(&self) -> impl Word;
    /// Area number and entries begun; the consumer's.
    fn progress(&self) -> impl Word;
    /// Entries of the area at this place; the producer's.
    fn count(&self, place: usize) -> impl Word;
    /// Number of the area at this place; the producer's.
    fn number(&self, place: usize) -> impl Word;
    /// Make the fault that says what is wrong.
    fn contradiction(
        &self,
        of: Part,
        field: impl Into<Cow<'static, str>>,
        value: impl Display,
        expected: impl Display,
    ) -> Fault;
}

/// The producer's cursor.
pub struct Filling {
    areas: u64,
    head: u64,
    tail: u64,
}

impl Filling {
    /// Go on where a predecessor stopped, or begin. `areas` is 1 or more.
    pub fn attach(words: &impl RingWords, areas: usize) -> Result<Self> {
        let mut filling = Self {
            areas: areas as u64,
            head: words.head().load(Relaxed),
            tail: words.tail().load(Acquire),
        };
        filling.take_over(words, filling.tail)?;
        Ok(filling)
    }

    /// Number of the area that is, or would be, filled.
    #[inline]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Number of the oldest area that was not released when we looked.
    #[inline]
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Where this area is in the ring.
    #[inline]
    pub fn place(&self, area: u64) -> usize {
        (area % self.areas) as usize
    }

    /// Whether the area at head is ours to fill; what was released before is ours too, and `tail` behind it.
    #[inline]
    pub fn try_begin(&mut self, words: &impl RingWords) -> Result<bool> {
        self.take_over(words, words.tail().load(Acquire))?;
        Ok(self.head - self.tail < self.areas)
    }

    /// Hand the area, which has `entries`, to the consumer.
    #[inline]
    pub fn publish(&mut self, words: &impl RingWords, entries: usize) {
        let place = self.place(self.head);
        words.count(place).store(entries as u64, Relaxed);
        words.number(place).store(self.head, Relaxed);
        // Wrapping: a predecessor that went mad may have left any value.
        self.head = self.head.wrapping_add(1);
        // Last: the consumer reads the area as soon as head has passed it.
        words.head().store(self.head, Release);
    }

    /// Areas published and not yet released.
    #[inline]
    pub fn waiting(&mut self, words: &impl RingWords) -> Result<u64> {
        self.take_over(words, words.tail().load(Acquire))?;
        Ok(self.head - self.tail)
    }

    /// Take over the consumer's cursor, which lies between our last and head.
    #[inline]
    fn take_over(&mut self, words: &impl RingWords, tail: u64) -> Result<()> {
        if !(self.tail..=self.head).contains(&tail) || self.head - tail > self.areas {
            let low = self.tail.max(self.head.saturating_sub(self.areas));
            let expected = format!("{low}..{}", self.head);
            return Err(words.contradiction(Part::Data, "tail", tail, expected));
        }
        self.tail = tail;
        Ok(())
    }
}

/// The consumer's cursor, and the lease if the ring has one.
pub struct Draining {
    areas: u64,
    holder: Option<u64>,
    goes_on: bool,
    drains: bool,
    head: u64,
    tail: u64,
}

impl Draining {
    /// Go on where a predecessor stopped, or begin. `holder`: our lease word, if the ring has a lease. `goes_on`: behind
    /// what a predecessor has begun.
    pub fn attach(
        words: &impl RingWords,
        areas: usize,
        holder: Option<u64>,
        goes_on: bool,
    ) -> Result<Self> {
        let tail = words.tail().load(Acquire);
        let mut draining = Self {
            areas: areas as u64,
            holder,
            goes_on,
            drains: holder.is_none(),
            head: tail,
            tail,
        };
        if draining.drains {
            draining.pending(words)?;
        }
        Ok(draining)
    }

    /// Whether we are the consumer.
    #[inline]
    pub fn drains(&self) -> bool {
        self.drains
    }

    /// Number of the oldest area that is not released.
    #[inline]
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// Where that area is in the ring.
    #[inline]
    pub fn place(&self) -> usize {
        (self.tail % self.areas) as usize
    }

    /// Become the consumer; false when another process is.
    #[inline]
    pub fn try_take(&mut self, words: &impl RingWords) -> bool {
        if let Some(holder) = self.holder {
            let lease = words.lease();
            // Looked at first, so that a holder is not disturbed by who tries in vain.
            if lease.load(Relaxed) != 0
                || lease.compare_exchange(0, holder, Acquire, Relaxed).is_err()
            {
                return false;
            }
        }
        // Loaded after the lease was taken, which its last holder dropped after it had stored tail.
        self.tail = words.tail().load(Acquire);
        self.head = self.tail;
        self.drains = true;
        true
    }

    /// Let another process drain, between two areas; true when areas are left: then ring the bell.
    #[inline]
    pub fn drop_lease(&mut self, words: &impl RingWords) -> Result<bool> {
        let left = self.pending(words)? > 0;
        if let Some(holder) = self.holder {
            self.drains = false;
            let dropped = words.lease().compare_exchange(holder, 0, SeqCst, Relaxed);
            dropped.map_err(|found| not_ours(words, found, holder))?;
        }
        Ok(left)
    }

    /// Areas that are ready. Only while we are the consumer.
    #[inline]
    pub fn pending(&mut self, words: &impl RingWords) -> Result<u64> {
        assert!(self.drains, "try_take first");
        self.head = words.head().load(Acquire);
        let (tail, areas) = (self.tail, self.areas);
        match self.head.checked_sub(tail) {
            Some(ready) if ready <= areas => Ok(ready),
            _ => {
                let expected = format!("{tail}..{}", u128::from(tail) + u128::from(areas));
                Err(words.contradiction(Part::Data, "head", self.head, expected))
            }
        }
    }

    /// How many entries the oldest ready area has; `pending` was above 0.
    #[inline]
    pub fn entries(&self, words: &impl RingWords, entries_max: usize) -> Result<usize> {
        assert!(self.drains, "try_take first");
        assert!(self.head > self.tail, "pending first");
        self.check_number(words)?;
        match words.count(self.place()).load(Relaxed) {
            count if (1..=entries_max as u64).contains(&count) => Ok(count as usize),
            count => Err(self.bad(words, "entries", count, format_args!("1..{entries_max}"))),
        }
    }

    /// How many of these entries a predecessor has begun, which are not to be delivered again.
    #[inline]
    pub fn begun(&self, words: &impl RingWords, entries: usize) -> Result<usize> {
        if !self.goes_on {
            return Ok(0);
        }
        let progress = words.progress().load(Relaxed);
        let (number, begun) = (progress >> PROGRESS_BITS, progress & PROGRESS_MASK);
        if number < self.tail {
            return Ok(0); // of an area that was released
        }
        if number > self.tail || begun > entries as u64 {
            let expected = format!("at most {:?}", (self.tail, entries));
            let found = format!("{:?}", (number, begun));
            return Err(words.contradiction(Part::State, "progress", found, expected));
        }
        Ok(begun as usize)
    }

    /// Note that this entry is begun, before the system call on it.
    #[inline]
    pub fn begin(&self, words: &impl RingWords, entry: usize) {
        if self.goes_on {
            let progress = self.tail << PROGRESS_BITS | (entry as u64 + 1);
            words.progress().store(progress, Relaxed);
        }
    }

    /// Give the area back, after the last system call on it has returned.
    #[inline]
    pub fn release(&mut self, words: &impl RingWords) -> Result<()> {
        if let Some(holder) = self.holder {
            let found = words.lease().load(Relaxed);
            if found != holder {
                return Err(not_ours(words, found, holder));
            }
        }
        self.check_number(words)?;
        self.tail += 1;
        words.tail().store(self.tail, Release);
        Ok(())
    }

    /// Make the fault that says what is wrong with the area at tail.
    #[cold]
    pub fn bad(
        &self,
        words: &impl RingWords,
        field: &str,
        value: impl Display,
        expected: impl Display,
    ) -> Fault {
        let field = format!("area {}: {field}", self.tail);
        words.contradiction(Part::Data, field, value, expected)
    }

    #[inline]
    fn check_number(&self, words: &impl RingWords) -> Result<()> {
        let found = words.number(self.place()).load(Relaxed);
        if found != self.tail {
            let expected = format!("{}: it changed hands while it was ours", self.tail);
            return Err(self.bad(words, "number", found, expected));
        }
        Ok(())
    }
}

#[cold]
fn not_ours(words: &impl RingWords, found: u64, holder: u64) -> Fault {
    words.contradiction(
        Part::State,
        "lease",
        format!("{found:#x}"),
        format!("our own {holder:#x}"),
    )
}
