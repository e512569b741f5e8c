//! When several packets mean exactly what one superpacket means; as `nebula_mp.datapath.coalesce`.
//!
//! A run is grown packet by packet: the caller opens the next packet somewhere, asks `Run::try_add`, and on
//! success needs of it nothing but its payload, behind the payload before it.

use crate::virtio::{Gso, HEADER_BYTES};

/// The longest headers of a packet that can be joined: IPv6 and TCP with all options.
pub const JOINT_HEADERS_MAX: usize = 100;

/// Where things are in a packet that could be joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Kind of superpacket it could begin.
    pub gso: Gso,
    /// Offset of the transport header.
    pub transport: usize,
    /// IP and transport header.
    pub header_bytes: usize,
    /// Offset of the IP addresses.
    pub addresses_at: usize,
    /// TCP or UDP.
    pub protocol: u8,
}

/// Where things are in a packet that may be the first of a superpacket; None if it may not be. Lengths and
/// checksums are left to `Run`.
pub fn shape_of(packet: &[u8]) -> Option<Shape> {
    todo!("{}", packet.len())
}

/// Packets that are one superpacket so far.
pub struct Run {
    /// Of all its packets.
    pub shape: Shape,
    /// How many.
    pub packets: usize,
    /// Bytes of each packet, perhaps without the last.
    pub size: usize,
    /// Bytes of payload of all.
    pub payload_bytes: usize,
    /// No further packet may join: the last one was shorter, or had PSH.
    pub is_closed: bool,
}

impl Run {
    /// Begin with a whole packet; None if it cannot be the first of a superpacket of several: its shape, its
    /// lengths or its checksums are wrong, or (TCP) it has PSH. Says nothing about which kinds the device takes.
    pub fn begin(packet: &[u8]) -> Option<Self> {
        todo!("{}", packet.len())
    }

    /// Whether a packet may join the run, by everything in `docs`: equal headers, consecutive, equal size or
    /// shorter, right lengths and checksums, no more than fits a superpacket. If it does, it is counted.
    pub fn try_add(&mut self, packet: &[u8]) -> bool {
        todo!("{}", packet.len())
    }

    /// Virtio, IP and transport header of the superpacket, written to the end of `out`; gives its bytes, so that it
    /// begins at `out.len() - bytes`. `out` has room for `HEADER_BYTES + shape.header_bytes`. Of a single packet
    /// it is an empty virtio header and the packet's own headers.
    pub fn write_head(&self, out: &mut [u8]) -> usize {
        todo!("{} {HEADER_BYTES}", out.len())
    }
}
