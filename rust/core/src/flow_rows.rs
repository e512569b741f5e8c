//! One flow table as it lies in memory: its rows, and when each of them last had a packet.
//!
//! Knows where a key's row is, and whether it is whole; knows nothing of other tables, nor of what a verdict means for
//! a packet. A bucket is a line of tags, then 7 rows of a cache line each, so that a hit touches two lines and a miss
//! one. A row is read under its sequence number, which is odd while its writer is at it; what was read is a copy,
//! since its writer may have gone mad. A bit in the first page says of a group of buckets whether any of them was ever
//! written to, so that a look-up touches nothing where there is nothing.
//!
//! A row holds while it has the current rules generation and its last packet is not older than its timeout.

use std::mem::offset_of;
use std::sync::atomic::{fence, Ordering};

use crate::error::Result;
use crate::ip::{FlowKey, TCP, UDP};
use crate::layout::{
    row_count, Bucket, FlowRow, SeenRow, BUCKETS_MAX, BUCKET_ROWS, ROWS_AT, ROWS_AT_WORD,
    RULES_GENERATION, SEEDS, SEED_COUNT, TIMEOUTS, USED, USED_COUNT,
};
use crate::region::Region;

/// Readers note a packet when the last one noted is this old, or an eighth of the timeout if that is less.
const SEEN_STEP_MS: u32 = 1000;
/// To read a row that is being written; a miss only costs an upcall.
const TRIES: usize = 3;

/// The flow is allowed in a direction: `Row::verdict`.
pub const ALLOW: u32 = 1;
/// It is refused.
pub const REFUSE: u32 = 2;
/// Allowed, whichever direction's bits one looks at.
const ALLOW_ANY: u32 = ALLOW << Direction::Outbound.shift() | ALLOW << Direction::Inbound.shift();
const ORIGIN_SHIFT: u32 = 4;
const TWO_BITS: u32 = 3;

/// How many groups of buckets there are bits for.
const GROUPS_MAX: usize = 64 * USED_COUNT;

const TAGS_AT: usize = offset_of!(Bucket, tags);
const ROWS_IN_BUCKET_AT: usize = offset_of!(Bucket, rows);
const KEY_WORD: usize = offset_of!(FlowRow, local) / 8;
const PEER_WORD: usize = offset_of!(FlowRow, peer) / 8;
/// Timeout in the low half, verdicts in the high one.
const REST_WORD: usize = offset_of!(FlowRow, timeout_ms) / 8;
const RULES_HALF: usize = offset_of!(FlowRow, rules_generation) / 4;

const _: () = assert!(
    offset_of!(FlowRow, sequence) == 0
        && PEER_WORD == KEY_WORD + 5
        && offset_of!(FlowRow, verdicts) == offset_of!(FlowRow, timeout_ms) + 4
);

/// Where a packet comes from, and of a flow, where its first packet came from; its code is the row's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The local stack.
    Outbound = 1,
    /// A tunnel.
    Inbound = 2,
}

impl Direction {
    /// Of its bits among the verdicts.
    const fn shift(self) -> u32 {
        match self {
            Self::Outbound => 0,
            Self::Inbound => 2,
        }
    }
}

/// Which bucket a key is in, and with which tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its number.
    pub bucket: usize,
    /// Never 0, which is a row that was never used.
    pub tag: u32,
}

/// What a row says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Which rules it is of.
    pub rules_generation: u32,
    /// Whose packets these are (`PeerRef`), or 0.
    pub peer: u64,
    /// Since the last packet.
    pub timeout_ms: u32,
    /// As in the row.
    pub bits: u32,
}

impl Verdict {
    /// Allowed both ways.
    pub fn allow(rules_generation: u32, peer: u64, timeout_ms: u32, origin: Direction) -> Self {
        Self {
            rules_generation,
            peer,
            timeout_ms,
            bits: ALLOW_ANY | (origin as u32) << ORIGIN_SHIFT,
        }
    }

    /// What it says of a direction: `ALLOW`, `REFUSE`, or nothing.
    #[inline]
    pub fn of(&self, direction: Direction) -> u32 {
        self.bits >> direction.shift() & TWO_BITS
    }

    /// Whether it allows anything.
    #[inline]
    pub fn allows_any(&self) -> bool {
        self.bits & ALLOW_ANY != 0
    }

    /// In which direction the flow was begun, if it says so.
    pub fn origin(&self) -> Option<Direction> {
        match self.bits >> ORIGIN_SHIFT & TWO_BITS {
            1 => Some(Direction::Outbound),
            2 => Some(Direction::Inbound),
            _ => None,
        }
    }
}

/// A copy of a row that was whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Of the bucket.
    pub number: usize,
    /// What it says.
    pub verdict: Verdict,
    /// When it last had a packet.
    pub seen_ms: u64,
}

impl Row {
    /// Signed: another process may have noted a packet that it received later than we did ours.
    #[inline]
    pub fn age_ms(&self, now_ms: u64) -> i128 {
        i128::from(now_ms) - i128::from(self.seen_ms)
    }

    /// Whether its timeout is not over, whatever the rules are.
    #[inline]
    pub fn is_recent(&self, now_ms: u64) -> bool {
        self.age_ms(now_ms) < i128::from(self.verdict.timeout_ms)
    }

    /// Whether it may be relied upon.
    #[inline]
    pub fn holds(&self, rules_generation: u64, now_ms: u64) -> bool {
        u64::from(self.verdict.rules_generation) == rules_generation && self.is_recent(now_ms)
    }
}

/// One table, and its last-seen words.
pub struct FlowRows {
    flows: Region,
    seen: Region,
    mask: usize,
    group_shift: u32,
}

impl FlowRows {
    /// `seen` is writable; `flows` need not be.
    pub fn new(flows: Region, seen: Region) -> Result<Self> {
        assert!(seen.is_writable());
        let buckets = row_count(&flows, size_of::<Bucket>(), BUCKETS_MAX)?;
        if !buckets.is_power_of_two() {
            return Err(flows.contradiction("number of buckets", buckets, "a power of two"));
        }
        let rows = buckets * BUCKET_ROWS;
        if row_count(&seen, size_of::<SeenRow>(), BUCKETS_MAX * BUCKET_ROWS)? != rows {
            return Err(seen.contradiction("number of rows", seen.parameters()[0], rows));
        }
        Ok(Self {
            flows,
            seen,
            mask: buckets - 1,
            group_shift: buckets.ilog2().saturating_sub(GROUPS_MAX.ilog2()),
        })
    }

    /// Refuse to stand beside a table with another number of buckets.
    pub fn check_fits(&self, other: &Self) -> Result<()> {
        let (ours, theirs) = (self.mask + 1, other.mask + 1);
        if ours != theirs {
            return Err(self.flows.contradiction("number of buckets", ours, theirs));
        }
        Ok(())
    }

    /// Whether rows may be stored.
    pub fn is_writable(&self) -> bool {
        self.flows.is_writable()
    }

    /// The secrets of the hash, which all tables share.
    pub fn seeds(&self) -> [u64; SEED_COUNT] {
        std::array::from_fn(|number| self.flows.word(SEEDS + number).load(Ordering::Relaxed))
    }

    /// Control's table: which rules are in force.
    #[inline]
    pub fn rules_generation(&self) -> u64 {
        self.flows.word(RULES_GENERATION).load(Ordering::Relaxed)
    }

    /// Control's table: how long a flow of this protocol holds without a packet.
    pub fn timeout_ms(&self, protocol: u8) -> u32 {
        let number = match protocol {
            TCP => 0,
            UDP => 1,
            _ => 2,
        };
        let word = self.flows.word(TIMEOUTS + number).load(Ordering::Relaxed);
        u32::try_from(word).unwrap_or(u32::MAX)
    }

    /// Where a key's row would be.
    #[inline]
    pub fn place(&self, seeds: &[u64; SEED_COUNT], key: &FlowKey) -> Place {
        let hashed = flow_hash(seeds, key);
        Place {
            bucket: (hashed >> 40) as usize & self.mask,
            tag: hashed as u32 | 1,
        }
    }

    /// The first whole row with this key.
    #[inline]
    pub fn find(&self, place: Place, key: &FlowKey) -> Option<Row> {
        let (word, bit) = self.used(place.bucket);
        if self.flows.word(word).load(Ordering::Relaxed) & bit == 0 {
            return None;
        }
        for number in 0..BUCKET_ROWS {
            if self.tag(place.bucket, number) != place.tag {
                continue;
            }
            if let Some((found, row)) = self.read(place.bucket, number) {
                if found == *key {
                    return Some(row);
                }
            }
        }
        None
    }

    /// Index of the word, and which of its bits, that say whether a bucket's group was ever written to.
    #[inline]
    fn used(&self, bucket: usize) -> (usize, u64) {
        let group = bucket >> self.group_shift;
        (USED + group / 64, 1 << (group % 64))
    }

    /// What was hashed to get to a row, in part; 0 if it was never used.
    #[inline]
    pub fn tag(&self, bucket: usize, number: usize) -> u32 {
        self.flows
            .half(tag_half(bucket, number))
            .load(Ordering::Relaxed)
    }

    /// A row, if it is whole.
    #[inline]
    pub fn read(&self, bucket: usize, number: usize) -> Option<(FlowKey, Row)> {
        let word = row_word(bucket, number);
        let half = 2 * word;
        let load = |number: usize| self.flows.word(word + number).load(Ordering::Relaxed);
        for _ in 0..TRIES {
            let sequence = self.flows.half(half).load(Ordering::Acquire);
            if sequence & 1 != 0 {
                return None;
            }
            let rules_generation = self.flows.half(half + RULES_HALF).load(Ordering::Relaxed);
            let key = FlowKey(std::array::from_fn(|number| load(KEY_WORD + number)));
            let (peer, rest) = (load(PEER_WORD), load(REST_WORD));
            fence(Ordering::Acquire);
            if self.flows.half(half).load(Ordering::Relaxed) != sequence {
                continue;
            }
            let seen = self.seen.word(seen_word(bucket, number));
            let row = Row {
                number,
                verdict: Verdict {
                    rules_generation,
                    peer,
                    timeout_ms: rest as u32,
                    bits: (rest >> 32) as u32,
                },
                seen_ms: seen.load(Ordering::Relaxed),
            };
            return Some((key, row));
        }
        None
    }

    /// Note a packet of a row that was found, unless one was noted shortly before.
    #[inline]
    pub fn note(&self, bucket: usize, row: &Row, now_ms: u64) {
        let step_ms = (row.verdict.timeout_ms >> 3).min(SEEN_STEP_MS);
        if row.age_ms(now_ms) >= i128::from(step_ms) {
            self.seen
                .word(seen_word(bucket, row.number))
                .store(now_ms, Ordering::Relaxed);
        }
    }

    /// Overwrite a row; by its one writer. Who is killed inside leaves it odd: a miss until a successor uses it.
    pub fn write(&self, place: Place, key: &FlowKey, row: &Row) {
        let Place { bucket, tag } = place;
        assert!(self.flows.is_writable());
        let word = row_word(bucket, row.number);
        let half = 2 * word;
        let store = |number: usize, value: u64| {
            let at = self.flows.word(word + number);
            at.store(value, Ordering::Relaxed);
        };
        let (group, bit) = self.used(bucket);
        let group = self.flows.word(group);
        group.store(group.load(Ordering::Relaxed) | bit, Ordering::Relaxed);
        let sequence = self.flows.half(half).load(Ordering::Relaxed) | 1;
        self.flows.half(half).store(sequence, Ordering::Relaxed);
        // Nothing below is seen before the odd number is.
        fence(Ordering::Release);
        self.flows
            .half(tag_half(bucket, row.number))
            .store(tag, Ordering::Relaxed);
        self.seen
            .word(seen_word(bucket, row.number))
            .store(row.seen_ms, Ordering::Relaxed);
        let verdict = &row.verdict;
        self.flows
            .half(half + RULES_HALF)
            .store(verdict.rules_generation, Ordering::Relaxed);
        for (number, each) in key.0.into_iter().enumerate() {
            store(KEY_WORD + number, each);
        }
        store(PEER_WORD, verdict.peer);
        let rest = u64::from(verdict.timeout_ms) | u64::from(verdict.bits) << 32;
        store(REST_WORD, rest);
        self.flows
            .half(half)
            .store(sequence.wrapping_add(1), Ordering::Release);
    }
}

/// The hash of a key with the table's six seeds: `shm_flows.flow_hash`, three multiply-folds.
#[inline]
pub fn flow_hash(seeds: &[u64; 6], key: &FlowKey) -> u64 {
    let [a, b, c, d, e] = key.0;
    let [p, q, r, s, t, u] = *seeds;
    fold(fold(a ^ p, b ^ q) ^ e ^ t, fold(c ^ r, d ^ s) ^ u)
}

/// The low half of the 128-bit product xor its high half.
#[inline]
fn fold(left: u64, right: u64) -> u64 {
    let product = u128::from(left) * u128::from(right);
    product as u64 ^ (product >> 64) as u64
}

/// Index of a row's first word.
#[inline]
fn row_word(bucket: usize, number: usize) -> usize {
    let at = ROWS_AT + bucket * size_of::<Bucket>();
    (at + ROWS_IN_BUCKET_AT + number * size_of::<FlowRow>()) / 8
}

/// Index of its tag among the halves of words.
#[inline]
fn tag_half(bucket: usize, number: usize) -> usize {
    (ROWS_AT + bucket * size_of::<Bucket>() + TAGS_AT) / 4 + number
}

/// Index of its word in the region of last-seen words.
#[inline]
fn seen_word(bucket: usize, number: usize) -> usize {
    ROWS_AT_WORD + bucket * BUCKET_ROWS + number
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_pythons() {
        // By `shm_flows.flow_hash`, for `pack_key` of 10.42.0.1:1234 -> 10.42.0.2:443 TCP and others.
        let seeds =
            std::array::from_fn(|each| 0x9E37_79B9_7F4A_7C15_u64.wrapping_mul(each as u64 + 1));
        for (key, expected) in HASHES {
            assert_eq!(flow_hash(&seeds, &FlowKey(key)), expected, "{key:x?}");
        }
    }

    #[test]
    fn nothing_overflows_in_the_hash() {
        assert_eq!(flow_hash(&[0; 6], &FlowKey([u64::MAX; 5])), PYTHONS_OF_ONES);
        assert_eq!(flow_hash(&[0; 6], &FlowKey([0; 5])), 0);
    }

    const HASHES: [([u64; 5], u64); 3] = [
        (
            [
                0x0000_0000_0100_2A0A,
                0x0000_0000_0000_0000,
                0x0000_0000_0200_2A0A,
                0x0000_0000_0000_0000,
                0x0000_0006_01BB_04D2,
            ],
            0xDCBB_3D1D_E5F3_22D4,
        ),
        (
            [
                0x0000_0000_4200_00FD,
                0x0100_0000_0000_0000,
                0x0000_0000_4200_00FD,
                0x0200_0000_0000_0000,
                0x0000_0311_FFFF_0035,
            ],
            0x2FDD_BB3D_AE2C_F51A,
        ),
        (
            [
                0x0000_0000_0000_0000,
                0x0000_0000_0000_0000,
                0x0000_0000_FFFF_FFFF,
                0x0000_0000_0000_0000,
                0x0000_0001_0000_0000,
            ],
            0x5DA2_00E5_EB68_0094,
        ),
    ];
    const PYTHONS_OF_ONES: u64 = 0x0000_0000_0000_0000;
}
