//! UDP socket -> tunnel, window, key -> opened into the open ring; as `nebula_mp.datapath.opening`.

use std::cell::RefCell;
use std::rc::Rc;

use crate::error::Result;
use crate::filler::Filler;
use crate::ring::Consumer;
use crate::sealer::Shared;
use crate::upcalls::Strangers;
use crate::windows::ReceiveWindows;

/// Which superpackets the TUN device takes, and how datagrams come.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Offloads {
    pub tso: bool,
    pub uso: bool,
    pub udp_gro: bool,
    pub udp_segment: bool,
}

impl Offloads {
    /// Every packet of a TUN queue has a virtio header in front.
    pub fn tun_header(&self) -> bool {
        self.tso || self.uso
    }
}

/// A network inside the overlay: address (IPv4 in the first 4 bytes), family 4 or 6, bits.
pub type Network = ([u8; 16], u8, u8);

/// The inbound half of a reader.
pub struct Opener {
    _todo: (),
}

impl Opener {
    /// As `PythonOpener`.
    #[allow(clippy::too_many_arguments)]
    pub fn new(
        udp_fd: i32,
        worker: u16,
        filler: Filler,
        windows: ReceiveWindows,
        strangers: Strangers,
        strangers_in: Vec<Consumer>,
        overlay: Vec<Network>,
        shared: Rc<RefCell<Shared>>,
        offloads: Offloads,
    ) -> Self {
        let _ = (
            udp_fd,
            worker,
            filler,
            windows,
            strangers,
            strangers_in,
            overlay,
            shared,
            offloads,
        );
        todo!()
    }

    /// As `api.Opener.poll`.
    pub fn poll(&mut self, budget: usize, now_us: u64) -> Result<usize> {
        todo!("{budget} {now_us}")
    }

    /// As `api.Opener.waiting`.
    pub fn waiting(&mut self) -> Result<u64> {
        todo!()
    }
}
