//! The two drains, each with the consumer's end of its ring.

use std::cell::RefCell;
use std::rc::Rc;

use nebula_mp_core::drains;
use nebula_mp_core::error::Result;
use nebula_mp_core::layout;
use nebula_mp_core::ring::{Consumer, Recovery};
use nebula_mp_core::tunnels::UnderlayView;
use pyo3::prelude::*;

use crate::attach::{consumer, region, stats, Names, Offloads, RingFds};
use crate::faults::raise;

/// `api.RingEnd`, without the locks.
#[derive(FromPyObject)]
struct RingEnd {
    fds: RingFds,
    name: String,
    holder: Option<u64>,
    rows: usize,
}

impl RingEnd {
    fn consumer(&self, recovery: Recovery) -> Result<Consumer> {
        consumer(self.fds, &self.name, self.holder, recovery, true, self.rows)
    }
}

/// Seal ring -> UDP socket.
#[pyclass(unsendable, frozen)]
pub struct UdpDrain {
    pub drain: Rc<RefCell<drains::UdpDrain>>,
}

/// Open ring -> TUN queue.
#[pyclass(unsendable, frozen)]
pub struct TunDrain {
    pub drain: Rc<RefCell<drains::TunDrain>>,
}

/// What both classes offer, `api.Drain`, spelled once: a Python class cannot be generic.
macro_rules! methods {
    ($name:ident: $($constructor:tt)*) => {
        #[pymethods]
        impl $name {
            $($constructor)*

            fn try_take(&self) -> bool {
                self.drain.borrow_mut().ring.try_take()
            }

            fn pending(&self) -> PyResult<u64> {
                self.drain.borrow_mut().ring.pending().map_err(raise)
            }

            fn drop(&self) -> PyResult<bool> {
                self.drain.borrow_mut().ring.drop_lease().map_err(raise)
            }

            #[getter]
            fn areas(&self) -> usize {
                self.drain.borrow().ring.geometry().areas
            }

            #[getter]
            fn given_up(&self) -> Option<&'static str> {
                self.drain.borrow().given_up
            }

            fn drain(&self, budget: usize) -> PyResult<usize> {
                self.drain.borrow_mut().drain(budget).map_err(raise)
            }
        }
    };
}

methods! {
    UdpDrain:

    /// `tunnels` and `page` are descriptors.
    #[new]
    #[pyo3(signature = (end, udp_fd, *, tunnels, page, names, offloads))]
    fn new(
        end: RingEnd,
        udp_fd: i32,
        tunnels: i32,
        page: i32,
        names: Names,
        offloads: Offloads,
    ) -> PyResult<Self> {
        let made = || {
            let view = UnderlayView::new(region(tunnels, &layout::TUNNELS, "")?)?;
            let ring = end.consumer(Recovery::SendAgain)?;
            drains::UdpDrain::new(ring, udp_fd, view, stats(page, &names)?, offloads.into())
        };
        Ok(Self { drain: Rc::new(RefCell::new(made().map_err(raise)?)) })
    }
}

methods! {
    TunDrain:

    /// `page` is a descriptor.
    #[new]
    #[pyo3(signature = (end, tun_fd, *, page, names, offloads))]
    fn new(
        end: RingEnd,
        tun_fd: i32,
        page: i32,
        names: Names,
        offloads: Offloads,
    ) -> PyResult<Self> {
        let made = || {
            let ring = end.consumer(Recovery::GoOnBehind)?;
            Ok(drains::TunDrain::new(ring, tun_fd, stats(page, &names)?, offloads.into()))
        };
        Ok(Self { drain: Rc::new(RefCell::new(made().map_err(raise)?)) })
    }
}
