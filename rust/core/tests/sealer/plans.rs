//! What the device gives: superpackets and single packets, in the fewest words.

pub use crate::packets::{Plan, ACK, CWR, FIN, PSH, TCP, TIMESTAMPS, UDP};

const NO_HEADER: [u8; 10] = [0; 10];

/// IPv4 and TCP, with `length` bytes of payload in pieces of `size`.
pub fn tcp(size: usize, length: usize) -> Plan {
    Plan::new(4, TCP, bytes(length), size)
}

/// The same over UDP.
pub fn udp(size: usize, length: usize) -> Plan {
    Plan::new(4, UDP, bytes(length), size)
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|each| (each % 251) as u8).collect()
}

/// Make it one of the longest there can be, headers included.
pub fn longest(plan: Plan) -> Plan {
    let most = if plan.version == 6 { 65_575 } else { 65_535 };
    let payload = bytes(most - plan.header_bytes());
    Plan { payload, ..plan }
}

/// A superpacket as the device gives it.
pub fn frame(plan: &Plan) -> Vec<u8> {
    [&plan.virtio()[..], &plan.packet()].concat()
}

/// A packet that is complete as it is, behind a header that says so.
pub fn whole(packet: &[u8]) -> Vec<u8> {
    [&NO_HEADER, packet].concat()
}

/// The same over IPv6.
pub fn v6(plan: Plan) -> Plan {
    Plan { version: 6, ..plan }
}

/// A packet of a UDP flow, as the device gives it.
pub fn plain(number: u32, size: usize) -> Vec<u8> {
    whole(&small(number, size))
}

/// A packet of a UDP flow, with `size` bytes of payload.
pub fn small(number: u32, size: usize) -> Vec<u8> {
    let mut payload = number.to_be_bytes().to_vec();
    payload.resize(size.max(4), 0xA5);
    let mut plan = Plan::new(4, UDP, payload, usize::MAX);
    plan.ports = (5000, 53);
    plan.one(0)
}
