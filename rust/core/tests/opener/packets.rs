//! Packets of TCP and UDP flows with right checksums, as the far host's local stack would send them.

use nebula_mp_core::checksum::{fold, sum};

pub const FAR4: [u8; 4] = [10, 9, 0, 2];
const NEAR4: [u8; 4] = [10, 9, 0, 1];
pub const FAR6: [u8; 16] = [0xFD, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const NEAR6: [u8; 16] = [0xFD, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
pub const ACK: u8 = 0x10;
pub const PSH: u8 = 0x08;

/// A flow from the far host's local stack to ours, and what its next packet says.
#[derive(Clone, Copy)]
pub struct Flow {
    pub is_ipv6: bool,
    pub is_tcp: bool,
    pub port: u16,
    pub sequence: u32,
    pub id: u16,
    pub flags: u8,
    pub source: [u8; 4],
}

impl Flow {
    pub fn new(is_ipv6: bool, is_tcp: bool) -> Self {
        Self {
            is_ipv6,
            is_tcp,
            port: 5000,
            sequence: 0xFFFF_F000,
            id: 0xFFF0,
            flags: ACK,
            source: FAR4,
        }
    }

    pub fn on_port(mut self, port: u16) -> Self {
        self.port = port;
        self
    }

    /// Its next packet, with so much payload.
    pub fn next(&mut self, bytes: usize) -> Vec<u8> {
        let payload: Vec<u8> = (0..bytes)
            .map(|each| (each as u32 ^ self.sequence >> 3 ^ u32::from(self.id)) as u8)
            .collect();
        let packet = self.packet(&payload);
        self.sequence = self.sequence.wrapping_add(bytes as u32);
        self.id = self.id.wrapping_add(1);
        packet
    }

    fn packet(&self, payload: &[u8]) -> Vec<u8> {
        let mut transport = Vec::new();
        transport.extend(443_u16.to_be_bytes());
        transport.extend(self.port.to_be_bytes());
        let checksum_at = if self.is_tcp {
            transport.extend(self.sequence.to_be_bytes());
            transport.extend(77_u32.to_be_bytes());
            transport.extend([8 << 4, self.flags]);
            transport.extend(500_u16.to_be_bytes());
            transport.extend([0; 4]);
            transport.extend([1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]); // timestamps
            16
        } else {
            transport.extend((8 + payload.len() as u16).to_be_bytes());
            transport.extend([0; 2]);
            6
        };
        transport.extend(payload);
        let protocol = if self.is_tcp { 6 } else { 17 };
        let addresses = if self.is_ipv6 {
            [FAR6, NEAR6].concat()
        } else {
            [self.source, NEAR4].concat()
        };
        let parts = [
            sum(&addresses),
            protocol,
            transport.len() as u16,
            sum(&transport),
        ];
        let total = parts.iter().map(|each| u64::from(*each)).sum();
        let field = match !fold(total) {
            0 if !self.is_tcp => 0xFFFF,
            field => field,
        };
        transport[checksum_at..checksum_at + 2].copy_from_slice(&field.to_be_bytes());
        let mut packet = Vec::new();
        if self.is_ipv6 {
            packet.extend([0x60, 0, 0, 0]);
            packet.extend((transport.len() as u16).to_be_bytes());
            packet.extend([protocol as u8, 64]);
        } else {
            packet.extend([0x45, 0]);
            packet.extend((20 + transport.len() as u16).to_be_bytes());
            packet.extend(self.id.to_be_bytes());
            packet.extend([0, 0, 64, protocol as u8, 0, 0]);
            let field = !fold(u64::from(sum(&packet)) + u64::from(sum(&addresses)));
            packet[10..12].copy_from_slice(&field.to_be_bytes());
        }
        packet.extend(addresses);
        packet.extend(transport);
        packet
    }
}
