//! TUN queue -> flow, peer, tunnel -> sealed into the seal ring; as `nebula_mp.datapath.sealing` and `.runs`.

use std::cell::RefCell;
use std::rc::Rc;

use crate::counters::{SendCounters, Traffic};
use crate::error::Result;
use crate::filler::Filler;
use crate::flows::FlowView;
use crate::peers::PeerView;
use crate::stats::StatsPage;
use crate::tunnels::TunnelView;
use crate::upcalls::Upcalls;

/// What a reader's two halves share; they take turns within one process.
pub struct Shared {
    /// Rows by local index, with keys.
    pub tunnels: TunnelView,
    /// Verdicts.
    pub flows: FlowView,
    /// This reader's share.
    pub traffic: Traffic,
    /// To control.
    pub upcalls: Upcalls,
    /// This reader's page.
    pub stats: Rc<StatsPage>,
}

/// The outbound half of a reader.
pub struct Sealer {
    _todo: (),
}

impl Sealer {
    /// `tun_header`: every packet of the queue has a virtio header in front.
    pub fn new(
        tun_fd: i32,
        filler: Filler,
        peers: PeerView,
        counters: SendCounters,
        shared: Rc<RefCell<Shared>>,
        tun_header: bool,
    ) -> Self {
        let _ = (tun_fd, filler, peers, counters, shared, tun_header);
        todo!()
    }

    /// As `api.Sealer.poll`; `now_us` is the monotonic clock.
    pub fn poll(&mut self, budget: usize, now_us: u64) -> Result<usize> {
        todo!("{budget} {now_us}")
    }

    /// As `api.Sealer.is_holding`.
    pub fn is_holding(&self) -> bool {
        todo!()
    }

    /// As `api.Sealer.waiting`.
    pub fn waiting(&mut self) -> Result<u64> {
        todo!()
    }
}
