//! A reader over everything of `api.ReaderMemory`.

use std::cell::RefCell;
use std::rc::Rc;

use nebula_mp_core::counters::{SendCounters, Traffic};
use nebula_mp_core::error::Result;
use nebula_mp_core::filler::Filler;
use nebula_mp_core::flows::FlowView;
use nebula_mp_core::layout;
use nebula_mp_core::opener::{Network, Opener};
use nebula_mp_core::peers::PeerView;
use nebula_mp_core::relays::RelayView;
use nebula_mp_core::ring::Recovery;
use nebula_mp_core::sealer::{Sealer, Shared};
use nebula_mp_core::tunnels::TunnelView;
use nebula_mp_core::upcalls::{Limits, Strangers, Upcalls};
use nebula_mp_core::windows::ReceiveWindows;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::attach::{consumer, producer, region, stats, Names, Offloads, RingFds};
use crate::drains::{TunDrain, UdpDrain};
use crate::faults::raise;
use crate::half::Half;

/// `api.ReaderMemory`, without the locks: here the instructions are atomic.
#[derive(FromPyObject)]
struct Memory<'py> {
    worker: u16,
    stats: i32,
    tunnels: i32,
    keys: i32,
    peers: i32,
    relays: i32,
    flows: Vec<i32>,
    seen: Vec<i32>,
    send: i32,
    windows: i32,
    spans: Vec<i32>,
    traffic: i32,
    seal_ring: RingFds,
    open_ring: RingFds,
    upcall_ring: RingFds,
    seal_states: Vec<i32>,
    strangers_in: Bound<'py, PyDict>,
    strangers_out: Bound<'py, PyDict>,
    control_bell: i32,
    stranger_bells: Bound<'py, PyDict>,
}

/// `api.UpcallLimits`.
#[derive(FromPyObject)]
struct UpcallLimits {
    per_tunnel: (u64, u64),
    plain: (u64, u64),
    datagrams: (u64, u64),
    unknown: (u64, u64),
    relayed: (u64, u64),
    moved: (u64, u64),
}

impl From<UpcallLimits> for Limits {
    fn from(it: UpcallLimits) -> Self {
        Self {
            per_tunnel: it.per_tunnel,
            plain: it.plain,
            datagrams: it.datagrams,
            unknown: it.unknown,
            relayed: it.relayed,
            moved: it.moved,
        }
    }
}

/// A sealer and an opener over one set of tables.
#[pyclass(unsendable, frozen)]
pub struct Reader {
    sealer: Rc<RefCell<Sealer>>,
    opener: Rc<RefCell<Opener>>,
    shared: Rc<RefCell<Shared>>,
}

/// Rings by the reader or control at their other end, in Python's order.
fn rings(dict: &Bound<'_, PyDict>) -> PyResult<Vec<(u16, RingFds)>> {
    dict.iter()
        .map(|(worker, ring)| Ok((worker.extract()?, ring.extract()?)))
        .collect()
}

#[pymethods]
impl Reader {
    /// `overlay`: (packed address, bits) of each network.
    #[new]
    #[pyo3(signature = (tun_fd, udp_fd, memory, *, names, overlay, limits, offloads, poison))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        tun_fd: i32,
        udp_fd: i32,
        memory: Memory<'_>,
        names: Names,
        overlay: Vec<(Vec<u8>, u8)>,
        limits: UpcallLimits,
        offloads: Offloads,
        poison: bool,
    ) -> PyResult<Self> {
        let strangers_in = rings(&memory.strangers_in)?;
        let mut strangers_out = Vec::new();
        for (owner, ring) in rings(&memory.strangers_out)? {
            let bell = memory.stranger_bells.as_any().get_item(owner)?.extract()?;
            strangers_out.push((owner, ring, bell));
        }
        let overlay = overlay
            .iter()
            .map(|(ip, bits)| network(ip, *bits))
            .collect();
        let attached = Attached {
            memory,
            strangers_in,
            strangers_out,
            names,
            limits: limits.into(),
            offloads: offloads.into(),
            poison,
        };
        attached.reader(tun_fd, udp_fd, overlay).map_err(raise)
    }

    fn seal_poll(&self, budget: usize, now_us: u64) -> PyResult<usize> {
        self.sealer.borrow_mut().poll(budget, now_us).map_err(raise)
    }

    #[getter]
    fn seal_holding(&self) -> bool {
        self.sealer.borrow().is_holding()
    }

    fn seal_waiting(&self) -> PyResult<u64> {
        self.sealer.borrow_mut().waiting().map_err(raise)
    }

    fn open_poll(&self, budget: usize, now_us: u64) -> PyResult<usize> {
        self.opener.borrow_mut().poll(budget, now_us).map_err(raise)
    }

    fn open_waiting(&self) -> PyResult<u64> {
        self.opener.borrow_mut().waiting().map_err(raise)
    }

    /// `bell` is the writer's; `clock` as for `accelerated.NativeReader`.
    fn outbound(&self, drain: &UdpDrain, bell: i32, clock: Py<PyAny>) -> Half {
        let stats = Rc::clone(&self.shared.borrow().stats);
        let (fill, drain) = (Rc::clone(&self.sealer), Rc::clone(&drain.drain));
        Half::new(fill, drain, bell, stats, clock)
    }

    fn inbound(&self, drain: &TunDrain, bell: i32, clock: Py<PyAny>) -> Half {
        let stats = Rc::clone(&self.shared.borrow().stats);
        let (fill, drain) = (Rc::clone(&self.opener), Rc::clone(&drain.drain));
        Half::new(fill, drain, bell, stats, clock)
    }

    fn sweep(&self) -> usize {
        self.shared.borrow_mut().tunnels.sweep()
    }
}

/// Everything a reader is made of, as Python gave it.
struct Attached<'py> {
    memory: Memory<'py>,
    strangers_in: Vec<(u16, RingFds)>,
    strangers_out: Vec<(u16, RingFds, i32)>,
    names: Names,
    limits: Limits,
    offloads: nebula_mp_core::opener::Offloads,
    poison: bool,
}

impl Attached<'_> {
    fn reader(self, tun_fd: i32, udp_fd: i32, overlay: Vec<Network>) -> Result<Reader> {
        let Self {
            memory,
            poison,
            offloads,
            ..
        } = self;
        let counted = Rc::new(stats(memory.stats, &self.names)?);
        let shared = Rc::new(RefCell::new(Shared {
            tunnels: TunnelView::new(
                region(memory.tunnels, &layout::TUNNELS, "")?,
                region(memory.keys, &layout::KEYS, "")?,
            )?,
            flows: FlowView::new(
                numbered(&memory.flows, &layout::FLOWS, "")?,
                numbered(&memory.seen, &layout::SEEN, "")?,
                usize::from(memory.worker),
                PeerView::new(region(memory.peers, &layout::PEERS, "")?)?,
                Rc::clone(&counted),
            )?,
            relays: RelayView::new(region(memory.relays, &layout::RELAYS, "")?)?,
            traffic: Traffic::new(region(memory.traffic, &layout::TRAFFIC, "")?)?,
            upcalls: Upcalls::new(
                producer(memory.upcall_ring, "upcall", poison)?,
                memory.control_bell,
                Rc::clone(&counted),
                self.limits,
            ),
            stats: Rc::clone(&counted),
        }));
        let seal = Filler::new(producer(memory.seal_ring, "seal", poison)?);
        let counters = SendCounters::new(
            region(memory.send, &layout::SEND, "")?,
            numbered(&memory.spans, &layout::SPAN, "")?,
            Some(usize::from(memory.worker)),
            numbered(&memory.seal_states, &layout::RING_STATE, "seal/")?,
            seal.area(),
        )?;
        let peers = PeerView::new(region(memory.peers, &layout::PEERS, "")?)?;
        let sealer = Rc::new(RefCell::new(Sealer::new(
            tun_fd,
            seal,
            peers,
            counters,
            Rc::clone(&shared),
            offloads.tun_header(),
        )));
        let strangers_out = self
            .strangers_out
            .iter()
            .map(|&(owner, ring, bell)| {
                Ok((owner, producer(ring, &format!("to {owner}"), poison)?, bell))
            })
            .collect::<Result<_>>()?;
        let strangers_in = self
            .strangers_in
            .iter()
            .map(|&(from, ring)| {
                let rows = nebula_mp_core::layout::ROWS_MAX;
                let name = format!("from {from}");
                consumer(ring, &name, None, Recovery::SendAgain, false, rows)
            })
            .collect::<Result<_>>()?;
        let opener = Opener::new(
            udp_fd,
            memory.worker,
            Filler::new(producer(memory.open_ring, "open", poison)?),
            ReceiveWindows::new(region(memory.windows, &layout::WINDOWS, "")?)?,
            Strangers::new(strangers_out, counted),
            strangers_in,
            overlay,
            Rc::clone(&sealer),
            offloads,
        );
        Ok(Reader {
            sealer,
            opener: Rc::new(RefCell::new(opener)),
            shared,
        })
    }
}

/// Regions of all workers, and control's behind them where it has one.
pub fn numbered(
    descriptors: &[i32],
    layout: &nebula_mp_core::region::Layout,
    prefix: &str,
) -> Result<Vec<nebula_mp_core::region::Region>> {
    descriptors
        .iter()
        .enumerate()
        .map(|(number, &descriptor)| region(descriptor, layout, &format!("{prefix}{number}")))
        .collect()
}

fn network(packed: &[u8], bits: u8) -> Network {
    let mut address = [0; 16];
    let length = packed.len().min(16);
    address[..length].copy_from_slice(&packed[..length]);
    (address, if length == 4 { 4 } else { 6 }, bits)
}
