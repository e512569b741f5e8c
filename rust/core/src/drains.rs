//! Ring -> UDP socket or TUN queue; as `nebula_mp.datapath.drains`.

use crate::error::Result;
use crate::opener::Offloads;
use crate::ring::Consumer;
use crate::stats::StatsPage;
use crate::tunnels::UnderlayView;

/// Seal ring -> UDP.
pub struct UdpDrain {
    /// For the lease.
    pub ring: Consumer,
    /// `api.Drain.given_up`.
    pub given_up: Option<&'static str>,
    _todo: (),
}

impl UdpDrain {
    /// As `Kernel.drain_udp`.
    pub fn new(
        ring: Consumer,
        udp_fd: i32,
        underlay: UnderlayView,
        stats: StatsPage,
        offloads: Offloads,
    ) -> Result<Self> {
        let _ = (ring, udp_fd, underlay, stats, offloads);
        todo!()
    }

    /// As `api.Drain.drain`.
    pub fn drain(&mut self, budget: usize) -> Result<usize> {
        todo!("{budget}")
    }
}

/// Open ring -> TUN queue.
pub struct TunDrain {
    /// For the lease.
    pub ring: Consumer,
    /// `api.Drain.given_up`.
    pub given_up: Option<&'static str>,
    _todo: (),
}

impl TunDrain {
    /// As `Kernel.drain_tun`.
    pub fn new(ring: Consumer, tun_fd: i32, stats: StatsPage, offloads: Offloads) -> Self {
        let _ = (ring, tun_fd, stats, offloads);
        todo!()
    }

    /// As `api.Drain.drain`.
    pub fn drain(&mut self, budget: usize) -> Result<usize> {
        todo!("{budget}")
    }
}
