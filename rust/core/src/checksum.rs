//! The Internet checksum (RFC 1071), with AVX2 where the processor has it.

/// Ones' complement sum of the 16-bit words of `data` in network order, folded: 0 only if all bytes are 0.
/// A last odd byte counts as if a zero byte followed.
pub fn sum(data: &[u8]) -> u16 {
    todo!("{}", data.len())
}

/// Fold a sum of 16-bit words, or of folded sums, to 16 bits.
#[inline]
pub fn fold(mut sum: u64) -> u16 {
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    sum as u16
}

/// The value for a checksum field that was 0; over correct data it is 0. As `wire.ip.internet_checksum`.
pub fn internet_checksum(data: &[u8]) -> u16 {
    !sum(data)
}
