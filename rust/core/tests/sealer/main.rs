//! TUN queue to seal ring: what is sealed, what goes up, what is counted, and that no counter is used twice.

mod counting;
mod dropping;
mod histories;
#[path = "../common/memory.rs"]
mod memory;
#[path = "../common/packets.rs"]
mod packets;
mod plans;
mod site;
mod superpackets;

use nebula_mp_core::sealer::Sealer;
use nebula_mp_core::upcalls::Reason;

use site::Site;

const NEW_FLOW_OUT: u32 = Reason::NewFlowOut as u32;
const NO_TUNNEL: u32 = Reason::NoTunnel as u32;

/// Poll until nothing waits; gives the number of packets.
fn poll_all(site: &Site, sealer: &mut Sealer) -> usize {
    let mut taken = 0;
    loop {
        match sealer.poll(1000, site.now_us).unwrap() {
            0 => return taken,
            some => taken += some,
        }
    }
}
