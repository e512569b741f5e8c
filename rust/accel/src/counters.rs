//! Control's send counters: readers have theirs in a `Reader`.

use std::cell::RefCell;

use nebula_mp_core::counters::{self, Refusal};
use nebula_mp_core::layout;
use pyo3::prelude::*;

use crate::attach::region;
use crate::faults::raise;
use crate::reader::numbered;

/// What `accelerated.NativeSendCounters` takes counters from.
#[pyclass(unsendable, frozen)]
pub struct SendCounters {
    counters: RefCell<counters::SendCounters>,
}

#[pymethods]
impl SendCounters {
    /// Descriptors; `send` is writable, all others are read-only.
    #[new]
    #[pyo3(signature = (send, spans, seal_states, worker = None, published = 0))]
    fn new(
        send: i32,
        spans: Vec<i32>,
        seal_states: Vec<i32>,
        worker: Option<usize>,
        published: u64,
    ) -> PyResult<Self> {
        let made = || {
            counters::SendCounters::new(
                region(send, &layout::SEND, "")?,
                numbered(&spans, &layout::SPAN, "")?,
                worker,
                numbered(&seal_states, &layout::RING_STATE, "seal/")?,
                published,
            )
        };
        Ok(Self {
            counters: RefCell::new(made().map_err(raise)?),
        })
    }

    /// The first of `count` counters, or the name of a `shm_counters.Refusal`.
    #[pyo3(signature = (row, generation, count, area = None, *, regardless = false))]
    fn reserve<'py>(
        &self,
        py: Python<'py>,
        row: usize,
        generation: u64,
        count: u64,
        area: Option<u64>,
        regardless: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let mut counters = self.counters.borrow_mut();
        let found = counters
            .reserve(row, generation, count, area, regardless)
            .map_err(raise)?;
        Ok(match found {
            Ok(first) => first.into_pyobject(py)?.into_any(),
            Err(refusal) => {
                let name = match refusal {
                    Refusal::Gone => "gone",
                    Refusal::Exhausted => "exhausted",
                    Refusal::Span => "span",
                };
                name.into_pyobject(py)?.into_any()
            }
        })
    }

    /// Batches that were given counters although they end beyond the span; only grows.
    #[getter]
    fn beyond_span(&self) -> u64 {
        self.counters.borrow().beyond_span()
    }
}
