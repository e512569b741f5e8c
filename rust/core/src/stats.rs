//! Counters in shared memory: one page for each process, written by it alone; as `nebula_mp.shm_stats`.
//!
//! The names and their order are Python's: `Slots::from_names` is given `shm_stats.NAMES` when a part is made, and
//! refuses if one that this crate counts is missing.

use crate::error::Result;

/// Where each counter stands that this crate counts; one field for each name, dots and `mp.` left out.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Slots {
    pub tun_rx_packets: usize, // bytes are the next slot, as for all `*_packets`
    pub tun_tx_packets: usize,
    pub udp_rx_packets: usize,
    pub udp_tx_packets: usize,
    pub ring_full_seal: usize,
    pub ring_full_open: usize,
    pub ring_full_upcall: usize,
    pub ring_full_stranger: usize,
    pub ring_resumed: usize,
    pub upcalls: usize,
    pub upcalls_limited: usize,
    pub strangers: usize,
    pub counter_span: usize,
    pub tun_again: usize,
    pub tun_split: usize,
    pub tun_drop_nobufs: usize,
    pub tun_drop_refused: usize,
    pub tun_drop_again: usize,
    pub tun_drop_offload: usize,
    pub udp_gso_off: usize,
    pub udp_drop_unreachable: usize,
    pub udp_drop_toobig: usize,
    pub udp_drop_eperm: usize,
    pub udp_drop_other: usize,
    pub udp_tx_dropped: usize, // name: udp.tx.dropped
    pub rx_icmp: usize,
    pub drop_oversize: usize, // from here on names begin with `drop.`
    pub drop_short: usize,
    pub drop_version: usize,
    pub drop_type: usize,
    pub drop_looped: usize,
    pub drop_unknown_index: usize,
    pub drop_truncated: usize,
    pub drop_replay: usize,
    pub drop_old: usize,
    pub drop_auth: usize,
    pub drop_inner_ip: usize,
    pub drop_source_addr: usize,
    pub drop_firewall_incoming_no_rule: usize,
    pub drop_firewall_outgoing_no_rule: usize,
    pub drop_tun_inner_ip: usize,
    pub drop_exhausted: usize,
}

/// A process's page: `add` in the process itself.
pub struct StatsPage {
    /// Where to count.
    pub slots: Slots,
    _todo: (),
}

impl StatsPage {
    /// Attach to the page behind `descriptor`; `names` are `shm_stats.NAMES`, `digest` is that of the names.
    pub fn attach(descriptor: i32, names: &[String], digest: u64) -> Result<Self> {
        todo!("{descriptor} {} {digest}", names.len())
    }

    /// Count `amount` at a slot.
    pub fn add(&self, slot: usize, amount: u64) {
        todo!("{slot} {amount}")
    }

    /// Count packets at a `*_packets` slot and bytes at the one behind it.
    pub fn add_traffic(&self, slot: usize, packets: u64, bytes: u64) {
        todo!("{slot} {packets} {bytes}")
    }
}
