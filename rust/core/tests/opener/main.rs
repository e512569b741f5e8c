//! UDP to open ring: each datagram is delivered, handed over, or counted under one reason; and what was sealed
//! comes out of the ring, cut back, byte for byte and in order.
#![cfg(all(not(miri), not(loom)))]

mod handing;
mod host;
mod joining;
#[path = "../common/memory.rs"]
mod memory;
mod packets;
mod refusing;
mod streams;

use host::{Host, Plan};
use packets::Flow;

const KINDS: [(bool, bool); 4] = [(false, true), (true, true), (false, false), (true, false)];

/// A host that admits the flow of `packet`.
fn host_for(plan: Plan, packet: &[u8]) -> Host {
    let host = Host::new(plan);
    host.allow(packet);
    host
}

/// So many packets of a flow, the last one shorter.
fn train(flow: &mut Flow, count: usize, bytes: usize) -> Vec<Vec<u8>> {
    let mut packets: Vec<_> = (1..count).map(|_| flow.next(bytes)).collect();
    packets.push(flow.next(bytes / 2 + 1));
    packets
}

fn sealed(host: &Host, first: u64, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let numbered = (first..).zip(packets);
    numbered
        .map(|(counter, each)| host.seal(counter, each))
        .collect()
}
