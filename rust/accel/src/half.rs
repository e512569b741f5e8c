//! A reader's two directions, each with both ends of its ring; and what it sleeps on.

use std::cell::RefCell;
use std::rc::Rc;

use nebula_mp_core::error::Result;
use nebula_mp_core::pass::{pass, Empty, Fill};
use nebula_mp_core::stats::StatsPage;
use nebula_mp_core::{sources, sys};
use pyo3::prelude::*;

use crate::faults::raise;

/// `api.MORE`.
const MORE: u8 = 1;
/// `api.HOLDING`.
const HOLDING: u8 = 2;
/// `api.FORWARDED`.
const FORWARDED: u8 = 4;

/// What `Half.work` does: budget, whether to drain, the monotonic clock in microseconds -> flags.
type Work = dyn FnMut(usize, bool, u64) -> Result<u8>;

/// One direction.
#[pyclass(unsendable, frozen)]
pub struct Half {
    work: RefCell<Box<Work>>,
    clock: Py<PyAny>,
}

impl Half {
    /// `bell` is the other process's, borrowed for as long as this lives; `clock` gives seconds.
    pub fn new<F: Fill + 'static, D: Empty + 'static>(
        fill: Rc<RefCell<F>>,
        drain: Rc<RefCell<D>>,
        bell: i32,
        stats: Rc<StatsPage>,
        clock: Py<PyAny>,
    ) -> Self {
        let work = move |budget, drains, now_us| {
            let fill = &mut *fill.borrow_mut();
            let passed = pass(fill, &mut *drain.borrow_mut(), budget, drains, now_us)?;
            if passed.refused {
                stats.add(stats.slots.lease_refused, 1);
            }
            if passed.left {
                sys::ring_bell(bell);
            }
            let flag = |is_set, flag| if is_set { flag } else { 0 };
            Ok(flag(passed.taken >= budget, MORE)
                | flag(fill.is_holding(), HOLDING)
                | flag(fill.take_forwarded(), FORWARDED))
        };
        Self {
            work: RefCell::new(Box::new(work)),
            clock,
        }
    }
}

#[pymethods]
impl Half {
    fn work(&self, py: Python<'_>, budget: usize, drains: bool) -> PyResult<u8> {
        let now: f64 = self.clock.bind(py).call0()?.extract()?;
        (*self.work.borrow_mut())(budget, drains, (now * 1e6) as u64).map_err(raise)
    }
}

/// `api.Sources`.
#[pyclass(unsendable, frozen)]
pub struct Sources {
    sources: RefCell<sources::Sources>,
}

#[pymethods]
impl Sources {
    #[new]
    fn new(descriptors: Vec<i32>) -> Self {
        Self {
            sources: RefCell::new(sources::Sources::new(&descriptors)),
        }
    }

    fn wait(&self, limit_ms: i32, heeded: u64) -> PyResult<u64> {
        self.sources
            .borrow_mut()
            .wait(limit_ms, heeded)
            .map_err(raise)
    }
}
