//! A superpacket is cut into the packets that the local stack would have sent; as `nebula_mp.datapath.segment`.
//!
//! ```text
//! TUN -> virtio -> [segment] -> the area being filled, where it is sealed in place
//! ```
//!
//! Knows IP, TCP and UDP headers and where the caller wants the packets; knows nothing of tunnels and seals. Source:
//! RFC 791, RFC 6864 (IP id), RFC 8200, RFC 9293, RFC 768, RFC 3168 section 6.1.2 (CWR); what of it a segment gets is
//! what Linux does itself (net/ipv4/tcp_offload.c, net/ipv4/udp_offload.c).
//!
//! All packets have one header, but for a few numbers, so it is prepared once, with its sum. `place` copies the
//! payload, `stamp` writes headers and checksums in front of payload that lies where it belongs, so that a caller who
//! reads the payload to its place needs only that.

use crate::checksum::{fold, sum};
use crate::ip::{IPV4_HEADER_BYTES, IPV6_HEADER_BYTES};
use crate::virtio::{
    Gso, VirtioHeader, PACKET_BYTES_MAX, TCP_CHECKSUM_AT, TCP_HEADER_BYTES, UDP_CHECKSUM_AT,
    UDP_HEADER_BYTES,
};

/// The longest IP and transport headers a superpacket can have (IPv6 extension headers included) are below this;
/// longer ones are refused by `Cut::new`.
pub const HEADERS_MAX: usize = 512;

pub(crate) const IPV4_LENGTH_AT: usize = 2;
pub(crate) const IPV4_ID_AT: usize = 4;
pub(crate) const IPV4_CHECKSUM_AT: usize = 10;
pub(crate) const IPV6_LENGTH_AT: usize = 4;
pub(crate) const TCP_SEQUENCE_AT: usize = 4;
pub(crate) const TCP_FLAGS_AT: usize = 13;
pub(crate) const UDP_LENGTH_AT: usize = 4;
pub(crate) const PSH: u8 = 0x08;
const FIN: u8 = 0x01;
const CWR: u8 = 0x80;

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
    /// To make the last one a full one.
    missing: usize,
    transport: usize,
    is_tcp: bool,
    is_ipv4: bool,
    /// Of the first packet; IPv4.
    id: u16,
    /// Of the IPv4 header, without id and checksum.
    ip_sum: u64,
    /// Of the first packet; TCP.
    sequence: u32,
    first_flags: u8,
    last_flags: u8,
    /// Of pseudo header and transport header, without sequence number and `first_flags` and `last_flags`.
    rest: u64,
    /// The same for the last packet.
    rest_of_last: u64,
    /// The header of a packet in the middle, with 0 for id, sequence number and checksums.
    template: [u8; HEADERS_MAX],
}

impl Cut {
    /// `head` is the beginning, with all headers, of a packet of `packet_bytes` that `header` was parsed with.
    /// None if its headers are longer than `HEADERS_MAX`, or if it is no such header of a superpacket.
    pub fn new(header: &VirtioHeader, head: &[u8], packet_bytes: usize) -> Option<Self> {
        let header_bytes = usize::from(header.header_bytes);
        let transport = usize::from(header.checksum_start);
        let is_tcp = header.gso.is_tcp();
        let is_ipv4 = head.first()? >> 4 == 4;
        let (ip_bytes, size_max) = if is_ipv4 {
            (IPV4_HEADER_BYTES, PACKET_BYTES_MAX)
        } else {
            (IPV6_HEADER_BYTES, PACKET_BYTES_MAX + IPV6_HEADER_BYTES)
        };
        let (transport_bytes, checksum_at) = if is_tcp {
            (TCP_HEADER_BYTES, transport + TCP_CHECKSUM_AT)
        } else {
            (UDP_HEADER_BYTES, transport + UDP_CHECKSUM_AT)
        };
        // Whatever `parse` has made passes, but for the first.
        if header_bytes > HEADERS_MAX
            || header.gso == Gso::None
            || header.segment_bytes == 0
            || transport < ip_bytes
            || header_bytes < transport + transport_bytes
            || !(header_bytes..=size_max).contains(&packet_bytes)
        {
            return None;
        }

        let whole = packet_bytes - header_bytes;
        // More than there is would make lengths that no field can hold.
        let payload_bytes = usize::from(header.segment_bytes).min(whole).max(1);
        let segment_bytes = header_bytes + payload_bytes;
        let count = whole.div_ceil(payload_bytes).max(1);
        let missing = count * payload_bytes - whole;

        let mut template = [0; HEADERS_MAX];
        template[..header_bytes].copy_from_slice(head.get(..header_bytes)?);
        let (mut id, mut ip_sum) = (0, 0);
        if is_ipv4 {
            id = read_u16(&template, IPV4_ID_AT);
            write_u16(&mut template, IPV4_LENGTH_AT, segment_bytes as u16);
            write_u16(&mut template, IPV4_ID_AT, 0);
            write_u16(&mut template, IPV4_CHECKSUM_AT, 0);
            ip_sum = u64::from(sum(&template[..transport]));
        } else {
            write_u16(
                &mut template,
                IPV6_LENGTH_AT,
                (segment_bytes - IPV6_HEADER_BYTES) as u16,
            );
        }
        // The field holds the sum of the pseudo header of the superpacket. All but its length stays.
        let seed = u64::from(read_u16(&template, checksum_at)) + 2 * 0xFFFF - packet_bytes as u64;
        write_u16(&mut template, checksum_at, 0);
        let (mut sequence, mut first_flags, mut last_flags) = (0, 0, 0);
        if is_tcp {
            let at = transport + TCP_SEQUENCE_AT;
            sequence = read_u32(&template, at);
            template[at..at + 4].fill(0);
            let flags = &mut template[transport + TCP_FLAGS_AT];
            first_flags = *flags & CWR;
            last_flags = *flags & (FIN | PSH);
            *flags &= !(CWR | FIN | PSH);
        } else {
            let length = (UDP_HEADER_BYTES + payload_bytes) as u16;
            write_u16(&mut template, transport + UDP_LENGTH_AT, length);
        }
        let fields = u64::from(sum(&template[transport..header_bytes]));
        let rest = seed + segment_bytes as u64 + fields;
        // The length is in the pseudo header, and that of UDP in its header too.
        let lengths = if is_tcp { 1 } else { 2 };
        Some(Cut {
            count,
            header_bytes,
            payload_bytes,
            segment_bytes,
            missing,
            transport,
            is_tcp,
            is_ipv4,
            id,
            ip_sum,
            sequence,
            first_flags,
            last_flags,
            rest,
            rest_of_last: rest + lengths * (0xFFFF - missing as u64),
            template,
        })
    }

    /// Bytes of packet `number`.
    #[inline]
    pub fn segment_size(&self, number: usize) -> usize {
        if number + 1 == self.count {
            self.segment_bytes - self.missing
        } else {
            self.segment_bytes
        }
    }

    /// Copy the payload of `count` packets, from packet `first` on, out of the whole superpacket `packet`, to
    /// where packets begin at `out[0]`, `out[stride]`, ...; the headers are left alone.
    pub fn place(&self, packet: &[u8], out: &mut [u8], stride: usize, first: usize, count: usize) {
        for (at, number) in (0..).step_by(stride).zip(first..first + count) {
            let end = at + self.segment_size(number);
            out[at + self.header_bytes..end].copy_from_slice(self.payload(packet, number));
        }
    }

    /// Write the headers, with all checksums, of packets whose payload lies where `place` puts it.
    /// Touches nothing behind the last byte of a packet.
    pub fn stamp(&self, out: &mut [u8], stride: usize, first: usize, count: usize) {
        for (at, number) in (0..).step_by(stride).zip(first..first + count) {
            let end = at + self.segment_size(number);
            self.stamp_one(&mut out[at..end], number);
        }
    }

    /// Write packet `number` of the whole superpacket `packet` to the beginning of `out`; gives its bytes.
    pub fn write_one(&self, packet: &[u8], number: usize, out: &mut [u8]) -> usize {
        let size = self.segment_size(number);
        let out = &mut out[..size];
        out[self.header_bytes..].copy_from_slice(self.payload(packet, number));
        self.stamp_one(out, number);
        size
    }

    #[inline]
    fn payload<'a>(&self, packet: &'a [u8], number: usize) -> &'a [u8] {
        debug_assert!(number < self.count);
        let begin = self.header_bytes + number * self.payload_bytes;
        &packet[begin..begin + self.segment_size(number) - self.header_bytes]
    }

    /// `packet` is exactly packet `number`, still without its headers.
    #[inline]
    fn stamp_one(&self, packet: &mut [u8], number: usize) {
        debug_assert!(number < self.count);
        let (header, payload) = packet.split_at_mut(self.header_bytes);
        let is_last = number + 1 == self.count;
        header.copy_from_slice(&self.template[..self.header_bytes]);

        let missing = if is_last { self.missing } else { 0 };
        if self.is_ipv4 {
            let id = self.id.wrapping_add(number as u16);
            write_u16(header, IPV4_ID_AT, id);
            let ip_sum = self.ip_sum + u64::from(id) + (0xFFFF - missing as u64);
            write_u16(header, IPV4_CHECKSUM_AT, !fold(ip_sum));
        }

        let transport = &mut header[self.transport..];
        let mut total = u64::from(sum(payload));
        total += if is_last {
            self.rest_of_last
        } else {
            self.rest
        };
        if self.is_tcp {
            let sequence = self
                .sequence
                .wrapping_add((number * self.payload_bytes) as u32);
            transport[TCP_SEQUENCE_AT..TCP_SEQUENCE_AT + 4]
                .copy_from_slice(&sequence.to_be_bytes());
            let mut flags = 0;
            if number == 0 {
                flags |= self.first_flags;
            }
            if is_last {
                flags |= self.last_flags;
            }
            transport[TCP_FLAGS_AT] |= flags;
            total += u64::from(sequence) + u64::from(flags);
            write_u16(transport, TCP_CHECKSUM_AT, !fold(total));
        } else {
            // 0 would mean that there is no checksum.
            write_u16(transport, UDP_CHECKSUM_AT, not_zero(!fold(total)));
        }
        if missing > 0 {
            self.shorten(header);
        }
    }

    /// Correct the lengths in the header of the last packet.
    #[cold]
    fn shorten(&self, header: &mut [u8]) {
        let size = self.segment_bytes - self.missing;
        if self.is_ipv4 {
            write_u16(header, IPV4_LENGTH_AT, size as u16);
        } else {
            write_u16(header, IPV6_LENGTH_AT, (size - IPV6_HEADER_BYTES) as u16);
        }
        if !self.is_tcp {
            let at = self.transport + UDP_LENGTH_AT;
            write_u16(header, at, (size - self.transport) as u16);
        }
    }
}

/// Give the packets of a superpacket, or the one packet with its checksum completed; None as for `Cut::new`.
///
/// For a few of them; it allocates. `header` was parsed with this packet.
pub fn segment(header: &VirtioHeader, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
    if header.gso == Gso::None {
        let mut single = packet.to_vec();
        complete(header, &mut single);
        return Some(vec![single]);
    }
    let cut = Cut::new(header, packet, packet.len())?;
    let write = |number| {
        let mut out = vec![0; cut.segment_size(number)];
        cut.write_one(packet, number, &mut out);
        out
    };
    Some((0..cut.count).map(write).collect())
}

/// Write the checksum of a packet that is no superpacket, if it needs one; 0 is written as 0xFFFF.
///
/// The protocol is not known here, so 0 is never written, as Linux does: of UDP it must not be, of others it need
/// not. `header` was parsed with this packet.
#[inline]
pub fn complete(header: &VirtioHeader, packet: &mut [u8]) {
    if header.needs_checksum {
        let start = usize::from(header.checksum_start);
        let field = not_zero(!sum(&packet[start..]));
        write_u16(packet, start + usize::from(header.checksum_offset), field);
    }
}

/// The other way to write a checksum of 0.
#[inline]
pub(crate) fn not_zero(field: u16) -> u16 {
    if field == 0 {
        0xFFFF
    } else {
        field
    }
}

#[inline]
pub(crate) fn read_u16(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([data[at], data[at + 1]])
}

#[inline]
pub(crate) fn read_u32(data: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]])
}

#[inline]
pub(crate) fn write_u16(data: &mut [u8], at: usize, number: u16) {
    data[at..at + 2].copy_from_slice(&number.to_be_bytes());
}
