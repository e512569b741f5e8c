//! The 16 bytes in front of every datagram except hole punches; as `nebula_mp.wire.header`.

/// Bytes of the header, which are the AEAD's associated data.
pub const HEADER_BYTES: usize = 16;
/// Bytes of the tag behind each sealed packet.
pub const TAG_BYTES: usize = 16;
/// What sealing adds to a packet.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES + TAG_BYTES;
/// The only version.
pub const VERSION: u8 = 1;
/// Message types, the low nibble of byte 0.
pub const HANDSHAKE: u8 = 0;
/// A data message; subtype 0 is an IP packet, 1 a relay frame.
pub const MESSAGE: u8 = 1;
/// Not authenticated: a hint that an index is unknown.
pub const RECV_ERROR: u8 = 2;
/// Lighthouse protocol.
pub const LIGHTHOUSE: u8 = 3;
/// Liveness; subtype 0 request, 1 reply.
pub const TEST: u8 = 4;
/// The peer ends the tunnel.
pub const CLOSE_TUNNEL: u8 = 5;
/// Relay control.
pub const CONTROL: u8 = 6;
/// Subtype of a data message that is an IP packet.
pub const MESSAGE_IP: u8 = 0;
/// Subtype of a data message that is a relay frame.
pub const MESSAGE_RELAY: u8 = 1;
/// Nothing is sealed at or beyond this counter.
pub const COUNTER_LIMIT: u64 = u64::MAX - (1 << 40);
/// The counter of the last message of a handshake: data counters begin behind it.
pub const STAGE_2_COUNTER: u64 = 2;
/// The largest datagram a Nebula node reads.
pub const DATAGRAM_BYTES_MAX: usize = 9001;

/// Write the header of a data message.
#[inline]
pub fn write_message(out: &mut [u8; HEADER_BYTES], subtype: u8, remote_index: u32, counter: u64) {
    out[0] = VERSION << 4 | MESSAGE;
    out[1] = subtype;
    out[2] = 0;
    out[3] = 0;
    out[4..8].copy_from_slice(&remote_index.to_be_bytes());
    out[8..16].copy_from_slice(&counter.to_be_bytes());
}

/// The type of a message, if type and subtype exist in this version.
#[inline]
pub fn kind(first: u8, subtype: u8) -> Option<u8> {
    let kind = first & 15;
    let known = match kind {
        HANDSHAKE | RECV_ERROR | LIGHTHOUSE | CLOSE_TUNNEL | CONTROL => subtype == 0,
        MESSAGE | TEST => subtype <= 1,
        _ => false,
    };
    (first >> 4 == VERSION && known).then_some(kind)
}

/// Index and counter of a header.
#[inline]
pub fn index_and_counter(header: &[u8; HEADER_BYTES]) -> (u32, u64) {
    let index = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
    let mut counter = [0; 8];
    counter.copy_from_slice(&header[8..]);
    (index, u64::from_be_bytes(counter))
}
