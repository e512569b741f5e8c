//! Descriptors as Python has them, attached to.

use nebula_mp_core::error::{Fault, Result};
use nebula_mp_core::layout;
use nebula_mp_core::opener;
use nebula_mp_core::region::{Layout, Region};
use nebula_mp_core::ring::{Consumer, Producer, Recovery};
use nebula_mp_core::stats::StatsPage;
use pyo3::prelude::*;

/// `api.RingFds`.
#[derive(FromPyObject, Clone, Copy)]
pub struct RingFds {
    data: i32,
    state: i32,
}

/// `config.model.Offloads`.
#[derive(FromPyObject, Clone, Copy)]
pub struct Offloads {
    tso: bool,
    uso: bool,
    udp_gro: bool,
    udp_segment: bool,
}

impl From<Offloads> for opener::Offloads {
    fn from(it: Offloads) -> Self {
        Self {
            tso: it.tso,
            uso: it.uso,
            udp_gro: it.udp_gro,
            udp_segment: it.udp_segment,
        }
    }
}

/// The names of all counters in their order, and what a page says it was made for.
#[derive(FromPyObject)]
pub struct Names {
    names: Vec<String>,
    digest: u64,
}

/// Map with the rights that the descriptor gives; what needs more than that refuses it.
pub fn region(descriptor: i32, layout: &Layout, name: &str) -> Result<Region> {
    // SAFETY: asks for the flags of a descriptor, whatever it is; no memory is involved.
    let flags = unsafe { libc::fcntl(descriptor, libc::F_GETFL) };
    if flags < 0 {
        let number = std::io::Error::last_os_error().raw_os_error();
        return Err(Fault::Lost(number.unwrap_or(libc::EBADF)));
    }
    Region::attach(
        descriptor,
        layout,
        flags & libc::O_ACCMODE == libc::O_RDWR,
        name,
    )
}

/// A process's own page of counters.
pub fn stats(descriptor: i32, names: &Names) -> Result<StatsPage> {
    StatsPage::attach(descriptor, &names.names, names.digest)
}

/// The filling side of a ring.
pub fn producer(ring: RingFds, name: &str, poison: bool) -> Result<Producer> {
    Producer::new(
        region(ring.data, &layout::RING_DATA, name)?,
        region(ring.state, &layout::RING_STATE, name)?,
        poison,
    )
}

/// The draining side of a ring.
pub fn consumer(
    ring: RingFds,
    name: &str,
    holder: Option<u64>,
    recovery: Recovery,
    segments: bool,
    rows: usize,
) -> Result<Consumer> {
    Consumer::new(
        region(ring.data, &layout::RING_DATA, name)?,
        region(ring.state, &layout::RING_STATE, name)?,
        holder,
        recovery,
        segments,
        rows,
    )
}
