//! When several packets mean exactly what one superpacket means; as `nebula_mp.datapath.coalesce`.
//!
//! ```text
//! opened messages -> [coalesce] -> virtio -> the open ring -> TUN
//! ```
//!
//! A run is grown packet by packet: the caller opens the next packet somewhere, asks `Run::try_add`, and on
//! success needs of it nothing but its payload, behind the payload before it. Knows nothing of tunnels, and does not
//! ask whether a packet may pass: all packets of a run are of one flow, so one look-up answers for the run. Source:
//! RFC 791, RFC 6864 (IP id), RFC 8200, RFC 9293, RFC 768, RFC 3168; Linux net/ipv4/tcp_offload.c and
//! net/ipv4/udp_offload.c (GRO), of which these rules are a stricter version.
//!
//! A packet joins the one before it if cutting the superpacket would give both back, but for IP ids that nobody may
//! use:
//!
//! - both are whole TCP or UDP packets over IPv4 without options or IPv6 without extension headers, of which the IP
//!   and UDP lengths are those of the packet, with payload;
//! - addresses, ports, hop limit, DSCP and ECN, DF, flow label, acknowledgement, window, TCP options are equal;
//! - TCP has ACK, may have ECE, and no other flag; PSH ends a superpacket;
//! - TCP sequence numbers follow each other; so do IPv4 ids, unless DF is set;
//! - all have as much payload as the first, only the last one may have less;
//! - the checksums of both, of IP and of TCP or UDP, are there and right. The kernel does not check those of a
//!   superpacket, so joining a damaged packet would hide the damage.

use crate::checksum::{fold, sum};
use crate::ip::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES, TCP, UDP};
use crate::segment::{
    not_zero, read_u16, read_u32, write_u16, IPV4_CHECKSUM_AT, IPV4_ID_AT, IPV4_LENGTH_AT,
    IPV6_LENGTH_AT, PSH, TCP_FLAGS_AT, TCP_SEQUENCE_AT, UDP_LENGTH_AT,
};
use crate::virtio::{
    Gso, VirtioHeader, HEADER_BYTES, PACKET_BYTES_MAX, PLAIN, TCP_CHECKSUM_AT, TCP_HEADER_BYTES,
    UDP_CHECKSUM_AT, UDP_HEADER_BYTES,
};

/// The longest headers of a packet that can be joined: IPv6 and TCP with all options.
pub const JOINT_HEADERS_MAX: usize = 100;

const ACK: u8 = 0x10;
const ECE: u8 = 0x40;
/// In byte 6 of an IPv4 header.
const DF: u8 = 0x40;
const IPV4_FLAGS_AT: usize = 6;
const IPV4_ADDRESSES_AT: usize = 12;
const IPV6_ADDRESSES_AT: usize = 8;

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
#[inline]
pub fn shape_of(packet: &[u8]) -> Option<Shape> {
    if packet.len() < IPV4_HEADER_BYTES + UDP_HEADER_BYTES {
        return None;
    }
    let (protocol, transport, gso_of_tcp, addresses_at) = match packet[0] {
        // Reserved bit, MF and the offset of fragments are 0.
        0x45 if packet[IPV4_FLAGS_AT] & !DF == 0 && packet[IPV4_FLAGS_AT + 1] == 0 => {
            (packet[9], IPV4_HEADER_BYTES, Gso::Tcp4, IPV4_ADDRESSES_AT)
        }
        first if first >> 4 == 6 => (packet[6], IPV6_HEADER_BYTES, Gso::Tcp6, IPV6_ADDRESSES_AT),
        _ => return None,
    };
    let behind = packet.get(transport..)?;
    let (gso, transport_bytes) = match protocol {
        TCP => {
            let header: &[u8; TCP_HEADER_BYTES] = behind.first_chunk()?;
            // The four bits behind the offset are reserved, and one of them is accurate ECN's.
            let (words, reserved) = (usize::from(header[12] >> 4), header[12] & 0x0F);
            if words < 5 || reserved != 0 || header[TCP_FLAGS_AT] & !(PSH | ECE) != ACK {
                return None;
            }
            (gso_of_tcp, words * 4)
        }
        UDP => {
            let header: &[u8; UDP_HEADER_BYTES] = behind.first_chunk()?;
            if header[UDP_CHECKSUM_AT] == 0 && header[UDP_CHECKSUM_AT + 1] == 0 {
                return None;
            }
            (Gso::Udp, UDP_HEADER_BYTES)
        }
        _ => return None,
    };
    (behind.len() > transport_bytes).then_some(Shape {
        gso,
        transport,
        header_bytes: transport + transport_bytes,
        addresses_at,
        protocol,
    })
}

impl Shape {
    #[inline]
    fn is_ipv4(&self) -> bool {
        self.transport == IPV4_HEADER_BYTES
    }

    #[inline]
    fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    /// Whether a packet with all its headers and payload has the lengths and checksums that it should have.
    #[inline]
    fn is_right(&self, packet: &[u8]) -> bool {
        let size = packet.len();
        if self.is_ipv4() {
            if usize::from(read_u16(packet, IPV4_LENGTH_AT)) != size
                || sum(&packet[..IPV4_HEADER_BYTES]) != 0xFFFF
            {
                return false;
            }
        } else if usize::from(read_u16(packet, IPV6_LENGTH_AT)) + IPV6_HEADER_BYTES != size {
            return false;
        }
        let length = size - self.transport;
        if self.protocol == UDP
            && (usize::from(read_u16(packet, self.transport + UDP_LENGTH_AT)) != length
                || read_u16(packet, self.transport + UDP_CHECKSUM_AT) == 0)
        {
            return false;
        }
        // Addresses and transport header lie behind each other: the pseudo header needs only protocol and length.
        let total = u64::from(sum(&packet[self.addresses_at..]));
        fold(total + u64::from(self.protocol) + length as u64) == 0xFFFF
    }
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
    /// PSH if the last packet had it.
    pushed: u8,
    /// Of the first packet.
    header: [u8; JOINT_HEADERS_MAX],
}

impl Run {
    /// Begin with a whole packet; None if it cannot be the first of a superpacket of several: its shape, its
    /// lengths or its checksums are wrong, or (TCP) it has PSH. Says nothing about which kinds the device takes.
    pub fn begin(packet: &[u8]) -> Option<Self> {
        let shape = shape_of(packet)?;
        if packet.len() >= PACKET_BYTES_MAX
            || (shape.is_tcp() && packet[shape.transport + TCP_FLAGS_AT] & PSH != 0)
            || !shape.is_right(packet)
        {
            return None;
        }
        let mut header = [0; JOINT_HEADERS_MAX];
        header[..shape.header_bytes].copy_from_slice(&packet[..shape.header_bytes]);
        Some(Run {
            shape,
            packets: 1,
            size: packet.len(),
            payload_bytes: packet.len() - shape.header_bytes,
            is_closed: false,
            pushed: 0,
            header,
        })
    }

    /// Whether a packet may join the run, by all that this module's head says: equal headers, consecutive, equal
    /// size or shorter, right lengths and checksums, no more than fits a superpacket. If it does, it is counted.
    ///
    /// What is cheap is looked at first, and payload only of a packet whose headers fit.
    pub fn try_add(&mut self, packet: &[u8]) -> bool {
        let size = packet.len();
        let header_bytes = self.shape.header_bytes;
        if self.is_closed
            || size > self.size
            || size <= header_bytes
            || size + self.payload_bytes > PACKET_BYTES_MAX
            || !self.has_equal_headers(&packet[..header_bytes])
            || !self.follows(&packet[..header_bytes])
            || !self.shape.is_right(packet)
        {
            return false;
        }
        if self.shape.is_tcp() {
            self.pushed = packet[self.shape.transport + TCP_FLAGS_AT] & PSH;
        }
        self.packets += 1;
        self.payload_bytes += size - header_bytes;
        self.is_closed = size < self.size || self.pushed != 0;
        true
    }

    /// Whether the fields are equal that are equal in all packets of a superpacket. `header` has `header_bytes`.
    #[inline]
    fn has_equal_headers(&self, header: &[u8]) -> bool {
        let first = &self.header[..self.shape.header_bytes];
        let (found, expected) = if self.shape.is_ipv4() {
            let (Some((ip, found)), Some((first, expected))) =
                (header.split_first_chunk(), first.split_first_chunk())
            else {
                return false;
            };
            if !are_equal_ipv4(ip, first) {
                return false;
            }
            (found, expected)
        } else {
            let (Some((ip, found)), Some((first, expected))) =
                (header.split_first_chunk(), first.split_first_chunk())
            else {
                return false;
            };
            if !are_equal_ipv6(ip, first) {
                return false;
            }
            (found, expected)
        };
        if !self.shape.is_tcp() {
            return found.first_chunk::<4>() == expected.first_chunk(); // ports
        }
        let (Some((found, options)), Some((expected, first_options))) =
            (found.split_first_chunk(), expected.split_first_chunk())
        else {
            return false;
        };
        are_equal_tcp(found, expected) && options == first_options
    }

    /// Whether TCP sequence number and IPv4 id are those of the next packet.
    #[inline]
    fn follows(&self, header: &[u8]) -> bool {
        if self.shape.is_tcp() {
            let at = self.shape.transport + TCP_SEQUENCE_AT;
            let expected = read_u32(&self.header, at).wrapping_add(self.payload_bytes as u32);
            if read_u32(header, at) != expected {
                return false;
            }
        }
        // With DF, ids mean nothing.
        !self.shape.is_ipv4()
            || self.header[IPV4_FLAGS_AT] & DF != 0
            || read_u16(header, IPV4_ID_AT)
                == read_u16(&self.header, IPV4_ID_AT).wrapping_add(self.packets as u16)
    }

    /// Virtio, IP and transport header of the superpacket, written to the end of `out`; gives its bytes, so that it
    /// begins at `out.len() - bytes`. `out` has room for `HEADER_BYTES + shape.header_bytes`. Of a single packet
    /// it is an empty virtio header and the packet's own headers.
    pub fn write_head(&self, out: &mut [u8]) -> usize {
        let Shape {
            gso,
            transport,
            header_bytes,
            addresses_at,
            protocol,
        } = self.shape;
        let bytes = HEADER_BYTES + header_bytes;
        let begin = out.len() - bytes;
        let (virtio, head) = out[begin..].split_at_mut(HEADER_BYTES);
        head.copy_from_slice(&self.header[..header_bytes]);
        if self.packets == 1 {
            virtio.copy_from_slice(&PLAIN);
            return bytes;
        }
        // It fits 16 bits, as `try_add` has seen to.
        let size = header_bytes + self.payload_bytes;
        if self.shape.is_ipv4() {
            write_u16(head, IPV4_LENGTH_AT, size as u16);
            write_u16(head, IPV4_CHECKSUM_AT, 0);
            let field = not_zero(!sum(&head[..IPV4_HEADER_BYTES]));
            write_u16(head, IPV4_CHECKSUM_AT, field);
        } else {
            write_u16(head, IPV6_LENGTH_AT, (size - IPV6_HEADER_BYTES) as u16);
        }
        let length = size - transport;
        let checksum_offset = if protocol == TCP {
            head[transport + TCP_FLAGS_AT] |= self.pushed;
            TCP_CHECKSUM_AT
        } else {
            write_u16(head, transport + UDP_LENGTH_AT, length as u16);
            UDP_CHECKSUM_AT
        };
        // The sum of the pseudo header, which is never 0.
        let seed = u64::from(sum(&head[addresses_at..transport]));
        let seed = fold(seed + u64::from(protocol) + length as u64);
        write_u16(head, transport + checksum_offset, seed);
        let header = VirtioHeader {
            gso,
            has_cwr: false,
            needs_checksum: true,
            header_bytes: header_bytes as u16,
            segment_bytes: (self.size - header_bytes) as u16,
            checksum_start: transport as u16,
            checksum_offset: checksum_offset as u16,
        };
        virtio.copy_from_slice(&header.encode());
        bytes
    }
}

/// Join what may be joined; `tso` and `uso` are the superpackets that the device takes.
///
/// Gives how many packets each result holds, and the result with its virtio header. Every packet is in exactly one,
/// and the order stays. For a few packets; it allocates, and the data path grows runs where they belong.
pub fn coalesce(packets: &[&[u8]], tso: bool, uso: bool) -> Vec<(usize, Vec<u8>)> {
    let mut results = Vec::new();
    let mut rest = packets;
    while let Some((first, following)) = rest.split_first() {
        let run = Run::begin(first).filter(|run| if run.shape.is_tcp() { tso } else { uso });
        let Some(mut run) = run else {
            results.push((1, [&PLAIN, *first].concat()));
            rest = following;
            continue;
        };
        let header_bytes = run.shape.header_bytes;
        let joined = following
            .iter()
            .take_while(|each| run.try_add(each))
            .count();
        let mut result = vec![0; HEADER_BYTES + header_bytes];
        run.write_head(&mut result);
        for packet in &rest[..=joined] {
            result.extend_from_slice(&packet[header_bytes..]);
        }
        results.push((run.packets, result));
        rest = &following[joined..];
    }
    results
}

#[inline]
fn are_equal_ipv4(one: &[u8; IPV4_HEADER_BYTES], other: &[u8; IPV4_HEADER_BYTES]) -> bool {
    // Without length, id and checksum.
    unequal(one, other, 0) & 0xFFFF_0000_0000_FFFF == 0
        && unequal(one, other, 8) & 0xFFFF_0000_FFFF_FFFF == 0
        && one[16..] == other[16..]
}

#[inline]
fn are_equal_ipv6(one: &[u8; IPV6_HEADER_BYTES], other: &[u8; IPV6_HEADER_BYTES]) -> bool {
    // Without length.
    unequal(one, other, 0) & 0xFFFF_FFFF_0000_FFFF == 0 && one[8..] == other[8..]
}

#[inline]
fn are_equal_tcp(one: &[u8; TCP_HEADER_BYTES], other: &[u8; TCP_HEADER_BYTES]) -> bool {
    // Ports; acknowledgement, offset, flags without PSH and window; urgent pointer.
    one[..4] == other[..4]
        && unequal(one, other, 8) & 0xFFFF_FFFF_FFF7_FFFF == 0
        && one[18..] == other[18..]
}

/// Bits that differ between the two words of 8 bytes that begin at `at`.
#[inline]
fn unequal<const SIZE: usize>(one: &[u8; SIZE], other: &[u8; SIZE], at: usize) -> u64 {
    let word = |bytes: &[u8; SIZE]| {
        let mut word = [0; 8];
        word.copy_from_slice(&bytes[at..at + 8]);
        u64::from_be_bytes(word)
    };
    word(one) ^ word(other)
}
