//! Shared memory as the supervisor makes it.
//!
//! Offsets are spelled here, and by who uses this, from `nebula_mp.shm_table` and `shm_ring`, so that the crate's own
//! layout is not tested with itself.
#![allow(dead_code)] // each of the crates that include this file uses a part of it

use nebula_mp_core::filler::Filler;
use nebula_mp_core::region::Layout;
use nebula_mp_core::ring::{Consumer, Entry, Producer, Recovery};
use nebula_mp_core::testing::Memory;

pub const PAGE: usize = 4096;
pub const ROWS: usize = 64;

/// As `nebula_mp.shm_stats.NAMES`, of which the order matters to nobody but the page's own readers.
pub const NAMES: [&str; 65] = [
    "mp.passes",
    "mp.cpu.us",
    "mp.tun.rx.packets",
    "mp.tun.rx.bytes",
    "mp.tun.tx.packets",
    "mp.tun.tx.bytes",
    "mp.udp.rx.packets",
    "mp.udp.rx.bytes",
    "mp.udp.tx.packets",
    "mp.udp.tx.bytes",
    "mp.ring.full.seal",
    "mp.ring.full.open",
    "mp.ring.full.upcall",
    "mp.ring.full.stranger",
    "mp.ring.resumed",
    "mp.lease.refused",
    "mp.drain.switches",
    "mp.upcalls",
    "mp.upcalls.limited",
    "mp.strangers",
    "mp.relay.forwarded",
    "mp.flows.admitted",
    "mp.flows.evicted",
    "mp.counter.span",
    "mp.counter.busy",
    "mp.tun.again",
    "mp.tun.split",
    "mp.tun.drop.nobufs",
    "mp.tun.drop.refused",
    "mp.tun.drop.again",
    "mp.tun.drop.lost",
    "mp.tun.drop.offload",
    "mp.udp.gso_off",
    "mp.udp.drop.unreachable",
    "mp.udp.drop.toobig",
    "mp.udp.drop.eperm",
    "mp.udp.drop.other",
    "udp.tx.dropped",
    "mp.rx.icmp",
    "drop.short",
    "drop.version",
    "drop.type",
    "drop.looped",
    "drop.early",
    "drop.unknown_index",
    "drop.truncated",
    "drop.replay",
    "drop.old",
    "drop.auth",
    "drop.relay_index",
    "drop.inner_ip",
    "drop.source_addr",
    "drop.firewall.incoming.local_address",
    "drop.firewall.incoming.remote_address",
    "drop.firewall.incoming.no_rule",
    "drop.oversize",
    "drop.tun.inner_ip",
    "drop.tun.broadcast",
    "drop.tun.multicast",
    "drop.tun.own_address",
    "drop.tun.no_route",
    "drop.firewall.outgoing.local_address",
    "drop.firewall.outgoing.remote_address",
    "drop.firewall.outgoing.no_rule",
    "drop.exhausted",
];

pub fn region(magic: &'static [u8; 8], size: usize, parameters: &[u64]) -> Memory {
    let layout = Layout {
        name: "test",
        magic,
        version: if magic == b"nmp:flow" { 2 } else { 1 },
    };
    Memory::new(&layout, size, parameters)
}

pub fn rows(magic: &'static [u8; 8], row: usize, count: usize) -> Memory {
    region(magic, PAGE + row * count, &[count as u64])
}

/// The word at an offset in bytes.
pub fn word(memory: &Memory, at: usize) -> u64 {
    assert_eq!(at % 4, 0);
    let mut word = [0; 8];
    word.copy_from_slice(&memory.bytes(at, 8));
    u64::from_le_bytes(word)
}

/// Overwrite the word at an offset in bytes.
pub fn store_word(memory: &Memory, at: usize, word: u64) {
    memory.patch(at, &word.to_le_bytes());
}

/// A ring as its maker holds it.
pub struct Ring {
    pub data: Memory,
    pub state: Memory,
    bytes: usize,
}

impl Ring {
    pub fn new(areas: usize, area_bytes: usize, entries: usize) -> Self {
        let data_bytes = PAGE + areas * area_bytes;
        Self {
            bytes: data_bytes,
            data: region(
                b"nmp:data",
                data_bytes,
                &[areas as u64, area_bytes as u64, entries as u64],
            ),
            state: region(b"nmp:stat", PAGE, &[]),
        }
    }

    pub fn small() -> Self {
        Self::new(128, 16 * 1024, 32)
    }

    pub fn producer(&self, poison: bool) -> Producer {
        Producer::new(self.data.writable(), self.state.read_only(), poison).unwrap()
    }

    pub fn consumer(&self, recovery: Recovery, segments: bool) -> Consumer {
        let (data, state) = (self.data.read_only(), self.state.writable());
        Consumer::new(data, state, None, recovery, segments, ROWS).unwrap()
    }

    /// All that is or was in it.
    pub fn everything(&self) -> Vec<u8> {
        self.data.bytes(0, self.bytes)
    }

    /// What waits, which is gone then.
    pub fn drain(consumer: &mut Consumer) -> Vec<(Entry, Vec<u8>)> {
        let mut found = Vec::new();
        while consumer.pending().unwrap() > 0 {
            for number in consumer.load().unwrap()..consumer.len() {
                let (entry, data) = consumer.entry(number);
                found.push((entry, data.to_vec()));
            }
            consumer.release().unwrap();
        }
        found
    }

    /// Fill it, as another reader would.
    pub fn fill(&self, records: &[Vec<u8>]) {
        let mut filler = Filler::new(self.producer(true));
        for record in records {
            assert!(filler.try_room(record.len(), 1, 1).unwrap());
            let at = filler.at;
            filler.data()[at..at + record.len()].copy_from_slice(record);
            filler.describe(record.len(), 0, 0);
        }
        filler.flush();
    }
}
