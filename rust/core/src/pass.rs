//! One pass over one direction of a reader: its ring is filled, and emptied unless the other process does that; as
//! `nebula_mp.datapath.passes.Half`, whose order it is.
//!
//! ```text
//! Sealer | Opener -> [pass] -> UdpDrain | TunDrain
//! ```
//!
//! Knows when to take and to drop the lease; does not know who is to drain, and wakes nobody.
//! Source: docs/architecture.md, "The ring": the pass is the one that the ring's model proves.

use crate::drains::{TunDrain, UdpDrain};
use crate::error::Result;
use crate::opener::Opener;
use crate::ring::Consumer;
use crate::sealer::Sealer;

/// What fills a ring.
pub trait Fill {
    /// As `Sealer::poll`.
    fn poll(&mut self, budget: usize, now_us: u64) -> Result<usize>;
    /// Areas published and not yet released.
    fn waiting(&mut self) -> Result<u64>;
    /// As `Sealer::is_holding`.
    fn is_holding(&self) -> bool;
}

/// The end from which the same ring is emptied.
pub trait Empty {
    /// For the lease.
    fn ring(&mut self) -> &mut Consumer;
    /// Empty at most `budget` areas.
    fn drain(&mut self, budget: usize) -> Result<usize>;
}

/// What a pass did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// Packets that were taken from the descriptor.
    pub taken: usize,
    /// Areas wait that the other process is to drain: wake it.
    pub left: bool,
    /// The lease was wanted, and another process had it.
    pub refused: bool,
}

/// One pass; `drains`: whoever fills the ring is to empty it too.
pub fn pass(
    fill: &mut impl Fill,
    drain: &mut impl Empty,
    budget: usize,
    drains: bool,
    now_us: u64,
) -> Result<Passed> {
    if drains && drain.ring().try_take() {
        let areas = drain.ring().geometry().areas;
        drain.drain(areas)?; // seldom any
        let taken = fill.poll(budget, now_us)?;
        drain.drain(areas)?;
        let left = drain.ring().drop_lease()?;
        return Ok(Passed {
            taken,
            left,
            refused: false,
        });
    }
    Ok(Passed {
        taken: fill.poll(budget, now_us)?,
        left: fill.waiting()? > 0,
        refused: drains,
    })
}

impl Fill for Sealer {
    fn poll(&mut self, budget: usize, now_us: u64) -> Result<usize> {
        Self::poll(self, budget, now_us)
    }

    fn waiting(&mut self) -> Result<u64> {
        Self::waiting(self)
    }

    fn is_holding(&self) -> bool {
        Self::is_holding(self)
    }
}

impl Fill for Opener {
    fn poll(&mut self, budget: usize, now_us: u64) -> Result<usize> {
        Self::poll(self, budget, now_us)
    }

    fn waiting(&mut self) -> Result<u64> {
        Self::waiting(self)
    }

    fn is_holding(&self) -> bool {
        false // what came in is opened at once, or dropped
    }
}

impl Empty for UdpDrain {
    fn ring(&mut self) -> &mut Consumer {
        &mut self.ring
    }

    fn drain(&mut self, budget: usize) -> Result<usize> {
        Self::drain(self, budget)
    }
}

impl Empty for TunDrain {
    fn ring(&mut self) -> &mut Consumer {
        &mut self.ring
    }

    fn drain(&mut self, budget: usize) -> Result<usize> {
        Self::drain(self, budget)
    }
}
