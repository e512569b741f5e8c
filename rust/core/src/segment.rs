//! A superpacket is cut into the packets that the local stack would have sent; as `nebula_mp.datapath.segment`.

use crate::virtio::VirtioHeader;

/// The longest IP and transport headers a superpacket can have (IPv6 extension headers included) are below this;
/// longer ones are refused by `Cut::new`.
pub const HEADERS_MAX: usize = 512;

/// How one superpacket is cut: `count` packets, each of `segment_bytes`, of which `header_bytes` are headers; the
/// last may be shorter (`segment_size`). `place` and `stamp` as many at a time as there is room for.
pub struct Cut {
    /// Packets.
    pub count: usize,
    /// IP and transport header of each.
    pub header_bytes: usize,
    /// Payload of each but the last.
    pub payload_bytes: usize,
    /// Bytes of each but the last.
    pub segment_bytes: usize,
}

impl Cut {
    /// `head` is the beginning, with all headers, of a packet of `packet_bytes` that `header` was parsed with.
    /// None if its headers are longer than `HEADERS_MAX`.
    pub fn new(header: &VirtioHeader, head: &[u8], packet_bytes: usize) -> Option<Self> {
        todo!("{header:?} {} {packet_bytes}", head.len())
    }

    /// Bytes of packet `number`.
    pub fn segment_size(&self, number: usize) -> usize {
        todo!("{number}")
    }

    /// Copy the payload of `count` packets, from packet `first` on, out of the whole superpacket `packet`, to
    /// where packets begin at `out[0]`, `out[stride]`, ...; the headers are left alone.
    pub fn place(&self, packet: &[u8], out: &mut [u8], stride: usize, first: usize, count: usize) {
        todo!("{} {} {stride} {first} {count}", packet.len(), out.len())
    }

    /// Write the headers, with all checksums, of packets whose payload lies where `place` puts it.
    /// Touches nothing behind the last byte of a packet.
    pub fn stamp(&self, out: &mut [u8], stride: usize, first: usize, count: usize) {
        todo!("{} {stride} {first} {count}", out.len())
    }
}

/// Write the checksum of a packet that is no superpacket, if it needs one; 0 is written as 0xFFFF.
pub fn complete(header: &VirtioHeader, packet: &mut [u8]) {
    todo!("{header:?} {}", packet.len())
}
