//! Superpackets as the kernel makes them, and their packets cut in the plainest way, for tests.
//!
//! `Plan` says what is in one; `packet` builds the superpacket, `one` each packet by itself, `is_right` and `repair`
//! judge and correct any packet: byte by byte, and with no code of the library that is tested.
#![allow(dead_code)] // each of the crates that include this file uses a part of it

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const DESTINATION_OPTIONS: u8 = 60;
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;
pub const URG: u8 = 0x20;
pub const ECE: u8 = 0x40;
pub const CWR: u8 = 0x80;
pub const DF: u16 = 0x4000;
pub const TIMESTAMPS: [u8; 12] = [1, 1, 8, 10, 0, 1, 2, 3, 4, 5, 6, 7];

/// A superpacket: `payload` in pieces of `size`.
#[derive(Debug, Clone)]
pub struct Plan {
    pub version: u8,
    pub protocol: u8,
    pub payload: Vec<u8>,
    pub size: usize,
    pub flags: u8,
    pub sequence: u32,
    pub identification: u16,
    /// Of TCP.
    pub options: Vec<u8>,
    /// Of IPv4.
    pub ip_options: Vec<u8>,
    pub flags_and_offset: u16,
    pub service: u8,
    pub ttl: u8,
    pub ports: (u16, u16),
    pub acknowledgement: u32,
    pub window: u16,
    /// The body of a destination options header of IPv6: none, or 6 bytes more than a multiple of 8.
    pub extension: Vec<u8>,
}

impl Plan {
    pub fn new(version: u8, protocol: u8, payload: Vec<u8>, size: usize) -> Self {
        Plan {
            version,
            protocol,
            payload,
            size,
            flags: ACK,
            sequence: 1000,
            identification: 7,
            options: Vec::new(),
            ip_options: Vec::new(),
            flags_and_offset: DF,
            service: 0,
            ttl: 64,
            ports: (40000, 50000),
            acknowledgement: 77,
            window: 500,
            extension: Vec::new(),
        }
    }

    pub fn is_tcp(&self) -> bool {
        self.protocol == TCP
    }

    pub fn count(&self) -> usize {
        self.payload.len().div_ceil(self.size).max(1)
    }

    pub fn transport(&self) -> usize {
        if self.version == 4 {
            20 + self.ip_options.len()
        } else if self.extension.is_empty() {
            40
        } else {
            42 + self.extension.len()
        }
    }

    pub fn header_bytes(&self) -> usize {
        let transport_bytes = if self.is_tcp() {
            20 + self.options.len()
        } else {
            8
        };
        self.transport() + transport_bytes
    }

    pub fn checksum_offset(&self) -> usize {
        if self.is_tcp() {
            16
        } else {
            6
        }
    }

    /// The offload header, with `hdr_len` as it is.
    pub fn virtio(&self) -> [u8; 10] {
        let kind = match (self.protocol, self.version) {
            (TCP, 4) => 1,
            (TCP, _) => 4,
            _ => 5,
        };
        let cwr = if self.is_tcp() && self.flags & CWR != 0 {
            0x80
        } else {
            0
        };
        let mut header = [1, kind | cwr, 0, 0, 0, 0, 0, 0, 0, 0];
        let fields = [
            self.header_bytes(),
            self.size,
            self.transport(),
            self.checksum_offset(),
        ];
        for (bytes, field) in header[2..].chunks_exact_mut(2).zip(fields) {
            bytes.copy_from_slice(&(field as u16).to_ne_bytes());
        }
        header
    }

    /// The superpacket itself; its checksum field holds the sum of the pseudo header.
    pub fn packet(&self) -> Vec<u8> {
        let mut whole = self.build(&self.payload, self.flags, 0);
        let seed = pseudo_sum(&whole, self.transport(), self.protocol);
        set_u16(&mut whole, self.transport() + self.checksum_offset(), seed);
        whole
    }

    /// What it means, packet by packet.
    pub fn packets(&self) -> Vec<Vec<u8>> {
        (0..self.count()).map(|number| self.one(number)).collect()
    }

    /// Packet `number` alone.
    pub fn one(&self, number: usize) -> Vec<u8> {
        let mut flags = self.flags;
        if number != 0 {
            flags &= !CWR;
        }
        if number != self.count() - 1 {
            flags &= !(PSH | FIN);
        }
        let begin = number * self.size;
        let end = (begin + self.size).min(self.payload.len());
        self.build(&self.payload[begin..end], flags, number)
    }

    fn build(&self, payload: &[u8], flags: u8, number: usize) -> Vec<u8> {
        let mut segment = Vec::new();
        segment.extend(self.ports.0.to_be_bytes());
        segment.extend(self.ports.1.to_be_bytes());
        if self.is_tcp() {
            let sequence = self.sequence.wrapping_add((number * self.size) as u32);
            segment.extend(sequence.to_be_bytes());
            segment.extend(self.acknowledgement.to_be_bytes());
            segment.push((((20 + self.options.len()) / 4) << 4) as u8);
            segment.push(flags);
            segment.extend(self.window.to_be_bytes());
            segment.extend([0; 4]);
            segment.extend(&self.options);
        } else {
            segment.extend(((8 + payload.len()) as u16).to_be_bytes());
            segment.extend([0; 2]);
        }
        segment.extend(payload);
        let mut packet = Vec::new();
        if self.version == 4 {
            let header_bytes = 20 + self.ip_options.len();
            packet.extend([0x40 | (header_bytes / 4) as u8, self.service]);
            packet.extend(((header_bytes + segment.len()) as u16).to_be_bytes());
            let identification = self.identification.wrapping_add(number as u16);
            packet.extend(identification.to_be_bytes());
            packet.extend(self.flags_and_offset.to_be_bytes());
            packet.extend([self.ttl, self.protocol, 0, 0]);
            packet.extend([10, 50, 1, 2, 10, 50, 2, 2]);
            packet.extend(&self.ip_options);
        } else {
            let mut extension = Vec::new();
            if !self.extension.is_empty() {
                extension.push(self.protocol);
                extension.push(((2 + self.extension.len()) / 8 - 1) as u8);
                extension.extend(&self.extension);
            }
            packet.extend([
                0x60 | self.service >> 4,
                self.service << 4 | 0x0A,
                0xBC,
                0xDE,
            ]);
            packet.extend(((extension.len() + segment.len()) as u16).to_be_bytes());
            packet.push(if extension.is_empty() {
                self.protocol
            } else {
                DESTINATION_OPTIONS
            });
            packet.push(self.ttl);
            for net in [1, 2] {
                packet.extend([0xFD, 0, 0, 0x50, 0, net, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
            }
            packet.extend(extension);
        }
        packet.extend(segment);
        repair(&mut packet, self.transport(), self.protocol);
        packet
    }
}

/// The Internet checksum, word by word.
pub fn checksum(data: &[u8]) -> u16 {
    !words(data)
}

fn words(data: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in data.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum as u16
}

/// The sum of the pseudo header of a whole packet; never 0.
pub fn pseudo_sum(packet: &[u8], transport: usize, protocol: u8) -> u16 {
    let addresses = if packet[0] >> 4 == 4 {
        &packet[12..20]
    } else {
        &packet[8..40]
    };
    let mut pseudo = addresses.to_vec();
    pseudo.extend(((packet.len() - transport) as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    words(&pseudo)
}

/// What the checksum field of the transport header has to be, over a whole packet.
fn transport_checksum(packet: &[u8], transport: usize, protocol: u8) -> u16 {
    let mut segment = packet[transport..].to_vec();
    set_u16(&mut segment, checksum_at(protocol), 0);
    let total = u32::from(words(&segment)) + u32::from(pseudo_sum(packet, transport, protocol));
    let field = !((total & 0xFFFF) + (total >> 16)) as u16;
    if protocol == UDP && field == 0 {
        0xFFFF
    } else {
        field
    }
}

fn checksum_at(protocol: u8) -> usize {
    if protocol == UDP {
        6
    } else {
        16
    }
}

pub fn u16_at(data: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([data[at], data[at + 1]])
}

pub fn set_u16(data: &mut [u8], at: usize, number: u16) {
    data[at..at + 2].copy_from_slice(&number.to_be_bytes());
}

/// Write the checksums of a whole packet with TCP or UDP at `transport`.
pub fn repair(packet: &mut [u8], transport: usize, protocol: u8) {
    if packet[0] >> 4 == 4 {
        let header_bytes = usize::from(packet[0] & 15) * 4;
        set_u16(packet, 10, 0);
        let field = checksum(&packet[..header_bytes]);
        set_u16(packet, 10, field);
    }
    let field = transport_checksum(packet, transport, protocol);
    set_u16(packet, transport + checksum_at(protocol), field);
}

/// Where TCP or UDP begins in a packet of which the headers are all there, and which of them it is.
pub fn find_transport(packet: &[u8]) -> Option<(usize, u8)> {
    let (protocol, transport) = match packet.first()? >> 4 {
        4 => (*packet.get(9)?, usize::from(packet[0] & 15) * 4),
        6 => {
            let (mut protocol, mut transport) = (*packet.get(6)?, 40);
            while matches!(protocol, 0 | 43 | DESTINATION_OPTIONS) {
                let length = usize::from(*packet.get(transport + 1)?) * 8 + 8;
                (protocol, transport) = (packet[transport], transport + length);
            }
            (protocol, transport)
        }
        _ => return None,
    };
    let bytes = match protocol {
        TCP => usize::from(*packet.get(transport + 12)? >> 4) * 4,
        UDP => 8,
        _ => return None,
    };
    if protocol == TCP && bytes < 20 {
        return None;
    }
    (packet.len() >= transport + bytes && transport >= 20).then_some((transport, protocol))
}

/// Whether lengths and checksums of a TCP or UDP packet are those that a sender writes.
pub fn is_right(packet: &[u8]) -> bool {
    let Some((transport, protocol)) = find_transport(packet) else {
        return false;
    };
    let is_right_ip = if packet[0] >> 4 == 4 {
        usize::from(u16_at(packet, 2)) == packet.len()
            && checksum(&packet[..transport.min(60)]) == 0
    } else {
        usize::from(u16_at(packet, 4)) + 40 == packet.len()
    };
    let is_right_length =
        protocol == TCP || usize::from(u16_at(packet, transport + 4)) == packet.len() - transport;
    let field = u16_at(packet, transport + checksum_at(protocol));
    is_right_ip && is_right_length && field == transport_checksum(packet, transport, protocol)
}

/// Whether a packet that was joined and cut again is still what it was. What nobody may use may differ: the id of
/// an IPv4 packet with DF, and which of the two zeros a checksum is.
pub fn is_same(found: &[u8], sent: &[u8]) -> bool {
    if found == sent {
        return true;
    }
    let (Some(one), Some(other)) = (find_transport(found), find_transport(sent)) else {
        return false;
    };
    if one != other || found.len() != sent.len() {
        return false;
    }
    let (transport, protocol) = one;
    let plain = |packet: &[u8]| {
        let mut packet = packet.to_vec();
        let mut one_zero = |at: usize| {
            if u16_at(&packet, at) == 0xFFFF {
                set_u16(&mut packet, at, 0);
            }
        };
        one_zero(transport + checksum_at(protocol));
        if found[0] >> 4 == 4 {
            one_zero(10);
            if u16_at(&packet, 6) == DF {
                set_u16(&mut packet, 4, 0);
                set_u16(&mut packet, 10, 0);
            }
        }
        packet
    };
    plain(found) == plain(sent)
}
