//! The Internet checksum, with AVX2 where the processor has it.
//!
//! ```text
//! ip | segment | coalesce -> [checksum]
//! ```
//!
//! Knows sums; knows nothing of what the bytes mean. Source: RFC 1071.
//!
//! Words are added in the order of this machine and only the folded sum is swapped (RFC 1071 section 2(B)). Wider
//! words may be added as they are, since 2^16 is 1 modulo 65535. Sums of parts that begin at even offsets may be
//! added, and folded once.

/// Below this many bytes, which is any header but those with many options, vectors do not pay.
const SMALL_BYTES: usize = 64;

/// Ones' complement sum of the 16-bit words of `data` in network order, folded: 0 only if all bytes are 0.
/// A last odd byte counts as if a zero byte followed.
#[inline]
pub fn sum(data: &[u8]) -> u16 {
    let words = if data.len() < SMALL_BYTES {
        portable(data)
    } else {
        long(data)
    };
    u16::from_be(fold(words))
}

/// Fold a sum of 16-bit words, or of folded sums, to 16 bits: 0 only for 0.
#[inline]
pub fn fold(mut sum: u64) -> u16 {
    // A carry that the first of two steps leaves is taken up by the second.
    sum = (sum & 0xFFFF_FFFF) + (sum >> 32);
    sum = (sum & 0xFFFF_FFFF) + (sum >> 32);
    sum = (sum & 0xFFFF) + (sum >> 16);
    sum = (sum & 0xFFFF) + (sum >> 16);
    sum as u16
}

/// The value for a checksum field that was 0; over correct data it is 0. As `wire.ip.internet_checksum`.
#[inline]
pub fn internet_checksum(data: &[u8]) -> u16 {
    !sum(data)
}

#[inline(never)]
fn long(data: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { avx2(data) };
    }
    portable(data)
}

/// Sum of words in the order of this machine; below 2^34, so that it may be added to others.
#[inline]
fn portable(data: &[u8]) -> u64 {
    let mut words = data.chunks_exact(8);
    let mut sum: u64 = 0;
    for word in &mut words {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(word);
        // A carry is 2^64, which is 1 modulo 65535 too.
        let (added, carry) = sum.overflowing_add(u64::from_ne_bytes(bytes));
        sum = added + u64::from(carry);
    }
    sum = (sum & 0xFFFF_FFFF) + (sum >> 32);
    let mut rest = words.remainder();
    if let Some((&[a, b, c, d], behind)) = rest.split_first_chunk() {
        sum += u64::from(u32::from_ne_bytes([a, b, c, d]));
        rest = behind;
    }
    if let Some((&[a, b], behind)) = rest.split_first_chunk() {
        sum += u64::from(u16::from_ne_bytes([a, b]));
        rest = behind;
    }
    if let [a] = *rest {
        sum += u64::from(u16::from_ne_bytes([a, 0]));
    }
    sum
}

/// As `portable`. A multiplication by 1 that adds neighbours is the cheapest way to widen words, but takes them as
/// signed: so each is made smaller by 2^15 first, by turning over its upper bit, and that is added again at the end.
///
/// # Safety
///
/// The processor has AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn avx2(data: &[u8]) -> u64 {
    use std::arch::x86_64::*;

    const VECTOR: usize = 32;
    const LANES: usize = 4;
    /// After so many vectors the narrow sums are added up: each is at most 2^16 further from 0 with each vector.
    const PART: usize = (VECTOR * LANES) << 12;

    let (whole, rest) = data.split_at(data.len() / VECTOR * VECTOR);
    let mut sum: i64 = (whole.len() / 2) as i64 * (1 << 15);
    // SAFETY: the caller knows that there is AVX2. All loads lie in exact chunks, and need no alignment.
    unsafe {
        let turn = _mm256_set1_epi16(i16::MIN);
        let one = _mm256_set1_epi16(1);
        for part in whole.chunks(PART) {
            let mut lanes = [_mm256_setzero_si256(); LANES];
            let mut blocks = part.chunks_exact(VECTOR * LANES);
            for block in &mut blocks {
                for (number, lane) in lanes.iter_mut().enumerate() {
                    let words = _mm256_loadu_si256(block.as_ptr().add(number * VECTOR).cast());
                    let pairs = _mm256_madd_epi16(_mm256_xor_si256(words, turn), one);
                    *lane = _mm256_add_epi32(*lane, pairs);
                }
            }
            for vector in blocks.remainder().chunks_exact(VECTOR) {
                let words = _mm256_loadu_si256(vector.as_ptr().cast());
                let pairs = _mm256_madd_epi16(_mm256_xor_si256(words, turn), one);
                lanes[0] = _mm256_add_epi32(lanes[0], pairs);
            }
            let lanes = _mm256_add_epi32(
                _mm256_add_epi32(lanes[0], lanes[1]),
                _mm256_add_epi32(lanes[2], lanes[3]),
            );
            let low = _mm256_cvtepi32_epi64(_mm256_castsi256_si128(lanes));
            let high = _mm256_cvtepi32_epi64(_mm256_extracti128_si256(lanes, 1));
            let numbers = _mm256_add_epi64(low, high);
            let numbers = _mm_add_epi64(
                _mm256_castsi256_si128(numbers),
                _mm256_extracti128_si256(numbers, 1),
            );
            sum += _mm_cvtsi128_si64(numbers) + _mm_extract_epi64(numbers, 1);
        }
    }
    // What was taken away has been added, so this is a sum of words.
    sum as u64 + portable(rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Word by word, as RFC 1071 says it.
    fn reference(data: &[u8]) -> u16 {
        let mut sum: u32 = 0;
        for pair in data.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xFFFF) + (sum >> 16);
        }
        sum as u16
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut state: u32 = 0x1234_5678;
        (0..length)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect()
    }

    fn folded(words: u64) -> u16 {
        u16::from_be(fold(words))
    }

    #[test]
    fn it_is_the_sum_of_rfc_1071_at_every_length_and_alignment() {
        let data = noise(256);
        let ends = if cfg!(miri) { 10 } else { 200 };
        for begin in 0..33 {
            for end in begin..begin + ends {
                let part = &data[begin..end];
                assert_eq!(sum(part), reference(part), "{begin}..{end}");
                assert_eq!(folded(portable(part)), reference(part), "{begin}..{end}");
            }
        }
    }

    #[test]
    fn the_example_of_rfc_1071_comes_out() {
        assert_eq!(
            sum(&[0x00, 0x01, 0xF2, 0x03, 0xF4, 0xF5, 0xF6, 0xF7]),
            0xDDF2
        );
    }

    #[test]
    fn only_zeros_have_the_sum_zero() {
        for length in [0, 1, 20, 63, 64, 128, 1300] {
            let mut data = vec![0; length];
            assert_eq!(sum(&data), 0);
            assert_eq!(internet_checksum(&data), 0xFFFF);
            data.fill(0xFF);
            if length > 0 {
                assert_ne!(sum(&data), 0);
            }
            for at in (0..length).step_by(if cfg!(miri) { 41 } else { 1 }) {
                data.fill(0);
                data[at] = 1;
                assert_ne!(sum(&data), 0, "{length} {at}");
            }
        }
    }

    #[test]
    fn the_largest_sums_do_not_overflow() {
        let length = if cfg!(miri) { 1000 } else { (1 << 21) + 70_001 };
        for byte in [0x00, 0x7F, 0x80, 0xFF] {
            let data = vec![byte; length];
            assert_eq!(sum(&data), reference(&data), "{byte:#x}");
        }
    }

    #[test]
    fn a_fold_takes_every_carry() {
        for (number, folded) in [
            (0, 0),
            (1, 1),
            (0xFFFF, 0xFFFF),
            (0x1_0000, 1),
            (0x1_FFFF, 1),
            (0x1_FFFE, 0xFFFF),
            (0xFFFF_FFFF, 0xFFFF),
            (u64::MAX, 0xFFFF),
            (u64::MAX - 1, 0xFFFE),
        ] {
            assert_eq!(fold(number), folded, "{number:#x}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 256 }))]

        #[test]
        fn vectors_and_words_give_the_same(data in proptest::collection::vec(any::<u8>(), 0..3000), skip in 0_usize..32) {
            let data = &data[skip.min(data.len())..];
            prop_assert_eq!(sum(data), reference(data));
            prop_assert_eq!(folded(portable(data)), reference(data));
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2.
                prop_assert_eq!(folded(unsafe { avx2(data) }), reference(data));
            }
        }

        #[test]
        fn a_checksum_in_its_field_makes_the_rest_right(mut data in proptest::collection::vec(any::<u8>(), 2..2000)) {
            data[..2].fill(0);
            let field = internet_checksum(&data);
            data[..2].copy_from_slice(&field.to_be_bytes());
            prop_assert_eq!(internet_checksum(&data), 0);
        }

        #[test]
        fn sums_of_parts_add_up(data in proptest::collection::vec(any::<u8>(), 0..500), half in 0_usize..250) {
            let (left, right) = data.split_at((2 * half).min(data.len() & !1));
            prop_assert_eq!(fold(u64::from(sum(left)) + u64::from(sum(right))), sum(&data));
        }
    }
}
