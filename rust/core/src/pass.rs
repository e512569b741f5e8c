//! One pass over one direction of a reader: its ring is filled, and emptied unless the other process does that; as
//! `nebula_mp.datapath.passes.Half`, whose order it is.
//!
//! ```text
//! Sealer | Opener -> [pass] -> UdpDrain | TunDrain
//! ```
//!
//! Knows when to take and to drop the lease; does not know who is to drain, and wakes nobody.
//! Source: docs/architecture.md, "Who drains": the pass is the one that the ring's model proves.

use crate::drains::{TunDrain, UdpDrain};
use crate::error::Result;
use crate::opener::Opener;
use crate::sealer::Sealer;

/// What fills a ring.
pub trait Fill {
    /// As `Sealer::poll`.
    fn poll(&mut self, budget: usize, now_us: u64) -> Result<usize>;
    /// Areas published and not yet released.
    fn waiting(&mut self) -> Result<u64>;
    /// As `Sealer::is_holding`. What came in is opened at once, or dropped.
    fn is_holding(&self) -> bool {
        false
    }
    /// As `Opener::take_forwarded`.
    fn take_forwarded(&mut self) -> bool {
        false
    }
}

/// The end from which the same ring is emptied.
pub trait Empty {
    /// How many areas the ring has.
    fn areas(&self) -> usize;
    /// Become the consumer; false when another process is.
    fn try_take(&mut self) -> bool;
    /// Empty at most `budget` areas.
    fn drain(&mut self, budget: usize) -> Result<usize>;
    /// Let the other process drain; true when areas are left.
    fn drop_lease(&mut self) -> Result<bool>;
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

/// One pass; `drains`: whoever fills the ring is to empty it too. If not, it empties a quarter of a ring that is three
/// quarters full, unless the other process is just at it.
pub fn pass(
    fill: &mut impl Fill,
    drain: &mut impl Empty,
    budget: usize,
    drains: bool,
    now_us: u64,
) -> Result<Passed> {
    if drains && drain.try_take() {
        let areas = drain.areas();
        drain.drain(areas)?; // seldom any
        let taken = fill.poll(budget, now_us)?;
        drain.drain(areas)?;
        let left = drain.drop_lease()?;
        return Ok(Passed {
            taken,
            left,
            refused: false,
        });
    }
    if !drains {
        let quarter = (drain.areas() / 4).max(1);
        if fill.waiting()? >= (drain.areas() - quarter) as u64 && drain.try_take() {
            drain.drain(quarter)?;
            drain.drop_lease()?; // the other process is woken for what is left
        }
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

    fn take_forwarded(&mut self) -> bool {
        Self::take_forwarded(self)
    }
}

/// Spelled once: the drains differ in what they do with an entry.
macro_rules! empty {
    ($drain:ty) => {
        impl Empty for $drain {
            fn areas(&self) -> usize {
                self.ring.geometry().areas
            }

            fn try_take(&mut self) -> bool {
                self.ring.try_take()
            }

            fn drain(&mut self, budget: usize) -> Result<usize> {
                Self::drain(self, budget)
            }

            fn drop_lease(&mut self) -> Result<bool> {
                self.ring.drop_lease()
            }
        }
    };
}

empty!(UdpDrain);
empty!(TunDrain);

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::error::Fault;

    /// Both ends of a ring, and what was done with them.
    #[derive(Default)]
    struct Ring {
        is_taken: bool,
        is_lost: bool,
        waiting: usize,
        done: RefCell<Vec<String>>,
    }

    struct Filling<'a>(&'a RefCell<Ring>);
    struct Draining<'a>(&'a RefCell<Ring>);

    impl Ring {
        fn note(&self, what: impl Into<String>) {
            self.done.borrow_mut().push(what.into());
        }
    }

    impl Fill for Filling<'_> {
        fn poll(&mut self, budget: usize, now_us: u64) -> Result<usize> {
            let mut ring = self.0.borrow_mut();
            ring.note(format!("fill {budget} at {now_us}"));
            if ring.is_lost {
                return Err(Fault::Lost(libc::EBADF));
            }
            ring.waiting += 1;
            Ok(3)
        }

        fn waiting(&mut self) -> Result<u64> {
            Ok(self.0.borrow().waiting as u64)
        }
    }

    impl Empty for Draining<'_> {
        fn areas(&self) -> usize {
            8
        }

        fn try_take(&mut self) -> bool {
            self.0.borrow().note("take");
            !self.0.borrow().is_taken
        }

        fn drain(&mut self, budget: usize) -> Result<usize> {
            let mut ring = self.0.borrow_mut();
            ring.note(format!("drain {} of {budget}", ring.waiting));
            let drained = ring.waiting.min(budget);
            ring.waiting -= drained;
            Ok(drained)
        }

        fn drop_lease(&mut self) -> Result<bool> {
            self.0.borrow().note("drop");
            Ok(self.0.borrow().waiting > 0)
        }
    }

    fn passed(ring: Ring, drains: bool) -> (Result<Passed>, Vec<String>) {
        let ring = RefCell::new(ring);
        let passed = pass(&mut Filling(&ring), &mut Draining(&ring), 64, drains, 7);
        (passed, ring.into_inner().done.into_inner())
    }

    #[test]
    fn the_ring_is_emptied_before_it_is_filled_and_after_while_the_lease_is_ours() {
        let (passed, done) = passed(
            Ring {
                waiting: 2,
                ..Ring::default()
            },
            true,
        );
        let expected = Passed {
            taken: 3,
            left: false,
            refused: false,
        };
        assert_eq!(passed.unwrap(), expected);
        assert_eq!(
            done,
            [
                "take",
                "drain 2 of 8",
                "fill 64 at 7",
                "drain 1 of 8",
                "drop"
            ]
        );
    }

    #[test]
    fn a_lease_that_another_process_has_is_left_alone_and_said() {
        let (passed, done) = passed(
            Ring {
                is_taken: true,
                ..Ring::default()
            },
            true,
        );
        let expected = Passed {
            taken: 3,
            left: true,
            refused: true,
        };
        assert_eq!(passed.unwrap(), expected);
        assert_eq!(done, ["take", "fill 64 at 7"]);
    }

    #[test]
    fn a_lease_that_is_not_wanted_is_not_asked_for() {
        let (passed, done) = passed(Ring::default(), false);
        let expected = Passed {
            taken: 3,
            left: true,
            refused: false,
        };
        assert_eq!(passed.unwrap(), expected);
        assert_eq!(done, ["fill 64 at 7"]);
    }

    #[test]
    fn of_a_ring_that_is_nearly_full_a_quarter_is_emptied_even_so() {
        for (waiting, is_taken, expected) in [
            (5, false, vec!["fill 64 at 7"]),
            (
                6,
                false,
                vec!["take", "drain 6 of 2", "drop", "fill 64 at 7"],
            ),
            (8, true, vec!["take", "fill 64 at 7"]),
        ] {
            let ring = Ring {
                waiting,
                is_taken,
                ..Ring::default()
            };
            let (passed, done) = passed(ring, false);
            assert_eq!(done, expected);
            assert!(passed.is_ok_and(|it| it.left && !it.refused));
        }
    }

    #[test]
    fn a_descriptor_that_is_lost_ends_the_pass() {
        let (passed, done) = passed(
            Ring {
                is_lost: true,
                ..Ring::default()
            },
            true,
        );
        assert!(matches!(passed, Err(Fault::Lost(libc::EBADF))));
        assert_eq!(done, ["take", "drain 0 of 8", "fill 64 at 7"]);
    }
}
