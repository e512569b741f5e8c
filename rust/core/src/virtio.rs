//! The header in front of a packet of a TUN device with offloads; as `nebula_mp.datapath.virtio`.

/// Bytes of the header.
pub const HEADER_BYTES: usize = 10;
/// Of an IPv4 packet; an IPv6 one may be longer by its fixed header.
pub const PACKET_BYTES_MAX: usize = 0xFFFF;
/// What stands in front of a packet that is complete as it is.
pub const PLAIN: [u8; HEADER_BYTES] = [0; HEADER_BYTES];

/// The header is not one of ours, or contradicts its packet. Drop and count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OffloadError;

/// How a packet is to be cut; the values are those of the header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Gso {
    /// It is one packet.
    #[default]
    None = 0,
    /// TCP over IPv4.
    Tcp4 = 1,
    /// TCP over IPv6.
    Tcp6 = 4,
    /// UDP over either.
    Udp = 5,
}

/// What the header says of its packet; made by `parse`, it fits that packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VirtioHeader {
    /// Other than None: a superpacket.
    pub gso: Gso,
    /// ECN: the first segment has CWR.
    pub has_cwr: bool,
    /// The checksum is to be completed.
    pub needs_checksum: bool,
    /// IP and transport header of a superpacket.
    pub header_bytes: u16,
    /// Payload of each packet of a superpacket; the last may have less.
    pub segment_bytes: u16,
    /// Where the checksummed part begins.
    pub checksum_start: u16,
    /// Where behind it the field lies.
    pub checksum_offset: u16,
}

impl VirtioHeader {
    /// Read 10 bytes, and compare them with the packet they stand before.
    ///
    /// `packet` may be only the beginning of a packet of `packet_bytes`; then all its IP and transport headers
    /// must be there, or it is refused.
    pub fn parse(
        header: &[u8; HEADER_BYTES],
        packet: &[u8],
        packet_bytes: usize,
    ) -> Result<Self, OffloadError> {
        todo!("{header:?} {} {packet_bytes}", packet.len())
    }

    /// Spell the 10 bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        todo!()
    }
}

/// The IP and transport header bytes that `encode` wrote.
pub fn encoded_header_bytes(header: &[u8; HEADER_BYTES]) -> usize {
    usize::from(u16::from_ne_bytes([header[2], header[3]]))
}
