//! Superpackets as the kernel makes them, and their packets built one by one in the plainest way.

/// A superpacket: `payload` in pieces of `size`.
#[derive(Debug, Clone)]
pub struct Plan {
    pub is_ipv6: bool,
    pub is_udp: bool,
    pub payload: Vec<u8>,
    pub size: usize,
    pub flags: u8,
    pub sequence: u32,
    pub id: u16,
    /// Of TCP; a multiple of 4 bytes.
    pub options: Vec<u8>,
    pub port: u16,
}

pub const ACK: u8 = 0x10;
pub const PSH: u8 = 0x08;
pub const FIN: u8 = 0x01;
pub const CWR: u8 = 0x80;
const NO_HEADER: [u8; 10] = [0; 10];

fn sum(data: &[u8]) -> u32 {
    let mut total = 0_u32;
    for pair in data.chunks(2) {
        let low = pair.get(1).copied().unwrap_or(0);
        total += u32::from(pair[0]) << 8 | u32::from(low);
        total = (total & 0xFFFF) + (total >> 16);
    }
    total
}

impl Plan {
    /// IPv4 and TCP, with `length` bytes of payload.
    pub fn new(size: usize, length: usize) -> Self {
        Self {
            is_ipv6: false,
            is_udp: false,
            payload: (0..length).map(|each| (each % 251) as u8).collect(),
            size,
            flags: ACK,
            sequence: 1000,
            id: 7,
            options: Vec::new(),
            port: 40_000,
        }
    }

    pub fn udp(mut self) -> Self {
        self.is_udp = true;
        self
    }

    pub fn ipv6(mut self) -> Self {
        self.is_ipv6 = true;
        self
    }

    /// Of the longest there can be, headers included.
    pub fn longest(mut self) -> Self {
        let most = 65_535 + if self.is_ipv6 { 40 } else { 0 };
        let length = most - self.header_bytes();
        self.payload = (0..length).map(|each| (each % 249) as u8).collect();
        self
    }

    pub fn ip_bytes(&self) -> usize {
        if self.is_ipv6 {
            40
        } else {
            20
        }
    }

    pub fn header_bytes(&self) -> usize {
        self.ip_bytes()
            + if self.is_udp {
                8
            } else {
                20 + self.options.len()
            }
    }

    pub fn count(&self) -> usize {
        self.payload.len().div_ceil(self.size).max(1)
    }

    /// As the device gives it.
    pub fn frame(&self) -> Vec<u8> {
        let kind = match (self.is_udp, self.is_ipv6) {
            (true, _) => 5,
            (false, true) => 4,
            (false, false) => 1,
        };
        let has_cwr = !self.is_udp && self.flags & CWR != 0;
        let mut frame = vec![1, kind | if has_cwr { 0x80 } else { 0 }];
        let offset = if self.is_udp { 6 } else { 16 };
        for number in [self.header_bytes(), self.size, self.ip_bytes(), offset] {
            frame.extend((number as u16).to_ne_bytes());
        }
        frame.extend(self.whole());
        frame
    }

    /// The superpacket itself; its checksum field holds the sum of the pseudo header.
    pub fn whole(&self) -> Vec<u8> {
        let mut whole = self.build(&self.payload, self.flags, 0);
        let at = self.ip_bytes() + if self.is_udp { 6 } else { 16 };
        let pseudo = self.pseudo(whole.len() - self.ip_bytes());
        whole[at..at + 2].copy_from_slice(&(sum(&pseudo) as u16).to_be_bytes());
        whole
    }

    /// What it means, packet by packet.
    pub fn packets(&self) -> Vec<Vec<u8>> {
        if self.payload.is_empty() {
            return vec![self.build(&[], self.flags, 0)];
        }
        let pieces = self.payload.chunks(self.size);
        let last = self.count() - 1;
        let packet = |(number, piece)| {
            let mut flags = self.flags;
            if number != 0 {
                flags &= !CWR;
            }
            if number != last {
                flags &= !(PSH | FIN);
            }
            self.build(piece, flags, number)
        };
        pieces.enumerate().map(packet).collect()
    }

    fn addresses(&self) -> Vec<u8> {
        if self.is_ipv6 {
            let mut both = [0; 32];
            (both[0], both[15], both[16], both[31]) = (0xFD, 1, 0xFD, 2);
            both.to_vec()
        } else {
            vec![10, 9, 0, 1, 10, 9, 0, 2]
        }
    }

    fn protocol(&self) -> u8 {
        if self.is_udp {
            17
        } else {
            6
        }
    }

    fn pseudo(&self, length: usize) -> Vec<u8> {
        let mut pseudo = self.addresses();
        pseudo.extend((length as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, self.protocol()]);
        pseudo
    }

    fn build(&self, payload: &[u8], flags: u8, number: usize) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(self.port.to_be_bytes());
        transport.extend(53_u16.to_be_bytes());
        if self.is_udp {
            transport.extend(((8 + payload.len()) as u16).to_be_bytes());
            transport.extend([0; 2]);
        } else {
            let sequence = self.sequence.wrapping_add((number * self.size) as u32);
            transport.extend(sequence.to_be_bytes());
            transport.extend(77_u32.to_be_bytes());
            transport.extend([(5 + self.options.len() / 4) as u8 * 16, flags]);
            transport.extend(500_u16.to_be_bytes());
            transport.extend([0; 4]);
            transport.extend(&self.options);
        }
        transport.extend(payload);
        let mut checked = self.pseudo(transport.len());
        checked.extend(&transport);
        let mut field = !(sum(&checked) as u16);
        if self.is_udp && field == 0 {
            field = 0xFFFF;
        }
        let at = if self.is_udp { 6 } else { 16 };
        transport[at..at + 2].copy_from_slice(&field.to_be_bytes());

        let mut packet = Vec::new();
        if self.is_ipv6 {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((transport.len() as u16).to_be_bytes());
            packet.extend([self.protocol(), 64]);
        } else {
            packet.extend([0x45, 0]);
            packet.extend(((20 + transport.len()) as u16).to_be_bytes());
            packet.extend(self.id.wrapping_add(number as u16).to_be_bytes());
            packet.extend([0x40, 0, 64, self.protocol(), 0, 0]);
        }
        packet.extend(self.addresses());
        if !self.is_ipv6 {
            let field = !(sum(&packet) as u16);
            packet[10..12].copy_from_slice(&field.to_be_bytes());
        }
        packet.extend(transport);
        packet
    }
}

/// A packet of a UDP flow that is complete as it is, behind a header that says so.
pub fn plain(number: u32, size: usize) -> Vec<u8> {
    let mut frame = NO_HEADER.to_vec();
    frame.extend(plain_packet(number, size));
    frame
}

/// The packet alone.
pub fn plain_packet(number: u32, size: usize) -> Vec<u8> {
    let mut plan = Plan::new(usize::MAX, 0).udp();
    plan.port = 5000;
    plan.payload = number.to_be_bytes().to_vec();
    plan.payload.resize(size.max(4), 0xA5);
    plan.build(&plan.payload, 0, 0)
}
