//! The header in front of a packet of a TUN device with offloads; as `nebula_mp.datapath.virtio`.
//!
//! ```text
//! TUN -> [virtio] -> segment;  coalesce -> [virtio] -> TUN
//! ```
//!
//! Knows which headers fit which packets; knows nothing of how packets are cut or joined. Source: Virtual I/O Device
//! 1.3 section 5.1.6 (struct virtio_net_hdr, without num_buffers, in the byte order of the machine); Linux
//! include/linux/virtio_net.h and drivers/net/tun.c, which read more into it than that text.
//!
//! The kernel fills it in, but not from its own knowledge alone: a packet that is only forwarded may bring what
//! another machine, a guest or a card driver said of it. So everything is compared with the packet itself, and
//! `hdr_len`, which the specification calls a hint and which is wrong for forwarded packets, is never believed:
//! `header_bytes` is calculated, in both directions.
//!
//! In the other direction the kernel believes us. A type without the checksum flag, or with a wrong start of the
//! checksum, is accepted and corrupts packets without a word; so what `encode` writes is complete.

use crate::ip::{
    DESTINATION_OPTIONS, EXTENSION_HEADERS_MAX, HOP_BY_HOP, IPV4_HEADER_BYTES, IPV6_HEADER_BYTES,
    ROUTING, TCP, UDP,
};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 10;
/// Of an IPv4 packet; an IPv6 one may be longer by its fixed header.
pub const PACKET_BYTES_MAX: usize = 0xFFFF;
/// What stands in front of a packet that is complete as it is.
pub const PLAIN: [u8; HEADER_BYTES] = [0; HEADER_BYTES];
/// `checksum_offset` of TCP.
pub const TCP_CHECKSUM_AT: usize = 16;
/// `checksum_offset` of UDP.
pub const UDP_CHECKSUM_AT: usize = 6;
/// Bytes of a TCP header without options.
pub const TCP_HEADER_BYTES: usize = 20;
/// Bytes of a UDP header.
pub const UDP_HEADER_BYTES: usize = 8;

const NEEDS_CSUM: u8 = 1;
/// The kernel verified the checksum; it is right, so there is nothing to do.
const DATA_VALID: u8 = 2;
const ECN: u8 = 0x80;
const MORE_AND_OFFSET: u16 = 0x3FFF;

/// The header is not one of ours, or contradicts its packet. Drop and count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OffloadError;

/// How a packet is to be cut; the values are those of the header. UFO (3) is never asked for.
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

impl Gso {
    /// TCP over either.
    #[inline]
    pub fn is_tcp(self) -> bool {
        matches!(self, Gso::Tcp4 | Gso::Tcp6)
    }

    fn of(kind: u8) -> Option<Self> {
        match kind {
            0 => Some(Gso::None),
            1 => Some(Gso::Tcp4),
            4 => Some(Gso::Tcp6),
            5 => Some(Gso::Udp),
            _ => None,
        }
    }
}

/// What the header says of its packet; made by `parse`, it fits that packet.
///
/// `gso` other than None is a superpacket: its payload is that of several packets with `segment_bytes` each (the last
/// one may have less), behind `header_bytes` of IP and transport header. Then, or if `needs_checksum`, the checksum is
/// to be completed: it goes to `checksum_offset` behind `checksum_start`, over all from there on; its field holds the
/// sum of the pseudo header. All others are 0.
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
    #[inline]
    pub fn parse(
        header: &[u8; HEADER_BYTES],
        packet: &[u8],
        packet_bytes: usize,
    ) -> Result<Self, OffloadError> {
        if *header == PLAIN {
            return Ok(Self::default());
        }
        let [flags, kind, _, _, size_low, size_high, start_low, start_high, offset_low, offset_high] =
            *header;
        let segment_bytes = u16::from_ne_bytes([size_low, size_high]);
        let start = u16::from_ne_bytes([start_low, start_high]);
        let offset = u16::from_ne_bytes([offset_low, offset_high]);
        if flags & !(NEEDS_CSUM | DATA_VALID) != 0 {
            return Err(OffloadError);
        }
        let gso = Gso::of(kind & !ECN).ok_or(OffloadError)?;
        let has_cwr = kind & ECN != 0;
        if has_cwr && !gso.is_tcp() {
            return Err(OffloadError);
        }
        if flags & NEEDS_CSUM == 0 {
            return if gso == Gso::None {
                Ok(Self::default())
            } else {
                Err(OffloadError)
            };
        }
        let mut found = VirtioHeader {
            gso,
            has_cwr,
            needs_checksum: true,
            header_bytes: 0,
            segment_bytes: 0,
            checksum_start: start,
            checksum_offset: offset,
        };
        let (start, offset) = (usize::from(start), usize::from(offset));
        if gso == Gso::None {
            // The field lies behind a fixed IP header, and in the packet.
            if start < IPV4_HEADER_BYTES || start + offset + 2 > packet_bytes {
                return Err(OffloadError);
            }
        } else {
            if segment_bytes == 0 {
                return Err(OffloadError);
            }
            found.segment_bytes = segment_bytes;
            found.header_bytes = check_superpacket(gso, start, offset, packet, packet_bytes)?;
        }
        Ok(found)
    }

    /// Spell the 10 bytes.
    #[inline]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let flags = if self.needs_checksum { NEEDS_CSUM } else { 0 };
        let kind = self.gso as u8 | if self.has_cwr { ECN } else { 0 };
        let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0];
        header[2..4].copy_from_slice(&self.header_bytes.to_ne_bytes());
        header[4..6].copy_from_slice(&self.segment_bytes.to_ne_bytes());
        header[6..8].copy_from_slice(&self.checksum_start.to_ne_bytes());
        header[8..10].copy_from_slice(&self.checksum_offset.to_ne_bytes());
        header
    }
}

/// The IP and transport header bytes that `encode` wrote; only for a header of our own.
#[inline]
pub fn encoded_header_bytes(header: &[u8; HEADER_BYTES]) -> usize {
    usize::from(u16::from_ne_bytes([header[2], header[3]]))
}

/// Check that type and checksum fit the packet; gives the bytes of its headers.
fn check_superpacket(
    gso: Gso,
    start: usize,
    offset: usize,
    packet: &[u8],
    size: usize,
) -> Result<u16, OffloadError> {
    let version = packet.first().ok_or(OffloadError)? >> 4;
    let (protocol, transport, size_max) = match (version, gso) {
        (4, Gso::Tcp4 | Gso::Udp) => {
            let (protocol, transport) = ipv4_transport(packet)?;
            (protocol, transport, PACKET_BYTES_MAX)
        }
        (6, Gso::Tcp6 | Gso::Udp) => {
            let (protocol, transport) = ipv6_transport(packet)?;
            (protocol, transport, PACKET_BYTES_MAX + IPV6_HEADER_BYTES)
        }
        _ => return Err(OffloadError),
    };
    let expected = if gso == Gso::Udp {
        (UDP, UDP_CHECKSUM_AT)
    } else {
        (TCP, TCP_CHECKSUM_AT)
    };
    if (protocol, offset) != expected || transport != start {
        return Err(OffloadError);
    }
    let header_bytes = transport + transport_bytes(protocol, packet, transport)?;
    if header_bytes > packet.len().min(size) || size > size_max {
        return Err(OffloadError);
    }
    // At most 8 extension headers of 2048 bytes.
    Ok(header_bytes as u16)
}

/// Give protocol and offset of the transport header.
fn ipv4_transport(packet: &[u8]) -> Result<(u8, usize), OffloadError> {
    let header: &[u8; IPV4_HEADER_BYTES] = packet.first_chunk().ok_or(OffloadError)?;
    let transport = usize::from(header[0] & 0x0F) * 4;
    let is_fragment = u16::from_be_bytes([header[6], header[7]]) & MORE_AND_OFFSET != 0;
    if transport < IPV4_HEADER_BYTES || is_fragment {
        return Err(OffloadError);
    }
    Ok((header[9], transport))
}

/// Do as `ipv4_transport`. Headers that make of the rest something else, such as fragments, are none.
fn ipv6_transport(packet: &[u8]) -> Result<(u8, usize), OffloadError> {
    let header: &[u8; IPV6_HEADER_BYTES] = packet.first_chunk().ok_or(OffloadError)?;
    let (mut protocol, mut transport) = (header[6], IPV6_HEADER_BYTES);
    for _ in 0..EXTENSION_HEADERS_MAX {
        if !matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS) {
            break;
        }
        let Some(&[next, length, ..]) = packet.get(transport..) else {
            break;
        };
        (protocol, transport) = (next, transport + (usize::from(length) + 1) * 8);
    }
    Ok((protocol, transport))
}

/// Bytes of a UDP header, or of a TCP header with its options.
fn transport_bytes(protocol: u8, packet: &[u8], transport: usize) -> Result<usize, OffloadError> {
    if protocol == UDP {
        return Ok(UDP_HEADER_BYTES);
    }
    let header: &[u8; TCP_HEADER_BYTES] = packet
        .get(transport..)
        .and_then(<[u8]>::first_chunk)
        .ok_or(OffloadError)?;
    let size = usize::from(header[12] >> 4) * 4;
    if size < TCP_HEADER_BYTES {
        return Err(OffloadError);
    }
    Ok(size)
}
